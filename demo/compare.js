// Two results side by side: the pinned one and the current one, and what only one of them keeps.
const comparison = {
    pinned: null,

    // Side by side means the same tokens: the same pictures, cut the same way.
    fits(result) {
        const images = (given) => JSON.stringify(given.pictures.map(({ image, grids }) => [image, grids]));
        return this.pinned !== null && result !== null && images(this.pinned) === images(result);
    },

    sentence(pinned, current) {
        const first = new Set(pinned), both = current.filter((token) => first.has(token)).length;
        const [there, here] = [pinned.length - both, current.length - both];
        return `Both keep ${both} tokens; ${there} only the pinned one, ${here} only the current one (pink).`;
    },
};

function setting({ method, budget, kept }) {
    if (method === "picked by hand") return `${kept.length} tokens picked by hand`;
    return `${method} at ${Number.isInteger(budget) && budget > 1 ? `${budget} tokens` : `${Math.round(100 * budget)} %`}`;
}

function caption(record) {
    const said = record.answers.compressed.text || "(no answer)";
    return `${setting(record)} · ${record.question} → ${said}`;
}
