"""The page's texts and pictures as HTML: answers with their figures, examples, the measured curve."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from difflib import SequenceMatcher
from html import escape
from pathlib import Path
from typing import Any

from vtc.demo.asking import Answer, Pair

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 44, 14, 14, 40
"""Margins of the curve, in its own units."""


def thumbnails(examples: Sequence[tuple[str, str]]) -> str:
    """A button for each (image URL, question)."""
    buttons = "".join(
        f'<button type="button" data-number="{number}" title="{escape(question)}">'
        f'<img src="{image}" alt="Example: {escape(question)}"></button>'
        for number, (image, question) in enumerate(examples)
    )
    return f'<div class="thumbnails">{buttons}</div>'


def answers(pair: Pair, device: str) -> str:
    """Both answers side by side, words of the compressed one marked that the full one does not have."""
    full, small = pair.full, pair.compressed
    marked = _marked(full.text, small.text) if pair.trace else escape(small.text)
    cards = _card("Full model", escape(full.text), full, full), _card("Compressed", marked, small, full)
    reason = f'<p class="why">{escape(pair.why)} <span>Measured now on {escape(device)}.</span></p>' if pair.why else ""
    return f'<div class="answers">{"".join(cards)}</div>{reason}'


def _card(title: str, text: str, answer: Answer, full: Answer) -> str:
    figures = (
        ("visual tokens", _number(answer.tokens, 1)),
        ("prefill", _number(answer.prefill, 1e3, "ms")),
        ("a token", _number(answer.decode, 1e3, "ms")),
        ("KV cache", _number(answer.kv_bytes, 2**-20, "MiB")),
    )
    rows = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures)
    return (
        f'<section class="answer"><h3>{title}</h3><p class="text" aria-live="polite">{text or "&nbsp;"}</p>'
        f"<dl>{rows}</dl></section>"
    )


def _number(value: float | None, scale: float, unit: str = "") -> str:
    return "–" if value is None else f"{value * scale:.3g} <small>{unit}</small>"


def _marked(before: str, after: str) -> str:
    old, new = before.split(), after.split()
    parts = []
    for kind, _, _, start, end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
        if words := escape(" ".join(new[start:end])):
            parts.append(words if kind == "equal" else f"<mark>{words}</mark>")
    return " ".join(parts)


def curve(path: Path, command: str, method: str, tokens: float | None) -> str:
    """Accuracy against visual tokens as `vtc eval` measured it, `method` in front, a marker at `tokens` per image.

    Where `path` is missing, `command` is what makes it.
    """
    if not path.is_file():
        return f"<p class='hint'>No measured curve for this model yet. Make it with <code>{escape(command)}</code></p>"
    rows = json.loads(path.read_text())
    full = next(row for row in rows if row["method"] == "full")
    lines = {row["method"]: [] for row in rows if row["method"] not in ("full", "blind")}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        if row["method"] in lines:
            lines[row["method"]].append(row)
    least = min(row["tokens"] for points in lines.values() for row in points)
    across = _Axis(math.log2(least / 1.15), math.log2(full["tokens"]), LEFT, WIDTH - RIGHT)
    down = _Axis(0, 1, HEIGHT - BOTTOM, TOP)
    drawn = [_line([*points, full], across, down, name == method) for name, points in lines.items() if name != method]
    if method in lines:
        drawn.append(_line([*lines[method], full], across, down, chosen=True))
    drawn += _references(rows, down)
    if tokens is not None:
        drawn.append(_marker(across(math.log2(min(max(tokens, least), full["tokens"]))), f"{tokens:.3g} tokens"))
    note = f"{escape(method)} in colour, the other methods in grey" if method in lines else "other methods"
    return (
        f'<figure class="curve"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="accuracy against visual '
        f'tokens">{_axes(across, down, least, full["tokens"])}{"".join(drawn)}</svg>'
        f"<figcaption>Accuracy on {full['n']:,} questions of scenes; {note}; band: 95 %.</figcaption></figure>"
    )


class _Axis:
    """Maps values between `low` and `high` to the picture's units."""

    def __init__(self, low: float, high: float, start: float, end: float):
        self.low, self.start = low, start
        self.scale = (end - start) / (high - low)

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) * self.scale, 1)


def _line(points: Sequence[dict[str, Any]], across: _Axis, down: _Axis, chosen: bool) -> str:
    x = [across(math.log2(row["tokens"])) for row in points]

    def path(key: str) -> list[str]:
        return [f"{place},{down(row[key])}" for place, row in zip(x, points, strict=True)]

    line = f'<polyline class="{"chosen" if chosen else "other"}" points="{" ".join(path("accuracy"))}"/>'
    if not chosen:
        return line
    band = " ".join(path("accuracy_high") + path("accuracy_low")[::-1])
    dots = "".join(
        f'<circle cx="{place}" cy="{down(row["accuracy"])}" r="4"><title>{row["tokens"]:.0f} tokens: '
        f"{row['accuracy']:.1%}</title></circle>"
        for place, row in zip(x, points, strict=True)
    )
    return f'<polygon points="{band}"/>{line}{dots}'


def _references(rows: Sequence[dict[str, Any]], down: _Axis) -> list[str]:
    """The lines of the full and of the blind model."""
    labels = {"full": "full model", "blind": "no visual token"}
    return [
        f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{(y := down(row["accuracy"]))}" y2="{y}"/>'
        f'<text x="{LEFT + 6}" y="{y - 5}">{labels[row["method"]]} {row["accuracy"]:.1%}</text>'
        for row in rows
        if row["method"] in labels
    ]


def _marker(x: float, text: str) -> str:
    anchor = "end" if x > WIDTH / 2 else "start"
    beside = x - 6 if x > WIDTH / 2 else x + 6
    return (
        f'<g class="marker"><line x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text x="{beside}" y="{HEIGHT - BOTTOM - 8}" text-anchor="{anchor}">this budget: {text}</text></g>'
    )


def _axes(across: _Axis, down: _Axis, least: float, most: float) -> str:
    ticks = [most / 2**halving for halving in range(math.floor(math.log2(most / least)) + 1)]
    labels = [
        f'<text x="{across(math.log2(tick))}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:.0f}</text>'
        for tick in ticks
    ]
    labels += [
        f'<text x="{LEFT - 6}" y="{down(share) + 4}" text-anchor="end">{share:.0%}</text>'
        f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{down(share)}" y2="{down(share)}"/>'
        for share in (0, 0.5, 1)
    ]
    middle = (LEFT + WIDTH - RIGHT) / 2
    labels.append(f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">visual tokens, layer average</text>')
    return "".join(labels)
