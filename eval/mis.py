"""Which questions need the image: each is asked in full, blind, and with another question's image.

After the modality importance score (Park et al., arXiv 2408.12763): what a question gains from a modality. A question
needs the image where the full model is right and the blind one wrong; a flat curve over the others is no evidence. The
full model is right on all that need it, by their choice: what a method loses there, it loses.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from vtc.eval import report

if TYPE_CHECKING:
    from PIL.Image import Image
    from rich.console import RenderableType

    from vtc.eval.rows import Group, Line, Row
    from vtc.eval.scenes import Example

SWAPPED = "swapped"
"""The arm of the full model that is shown another question's image."""


class Needing(TypedDict):
    """needs-image.json: the curve on the questions that need the image."""

    questions: int
    """All that have a score of their own."""
    needing: int
    by_task: dict[str, int]
    """How many of those that need the image are of each task."""
    swapped: float | None
    """Accuracy with another question's image over all questions; None where that was not asked."""
    swapped_needing: float | None
    """The same over those that need the image: near chance, or they do not need this image."""
    rows: list[Row]
    """As in summary.json, over those that need the image; none where there is none."""


def others(examples: Sequence[Example], seed: int) -> dict[str, Image]:
    """Another question's image for each question, by its id.

    Drawn among the questions of its task with another answer; where there are none among those with another answer, and
    then among all. Nothing where there is one question only.
    """
    if len(examples) < 2:
        return {}
    by_task: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        by_task[example.task].append(example)
    tasks = {task: (_Others(some, "answer"), _Others(some, "question_id")) for task, some in by_task.items()}
    answers, questions = _Others(examples, "answer"), _Others(examples, "question_id")
    found: dict[str, Image] = {}
    for example in examples:
        akin, same = tasks[example.task]
        draw = Random(f"{seed}/{example.question_id}")
        others = (of.drawn(example, draw) for of in (akin, answers, same, questions))
        found[example.question_id] = next(other.image for other in others if other is not None)
    return found


class _Others:
    """Examples to draw from, but those that have one thing in common with the one that they are drawn for."""

    def __init__(self, examples: Sequence[Example], what: str):
        self.examples, self.what = examples, what
        self.places: dict[str, list[int]] = defaultdict(list)
        for place, example in enumerate(examples):
            self.places[getattr(example, what)].append(place)

    def drawn(self, example: Example, draw: Random) -> Example | None:
        """What `draw.choice` takes of a list of them, without the list; None, and nothing drawn, where none is left."""
        places = self.places[getattr(example, self.what)]
        if len(places) == len(self.examples):
            return None
        place = draw.choice(range(len(self.examples) - len(places)))
        for taken in places:
            place += taken <= place
        return self.examples[place]


def needs_image(full: Line, blind: Line) -> bool:
    """Whether the full model is right and the blind one wrong; of shares of a point, at least half and less."""
    return full["correct"] is not None and full["correct"] >= 0.5 and (blind["correct"] or 0) < 0.5


def needing(groups: Sequence[Group], seed: int) -> Needing:
    """The curve on the questions that need the image; the lines of all groups are over the same questions in one order.

    Accuracy counts, whatever metric a benchmark has of its own.
    """
    arms = {method: lines for method, _, _, lines in groups}
    chosen = [i for i, pair in enumerate(zip(arms["full"], arms["blind"], strict=True)) if needs_image(*pair)]
    few: list[Group] = []
    for method, budget, _, lines in groups:
        mine = [lines[i] for i in chosen]
        few.append((method, budget, not any(line["at_floor"] for line in mine), mine))
    swapped = next((lines for method, _, _, lines in groups if method == SWAPPED), None)
    return {
        "questions": sum(line["correct"] is not None for line in arms["full"]),
        "needing": len(chosen),
        "by_task": dict(sorted(Counter(arms["full"][i]["task"] for i in chosen).items())),
        "swapped": _accuracy(swapped or []),
        "swapped_needing": _accuracy([swapped[i] for i in chosen] if swapped else []),
        "rows": report.summarise([group for group in few if group[0] != SWAPPED], seed) if chosen else [],
    }


def _accuracy(lines: Sequence[Line]) -> float | None:
    return float(np.mean([line["correct"] or 0 for line in lines])) if lines else None


def shown(where: Path) -> list[RenderableType]:
    """What needs-image.json in a folder says, for the terminal: a sentence and a table, or nothing where it is not."""
    if not (file := where / "needs-image.json").exists():
        return []
    found: Needing = json.loads(file.read_text())
    said = f"{found['needing']} of {found['questions']} questions need the image (full model right, blind one wrong)"
    if found["swapped_needing"] is not None:
        said += f"; with another question's image it is right on {100 * found['swapped_needing']:.1f} % of them"
    return [said, *([report.table(found["rows"])] if found["rows"] else [])]
