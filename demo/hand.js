// Picking tokens by hand; the state is viewer.js's.
function set(token, on) {
    picked ??= new Set(current.kept());
    on ? picked.add(token) : picked.delete(token);
    preview = null;
    current.fate = result.record;
    paint();
}

const isOn = (token) => (picked ? picked.has(token) : current.fate.left[token] === null);
const token = (target) => {
    const index = target?.closest?.(".current rect")?.dataset.index;
    return index === undefined ? null : Number(index);
};

function restorePicked() {
    const spans = linked ? null : new URLSearchParams(location.search).get("picked");
    linked = true;
    if (!spans || !/^\d+(-\d+)?(,\d+(-\d+)?)*$/.test(spans)) return;
    const total = current.cells.length;
    picked = new Set(spans.split(",").flatMap((span) => {
        const [first, last = first] = span.split("-").map(Number);
        return [...Array(Math.max(0, Math.min(last, total - 1) - first + 1)).keys()].map((i) => first + i);
    }));
    trigger("submit", { keep: [...picked] });
}

function neighbour(index, [right, down]) {
    const centre = (i) => { const [x, y, w, h] = current.cells[i].box; return [x + w / 2, y + h / 2]; };
    const [x, y] = centre(index), [, , w, h] = current.cells[index].box;
    const distance = (i) => Math.hypot(centre(i)[0] - x - right * w, centre(i)[1] - y - down * h);
    const near = current.rects.reduce((best, rect, i) => (rect && distance(i) < distance(best) ? i : best), index);
    return distance(near) < Math.max(w, h) ? near : index;
}
