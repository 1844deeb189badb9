// Take it along: the drawing as PNG, the result as JSON, the state as a link.
const WIDE = 1200; // pixels of the PNG

function save(blob, name) {
    const anchor = document.createElement("a");
    anchor.href = URL.createObjectURL(blob);
    anchor.download = name;
    anchor.click();
    setTimeout(() => URL.revokeObjectURL(anchor.href), 1000);
}

const fileName = (record, ending) => `vtc-${setting(record).replace(/[^\w.]+/g, "-").replace(/-$/, "")}.${ending}`;

function saveJson(result) {
    save(new Blob([JSON.stringify(result.record, null, 2)], { type: "application/json" }), fileName(result.record, "json"));
}

// What the boards show, with a caption over each, on the page's own background.
async function savePng(boards) {
    const paper = getComputedStyle(document.querySelector("#viewer .viewer")), line = 26, gap = 16;
    const each = (WIDE - gap * (boards.length + 1)) / boards.length;
    const heights = boards.map((board) => {
        const [, , w, h] = board.root.querySelector("svg").getAttribute("viewBox").split(" ").map(Number);
        return (each * h) / w;
    });
    const canvas = document.createElement("canvas");
    canvas.width = WIDE;
    canvas.height = Math.max(...heights) + 2 * line + 2 * gap;
    const pen = canvas.getContext("2d");
    pen.fillStyle = paper.backgroundColor;
    pen.fillRect(0, 0, canvas.width, canvas.height);
    for (const [number, board] of boards.entries()) {
        const left = gap + number * (each + gap);
        pen.font = "16px sans-serif";
        pen.fillStyle = paper.color;
        pen.fillText(`${setting(board.record)}: ${board.record.kept.length} of ${board.record.tokens} tokens`, left, gap + 14, each);
        pen.fillText(`${board.record.question} → ${board.record.answers.compressed.text || "(no answer)"}`, left, gap + 14 + line, each);
        await copy(board.root.querySelector("svg"), pen, left, gap + 2 * line, each);
    }
    canvas.toBlob((blob) => save(blob, fileName(boards.at(-1).record, "png")));
}

async function copy(svg, pen, left, top, width) {
    const scale = width / Number(svg.getAttribute("viewBox").split(" ")[2]);
    pen.save();
    pen.translate(left, top);
    pen.scale(scale, scale);
    pen.imageSmoothingEnabled = !svg.classList.contains("small");
    for (const node of svg.children) {
        const at = (name) => Number(node.getAttribute(name)), style = getComputedStyle(node);
        if (node.tagName === "image") {
            const image = new Image();
            image.src = node.getAttribute("href");
            await image.decode();
            pen.drawImage(image, at("x"), at("y"), at("width"), at("height"));
            continue;
        }
        const path = new Path2D();
        if (node.tagName === "rect") path.rect(at("x"), at("y"), at("width"), at("height"));
        else if (node.tagName === "circle") path.arc(at("cx"), at("cy"), at("r"), 0, 2 * Math.PI);
        else { path.moveTo(at("x1"), at("y1")); path.lineTo(at("x2"), at("y2")); }
        pen.globalAlpha = Number(style.opacity) * Number(style.fillOpacity);
        pen.fillStyle = style.fill;
        if (style.fill !== "none") pen.fill(path);
        pen.globalAlpha = Number(style.opacity);
        pen.strokeStyle = style.stroke;
        pen.lineWidth = parseFloat(style.strokeWidth);
        pen.setLineDash(style.strokeDasharray === "none" ? [] : style.strokeDasharray.split(",").map(parseFloat));
        if (style.stroke !== "none") pen.stroke(path);
    }
    pen.restore();
}

function linkOf(result) {
    return location.origin + location.pathname + result.link;
}
