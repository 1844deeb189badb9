"""The measured curve as SVG: accuracy against visual tokens, with a marker at a budget."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 400, 190
LEFT, RIGHT, TOP, BOTTOM = 40, 14, 26, 34
"""Margins, in the picture's own units."""


def curve(path: Path, command: str, method: str, share: float | None, label: str = "this budget") -> str:
    """Accuracy as `vtc eval` measured it, `method` in front, a marker with `label` at `share` of the tokens.

    Where `path` is missing, `command` is what makes it.
    """
    if not path.is_file():
        return f"<p class='hint'>No measured curve for this model yet. Make it with <code>{escape(command)}</code></p>"
    rows = json.loads(path.read_text())
    full = next(row for row in rows if row["method"] == "full")
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["tokens"]):
        if row["method"] not in ("full", "blind"):
            lines.setdefault(row["method"], []).append(row)
    plot = _Plot(full["tokens"], marker=share)
    behind = [plot.line(name, [*points, full], False) for name, points in lines.items() if name != method]
    chosen = plot.line(method, [*lines[method], full], True) if method in lines else ""
    who = f"{escape(method)} in colour, the others in grey" if method in lines else "other methods"
    return (
        f'<figure class="curve"><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="accuracy against visual '
        f'tokens">{plot.axes()}{plot.references(rows)}{"".join(behind)}{chosen}{plot.mark(label)}</svg>'
        f"<figcaption>Measured accuracy on {full['n']:,} questions of scenes: {who} (point at a line for its name); "
        "band: 95 %.</figcaption></figure>"
    )


class _Plot:
    """Places and pieces of the picture; labels go to the half where the marker is not, so that it crosses none."""

    def __init__(self, most: float, marker: float | None):
        self.most, self.marker = most, marker
        middle = marker is None or marker >= 0.5
        self.free, self.anchor = (LEFT + 6, "start") if middle else (WIDTH - RIGHT - 4, "end")

    def x(self, tokens: float) -> float:
        return round(LEFT + tokens / self.most * (WIDTH - LEFT - RIGHT), 1)

    def y(self, accuracy: float) -> float:
        return round(HEIGHT - BOTTOM - accuracy * (HEIGHT - BOTTOM - TOP), 1)

    def axes(self) -> str:
        floor = HEIGHT - BOTTOM
        across = "".join(
            f'<text x="{self.x(tokens)}" y="{floor + 14}" text-anchor="middle">{tokens:.0f}</text>'
            for tokens in (share * self.most for share in (0, 0.25, 0.5, 0.75, 1))
        )
        down = "".join(
            f'<text x="{LEFT - 6}" y="{self.y(share) + 4}" text-anchor="end">{share:.0%}</text>'
            f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.y(share)}" y2="{self.y(share)}"/>'
            for share in (0, 0.5, 1)
        )
        middle = (LEFT + WIDTH - RIGHT) / 2
        title = f'<text x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">visual tokens, layer average</text>'
        return across + down + title

    def line(self, name: str, points: Sequence[dict[str, Any]], chosen: bool) -> str:
        """A method's line, which shows its name when it is pointed at."""

        def path(key: str) -> list[str]:
            return [f"{self.x(row['tokens'])},{self.y(row[key])}" for row in points]

        drawn = f'<polyline points="{" ".join(path("accuracy"))}"/>'
        if chosen:
            band = " ".join(path("accuracy_high") + path("accuracy_low")[::-1])
            dots = "".join(
                f'<circle cx="{self.x(row["tokens"])}" cy="{self.y(row["accuracy"])}" r="3.5"><title>'
                f"{row['tokens']:.0f} tokens: {row['accuracy']:.1%}</title></circle>"
                for row in points
            )
            drawn = f'<polygon points="{band}"/>{drawn}{dots}'
        return (
            f'<g class="{"chosen" if chosen else "other"}" data-method="{escape(name)}" tabindex="0">{drawn}'
            f'<polyline class="near" points="{" ".join(path("accuracy"))}"/><text class="name" x="{self.free}" '
            f'y="{HEIGHT - BOTTOM - 8}" text-anchor="{self.anchor}">{escape(name)}</text></g>'
        )

    def references(self, rows: Sequence[dict[str, Any]]) -> str:
        """The lines of the full and of the blind model."""
        labels = {"full": "full model", "blind": "no visual token"}
        return "".join(
            f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{(y := self.y(row["accuracy"]))}" y2="{y}"/>'
            f'<text x="{self.free}" y="{y - 4}" text-anchor="{self.anchor}">{labels[row["method"]]} '
            f"{row['accuracy']:.1%}</text>"
            for row in rows
            if row["method"] in labels
        )

    def mark(self, label: str) -> str:
        """Where the budget sits; its label stands above the plot."""
        if self.marker is None:
            return ""
        x, right = self.x(self.marker * self.most), self.marker >= 0.5
        return (
            f'<g class="marker"><line x1="{x}" x2="{x}" y1="{TOP - 8}" y2="{HEIGHT - BOTTOM}"/>'
            f'<text x="{x + (4 if right else -4)}" y="{TOP - 12}" text-anchor="{"end" if right else "start"}">'
            f"{label}: {self.marker * self.most:.3g} tokens</text></g>"
        )
