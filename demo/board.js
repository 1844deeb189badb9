// One drawing of visual tokens over a picture. A result is what inspector.py sends: pictures, record, link.
const SVG = "http://www.w3.org/2000/svg";
const GROUPS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"]; // Okabe and Ito
const HEAT = [[0, 32, 77], [124, 123, 120], [255, 234, 70]]; // the ends and the middle of cividis

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

// The rectangle of each token, in the order of the prompt. A newline's shows nothing of the image: a strip beside it.
function cells(pictures) {
    const found = [];
    pictures.forEach((picture, number) => picture.grids.forEach((grid, index) => {
        const [left, top, width, height] = grid.box;
        const across = grid.newlines ? grid.columns - 1 : grid.columns;
        const w = width / Math.max(1, across), h = height / grid.rows;
        for (let row = 0; row < grid.rows; row++)
            for (let column = 0; column < grid.columns; column++) {
                const newline = grid.newlines && column === across;
                const box = newline
                    ? [left + 1.01 * width, top + row * h, 0.03 * width, h]
                    : [left + column * w, top + row * h, w, h];
                found.push({ picture: number, grid: `${number}/${index}`, row, column, box, newline });
            }
    }));
    return found;
}

function ranks(scores) {
    const order = scores.flatMap((score, token) => (score === null ? [] : [token]));
    order.sort((a, b) => scores[b] - scores[a] || a - b);
    const rank = scores.map(() => null);
    order.forEach((token, place) => { rank[token] = place + 1; });
    return rank;
}

// A colour for each group, by its leader: none that a neighbouring group has, as long as there are enough.
function colours(into, places) {
    const leader = (token) => into[token] ?? token;
    const at = new Map(places.map((cell, token) => [`${cell.grid}/${cell.row}/${cell.column}`, token]));
    const members = new Map();
    into.forEach((target, token) => {
        if (target !== null) members.set(target, [...(members.get(target) ?? [target]), token]);
    });
    const found = new Map();
    for (const [lead, tokens] of members) {
        const taken = new Set();
        for (const { grid, row, column } of tokens.map((token) => places[token]))
            for (let y = row - 1; y <= row + 1; y++)
                for (let x = column - 1; x <= column + 1; x++)
                    taken.add(found.get(leader(at.get(`${grid}/${y}/${x}`) ?? lead)));
        const free = GROUPS.filter((colour) => !taken.has(colour));
        found.set(lead, free.length ? free[found.size % free.length] : GROUPS[found.size % GROUPS.length]);
    }
    return { found, members };
}

class Board {
    constructor(root) { this.root = root; }

    show(result, picture) {
        this.result = result;
        this.record = result.record;
        this.cells = cells(result.pictures);
        this.ranks = this.record.stages.map((stage) => ranks(stage.scores));
        this.fate = this.record;
        this.draw(picture);
    }

    // Layers before which a token is there; after them it has left.
    alive(token, layer) { return this.fate.left[token] === null || this.fate.left[token] > layer; }
    kept() { return this.fate.left.flatMap((left, token) => (left === null ? [token] : [])); }
    entering(layer) { return this.cells.filter((_, token) => this.alive(token, layer)).length; }

    describe(token) {
        const left = this.fate.left[token], cell = this.cells[token], parts = [];
        parts.push(cell.newline ? `Newline of row ${cell.row + 1}` : `Patch ${token}`);
        const stage = this.ranks.findLastIndex((rank) => rank[token] !== null);
        if (stage >= 0) {
            const { layer, scores } = this.record.stages[stage], rank = this.ranks[stage];
            const entered = rank.filter((place) => place !== null).length;
            const before = layer ? `before layer ${layer}` : "before the decoder";
            parts.push(`score ${scores[token].toPrecision(3)} ${before}, rank ${rank[token]} of ${entered}`);
        }
        const target = this.fate.into[token], group = this.groups?.members.get(token);
        if (left === null) parts.push("read by every layer");
        else if (target !== null) parts.push(`merged into patch ${target} ${left ? `before layer ${left}` : "before the decoder"}`);
        else parts.push(left ? `left before layer ${left}` : "left before the decoder");
        if (group) parts.push(`stands for ${group.length} patches`);
        return parts.join("; ");
    }

    draw(number) {
        const svg = this.root.querySelector("svg"), picture = this.result.pictures[number];
        svg.replaceChildren();
        const [width, height] = picture.size, strip = picture.grids.some((grid) => grid.newlines) ? 0.05 * width : 0;
        const right = Math.max(...picture.panels.map(([x, , w]) => x + w)) + strip;
        svg.setAttribute("viewBox", `0 0 ${right} ${height}`);
        svg.style.setProperty("--line", `${right / 320}px`);
        svg.classList.toggle("small", width <= 256);
        for (const [x, y, w, h] of picture.panels)
            make("image", { href: picture.image, x, y, width: w, height: h, preserveAspectRatio: "none" }, svg);
        this.rects = this.cells.map((cell, token) => {
            if (cell.picture !== number) return null;
            const [x, y, w, h] = cell.box, inset = Math.min(w, h) * 0.04;
            const box = { x: x + inset, y: y + inset, width: w - 2 * inset, height: h - 2 * inset };
            const rect = make("rect", { ...box, "data-index": token, role: "checkbox", tabindex: -1 }, svg);
            rect.classList.toggle("newline", cell.newline);
            rect.style.setProperty("--gap", `${2 * inset}px`);
            return rect;
        });
        for (const { box: [left, top, w, h], seams: [xs, ys] } of picture.grids) {
            for (const x of xs) make("line", { class: "seam", x1: x, x2: x, y1: top, y2: top + h }, svg);
            for (const y of ys) make("line", { class: "seam", x1: left, x2: left + w, y1: y, y2: y }, svg);
        }
        this.rects.find(Boolean)?.setAttribute("tabindex", 0);
    }

    // `picked`: a set in the place of the method's choice; `other`: whether the board beside this one has a token.
    paint({ layer, heated, picked = null, other = null }) {
        const past = this.record.stages.flatMap((stage, i) => (stage.layer <= layer ? [i] : [])).pop() ?? 0;
        const rank = this.ranks[past], entered = rank ? rank.filter((place) => place !== null).length : 0;
        const merged = this.fate.into.map((target, token) => (picked || this.alive(token, layer) ? null : target));
        this.groups = colours(merged, this.cells);
        const svg = this.root.querySelector("svg");
        svg.querySelectorAll(".leader").forEach((mark) => mark.remove());
        this.rects.forEach((rect, token) => {
            if (!rect) return;
            const on = picked ? picked.has(token) : this.alive(token, layer);
            const colour = this.groups.found.get(merged[token] ?? token), leads = this.groups.members.has(token);
            const place = heated && rank ? rank[token] : null;
            rect.classList.toggle("kept", on);
            rect.classList.toggle("merged", Boolean(colour));
            rect.classList.toggle("changed", picked !== null && on !== (this.record.left[token] === null));
            rect.classList.toggle("only", other !== null && on && !other(token));
            rect.classList.toggle("heated", place !== null);
            rect.setAttribute("aria-checked", on);
            rect.setAttribute("aria-label", this.describe(token));
            rect.style.setProperty("--group", colour ?? "");
            rect.style.setProperty("--heat", place === null ? "" : heat(1 - (place - 1) / Math.max(1, entered - 1)));
            if (leads) {
                const [x, y, w, h] = this.cells[token].box;
                const r = Math.min(w, h) / 6;
                make("circle", { class: "leader", cx: x + w / 2, cy: y + h / 2, r, fill: colour }, svg);
            }
        });
        return entered;
    }

    // The group of a token stands out while it is pointed at.
    point(token) {
        const svg = this.root.querySelector("svg"), lead = token === null ? null : this.fate.into[token] ?? token;
        const group = lead === null ? null : this.groups.members.get(lead);
        svg.classList.toggle("grouped", Boolean(group));
        this.rects.forEach((rect, i) => rect?.classList.toggle("mate", Boolean(group?.includes(i))));
    }
}
