// The controls of the viewer. Runs once when the page loads, after board.js, compare.js, hand.js and take.js;
// `element`, `props`, `trigger` and `watch` are gradio's.
const find = (selector) => element.querySelector(selector);
const touch = matchMedia("(pointer: coarse)").matches;
const HINT = touch
    ? "Tap a patch to read its score and to keep or drop it; tick Brush to paint over many."
    : "Point at a patch to read its score; click, drag over many, or press space to keep or drop.";
let result = null, picked = null, preview = null, stroke = null, stroked = false, playing = null, linked = false;
let drawn = null, asked = null, pending = null, now = null; // the value; settings: of the answer, of the question on its way, of the page
let current = null, beside = null; // boards

const layer = () => Number(find("[name=layer]").value);
const picture = () => Number(find("[name=picture]").value);

// -- what is shown ------------------------------------------------------------------------------------------------

function show() {
    if (drawn !== null && props.value === drawn) return; // gradio sends the last value of a stream twice
    drawn = props.value ?? "";
    result = JSON.parse(drawn || "null");
    [picked, preview] = [null, null];
    asked = pending ?? asked;
    pending = null;
    play(false);
    find(".viewer").classList.toggle("empty", !result);
    const root = document.querySelector("#viewer");
    root.dataset.results = Number(root.dataset.results ?? 0) + 1; // so that one can wait for the next
    if (!result) return stale();
    for (const [name, most, value] of [["layer", result.record.depth - 1, result.record.depth - 1], ["picture", result.pictures.length - 1, 0]]) {
        find(`[name=${name}]`).max = most;
        find(`[name=${name}]`).value = value;
    }
    find(".pictures").hidden = result.pictures.length === 1;
    find(".touch").hidden = !touch;
    current = new Board(find(".current"));
    beside = new Board(find(".pinned"));
    draw();
    find(".detail").textContent = HINT;
    stale();
    restorePicked();
}

function draw() {
    const both = comparison.fits(result);
    current.show(result, picture());
    if (both) beside.show(comparison.pinned, picture());
    else find(".pinned svg").replaceChildren();
    find(".pinned").hidden = !both;
    find(".boards").classList.toggle("both", both);
    find(".current .caption").textContent = both ? `Current: ${caption(result.record)}` : "";
    find(".pinned .caption").textContent = both ? `Pinned: ${caption(comparison.pinned.record)}` : "";
    find(".pictures .name").textContent =
        `Image ${picture() + 1} of ${result.pictures.length}: ${result.pictures[picture()].name}`;
    bars();
    paint();
}

function paint() {
    const both = !find(".pinned").hidden, heated = find("[name=heat]").checked, at = layer();
    const here = (token) => (picked ? picked.has(token) : current.alive(token, at));
    if (both) beside.paint({ layer: at, heated, other: here });
    const entered = current.paint({ layer: at, heated, picked, other: both ? (token) => beside.alive(token, at) : null });
    find(".scale").hidden = !heated || !entered;
    find(".scale .low").textContent = `rank ${entered}`;
    find(".scale .high").textContent = "rank 1";
    const kept = current.cells.flatMap((_, token) => (here(token) ? [token] : []));
    const there = both ? beside.cells.flatMap((_, token) => (beside.alive(token, at) ? [token] : [])) : [];
    find(".difference").textContent = both ? comparison.sentence(there, kept)
        : comparison.pinned ? "The pinned result is of other images, so there is nothing to compare." : "";
    find("[name=layer]").disabled = find(".play").disabled = picked !== null;
    find(".where").textContent = `layer ${at} of ${result.record.depth - 1}`;
    const total = current.cells.length, number = preview?.left ? current.kept().length : kept.length;
    find(".count").textContent = picked
        ? `${kept.length} of ${total} tokens picked by hand, not asked yet`
        : preview?.left ? `At ${Math.round(100 * preview.budget)} % the same scores keep ${number} of ${total} tokens to the end; press Ask for the answer.`
        : preview ? `At ${Math.round(100 * preview.budget)} %: ${preview.reason}; press Ask.`
        : `${kept.length} of ${total} tokens enter layer ${at}`;
    find(".again").textContent = `Ask again with these ${picked ? kept.length : current.kept().length} alone`;
    find(".back").hidden = picked === null && !preview;
    find(".unpin").hidden = comparison.pinned === null;
    find(".pin").textContent = comparison.pinned ? "Pin this one instead" : "Pin to compare";
    [...find(".bars").children].forEach((bar, i) => bar.classList.toggle("on", i === at));
}

// Tokens per layer.
function bars() {
    const total = current.cells.length, counts = [...Array(result.record.depth).keys()].map((i) => current.entering(i));
    find(".bars").replaceChildren(...counts.map((count, i) => {
        const bar = document.createElement("i");
        bar.style.setProperty("--share", count / total);
        bar.title = `${count} of ${total} tokens enter layer ${i}`;
        bar.dataset.layer = i;
        return bar;
    }));
}

// What no longer belongs to the settings says so.
function stale() {
    const names = ["image", "other files", "question", "method", "budget"];
    const plain = (value) => JSON.stringify(value, (key, part) => (part?.path ? part.path : part ?? null));
    const changed = !asked || !now ? [] : now.flatMap((value, i) => (plain(value) === plain(asked[i]) ? [] : [names[i] ?? "settings"]));
    const words = [...new Set(changed)].join(" and ");
    const old = result !== null && words !== "";
    const note = document.querySelector("#stale .stale");
    if (note) note.textContent = old ? `Below is the answer before the ${words} changed: press Ask for a new one.` : "";
    for (const id of ["#answers", "#viewer"]) document.querySelector(id)?.classList.toggle("old", old && !(id === "#viewer" && preview?.left));
}

// -- events -------------------------------------------------------------------------------------------------------

function play(on) {
    clearInterval(playing);
    playing = null;
    if (on) {
        const slider = find("[name=layer]");
        if (layer() === Number(slider.max)) slider.value = 0;
        playing = setInterval(() => {
            slider.value = layer() + 1;
            paint();
            if (layer() === Number(slider.max)) play(false);
        }, 500);
        paint();
    }
    find(".play").textContent = on ? "■" : "▶";
    find(".play").setAttribute("aria-label", on ? "Stop" : "Play the layers");
}

async function copyLink() {
    const address = linkOf(result);
    history.replaceState(null, "", address);
    await navigator.clipboard?.writeText(address).catch(() => {});
    find(".taken").textContent = result.link.startsWith("?scene")
        ? "Copied, and in the address bar."
        : "Copied, and in the address bar; whoever opens it has to add the image.";
}

const PRESSED = {
    again: () => trigger("submit", { keep: picked ? [...picked] : current.kept() }),
    back: () => { picked = preview = null; draw(); stale(); },
    pin: () => { comparison.pinned = result; draw(); },
    unpin: () => { comparison.pinned = null; draw(); },
    play: () => play(!playing),
    png: () => savePng(find(".pinned").hidden ? [current] : [beside, current]),
    json: () => saveJson(result),
    link: copyLink,
};

element.addEventListener("click", (event) => {
    if (!result) return;
    const name = Object.keys(PRESSED).find((name) => event.target.closest(`button.${name}`));
    if (name) PRESSED[name]();
    else if (event.target.dataset?.layer) { find("[name=layer]").value = event.target.dataset.layer; paint(); }
    else if (token(event.target) !== null && !stroked) set(token(event.target), !isOn(token(event.target)));
    stroked = false;
});
element.addEventListener("pointerdown", (event) => {
    const first = token(event.target);
    if (first === null || event.button || (event.pointerType === "touch" && !find("[name=brush]").checked)) return;
    event.preventDefault();
    stroke = !isOn(first);
    stroked = true;
    set(first, stroke);
});
element.addEventListener("pointermove", (event) => {
    if (stroke === null) return;
    const over = token(document.elementFromPoint(event.clientX, event.clientY));
    if (over !== null && isOn(over) !== stroke) set(over, stroke);
});
for (const kind of ["pointerup", "pointercancel"]) document.addEventListener(kind, () => { stroke = null; });
const MOVES = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
element.addEventListener("keydown", (event) => {
    const index = token(event.target);
    if (index === null) return;
    if (event.key === " " || event.key === "Enter") set(index, !isOn(index));
    else if (event.key in MOVES) {
        const next = current.rects[neighbour(index, MOVES[event.key])];
        event.target.setAttribute("tabindex", -1);
        next.setAttribute("tabindex", 0);
        next.focus();
    } else return;
    event.preventDefault();
});
for (const kind of ["pointerover", "focusin"])
    element.addEventListener(kind, (event) => {
        if (!current) return;
        const index = token(event.target);
        current.point(index);
        if (index !== null) find(".detail").textContent = current.describe(index);
    });
element.addEventListener("input", (event) => {
    if (!result) return;
    find("svg").closest(".boards").classList.toggle("brushing", find("[name=brush]").checked);
    event.target.name === "picture" ? draw() : paint();
});
document.addEventListener("vtc:settings", ({ detail }) => { now = detail; stale(); });
document.addEventListener("vtc:ask", ({ detail }) => {
    pending = now = detail;
    document.querySelector("#viewer").classList.add("waiting");
    look("#answers");
});
document.addEventListener("vtc:answered", ({ detail }) => {
    now = detail;
    pending = null;
    document.querySelector("#viewer").classList.remove("waiting");
    stale();
    look(document.querySelector("#problem .problem") ? "#problem" : "#answers");
});
document.addEventListener("vtc:preview", ({ detail }) => {
    if (!result || picked) return;
    preview = detail;
    current.fate = preview?.left ? { ...result.record, left: preview.left, into: preview.into } : result.record;
    bars();
    paint();
    stale();
});

// On a small screen what is asked for may lie below or above what is seen. A problem is scrolled to even where it is in
// view: the page may still be on its way to the answers.
function look(selector) {
    const place = document.querySelector(selector), { top } = place.getBoundingClientRect();
    if (selector === "#problem") place.scrollIntoView({ behavior: "smooth", block: "center" });
    else if (top < 0 || top > innerHeight / 2) place.scrollIntoView({ behavior: "smooth", block: "start" });
}

watch("value", show);
show();
