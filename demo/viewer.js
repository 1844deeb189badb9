// Draws what view.py describes. Runs once when the page loads; `element`, `props`, `trigger` and `watch` are gradio's.
const SVG = "http://www.w3.org/2000/svg";
const GROUPS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"]; // Okabe and Ito
const HEAT = [[0, 32, 77], [124, 123, 120], [255, 234, 70]]; // the ends and the middle of cividis
const find = (selector) => element.querySelector(selector);
let data = null, picked = null, rects = [];

function make(name, attributes, parent) {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    parent.append(node);
    return node;
}

function heat(share) {
    const [from, to] = share < 0.5 ? [HEAT[0], HEAT[1]] : [HEAT[1], HEAT[2]];
    const along = 2 * (share < 0.5 ? share : share - 0.5);
    return `rgb(${from.map((low, i) => Math.round(low + (to[i] - low) * along))})`;
}

const layer = () => Number(find("[name=layer]").value);
const alive = (token) => data.left[token] === null || data.left[token] > layer();
const stageNow = () => data.stages.filter((stage) => stage.layer <= layer()).pop() || data.stages[0];
const kept = () => data.left.flatMap((left, token) => (left === null ? [token] : []));

function describe(token) {
    const left = data.left[token];
    const scored = data.stages.filter((stage) => stage.scores[token] !== null).pop();
    const parts = [`Patch ${token}`];
    if (scored) {
        const entered = scored.ranks.filter((rank) => rank !== null).length;
        const before = scored.layer ? `before layer ${scored.layer}` : "before the decoder";
        parts.push(`score ${scored.scores[token].toPrecision(3)} ${before}, rank ${scored.ranks[token]} of ${entered}`);
    }
    if (left === null) parts.push("read by every layer");
    else parts.push(left ? `left before layer ${left}` : "left before the decoder");
    if (data.into[token] !== null) parts.push(`merged into patch ${data.into[token]}`);
    return parts.join("; ");
}

function draw() {
    const svg = find("svg");
    svg.replaceChildren();
    const [width, height] = data.size;
    const right = Math.max(...data.panels.map(([x, , w]) => x + w));
    svg.setAttribute("viewBox", `0 0 ${right} ${height}`);
    svg.style.setProperty("--line", `${right / 320}px`);
    for (const [x, y, w, h] of data.panels)
        make("image", { href: data.image, x, y, width: w, height: h, preserveAspectRatio: "none" }, svg);
    svg.classList.toggle("small", width <= 256);
    rects = data.patches.map(([x, y, w, h], token) => {
        const inset = Math.min(w, h) * 0.04;
        const box = { x: x + inset, y: y + inset, width: w - 2 * inset, height: h - 2 * inset };
        const rect = make("rect", { ...box, "data-index": token, role: "checkbox", tabindex: token ? -1 : 0 }, svg);
        rect.setAttribute("aria-label", describe(token));
        rect.style.setProperty("--gap", `${2 * inset}px`);
        make("title", {}, rect).textContent = describe(token);
        return rect;
    });
}

function paint() {
    const leaders = [...new Set(data.into.filter((target) => target !== null))].sort((a, b) => a - b);
    const heated = find("[name=heat]").checked, ranks = stageNow()?.ranks;
    const entered = ranks ? ranks.filter((rank) => rank !== null).length : 0;
    rects.forEach((rect, token) => {
        const on = picked ? picked.has(token) : alive(token);
        const group = leaders.indexOf(data.into[token] ?? token);
        const merged = group >= 0 && !picked && (data.into[token] !== null || leaders.includes(token));
        rect.classList.toggle("kept", on);
        rect.classList.toggle("merged", merged);
        rect.classList.toggle("changed", picked !== null && on !== (data.left[token] === null));
        rect.setAttribute("aria-checked", on);
        rect.style.setProperty("--group", merged ? GROUPS[group % GROUPS.length] : "");
        const known = heated && ranks && ranks[token] !== null;
        rect.classList.toggle("heated", Boolean(known));
        rect.style.setProperty("--heat", known ? heat(1 - (ranks[token] - 1) / Math.max(1, entered - 1)) : "");
    });
    const now = rects.filter((rect) => rect.classList.contains("kept")).length;
    find("[name=layer]").disabled = picked !== null;
    find(".where").textContent = `${layer()} of ${data.depth - 1}`;
    find(".count").textContent = picked
        ? `${now} of ${rects.length} tokens picked by hand`
        : `${now} of ${rects.length} tokens enter layer ${layer()}`;
    find(".again").textContent = `Ask again with these ${picked ? now : kept().length} alone`;
    find(".back").hidden = picked === null;
}

function toggle(token) {
    picked ??= new Set(kept());
    picked.has(token) ? picked.delete(token) : picked.add(token);
    paint();
}

function neighbour(token, [right, down]) {
    const centre = (i) => [data.patches[i][0] + data.patches[i][2] / 2, data.patches[i][1] + data.patches[i][3] / 2];
    const [x, y] = centre(token), [, , w, h] = data.patches[token];
    const goal = [x + right * w, y + down * h];
    const distance = (i) => Math.hypot(centre(i)[0] - goal[0], centre(i)[1] - goal[1]);
    const nearest = rects.reduce((best, _, i) => (distance(i) < distance(best) ? i : best), token);
    return distance(nearest) < Math.max(w, h) ? nearest : token;
}

function show() {
    data = props.value;
    picked = null;
    find(".viewer").classList.toggle("empty", !data);
    if (!data) return;
    const slider = find("[name=layer]");
    slider.max = data.depth - 1;
    slider.value = data.depth - 1;
    draw();
    paint();
    find(".detail").textContent = "Point at a patch to read its score; click or press space to keep or drop it.";
}

const token = (event) => event.target.closest("rect")?.dataset.index;
const MOVES = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };

element.addEventListener("click", (event) => {
    if (token(event) !== undefined) toggle(Number(token(event)));
    else if (event.target.matches(".back")) show();
    else if (event.target.matches(".again") && data) trigger("submit", { keep: picked ? [...picked] : kept() });
});
element.addEventListener("keydown", (event) => {
    if (token(event) === undefined) return;
    const index = Number(token(event));
    if (event.key === " " || event.key === "Enter") toggle(index);
    else if (event.key in MOVES) {
        const next = rects[neighbour(index, MOVES[event.key])];
        rects[index].setAttribute("tabindex", -1);
        next.setAttribute("tabindex", 0);
        next.focus();
    } else return;
    event.preventDefault();
});
for (const kind of ["pointerover", "focusin"])
    element.addEventListener(kind, (event) => {
        if (token(event) !== undefined) find(".detail").textContent = describe(Number(token(event)));
    });
element.addEventListener("input", () => data && paint());
watch("value", show);
show();
