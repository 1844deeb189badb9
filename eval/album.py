"""A user's images and questions: read from a folder, and asked of one model, in full or by a candidate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

import vtc
from vtc.eval import marking, progress, report
from vtc.eval.images import list_images, open_image
from vtc.eval.reader import Reader
from vtc.eval.rows import Asked
from vtc.eval.store import Store, key

QUESTIONS = (
    "what is the main thing in the picture? answer with one word.",
    "what color is the largest thing? answer with one word.",
    "how many things are there? answer with a number.",
    "is there any text in the picture? answer yes or no.",
)
"""Asked in turn where the user has none."""
MAX_BYTES = 2**24
"""Of a file of questions."""


@dataclass(frozen=True)
class Candidate:
    method: str
    budget: vtc.Budget


FULL = Candidate("full", 1.0)


def find_images(where: Path, bar: bool = False) -> tuple[list[Path], list[str]]:
    """The images of a folder by name, each content once, and the digests of these.

    Each is opened, so that a broken one is known before any work is done. Raises ValueError for a folder without
    images, and for files that cannot be read, all by name.
    """
    files = list_images(where)
    found: dict[str, Path] = {}
    broken: list[str] = []
    with progress.bar("reading images", len(files), shown=bar) as tick:
        for file in files:
            try:
                open_image(file)
                found.setdefault(hashlib.sha256(file.read_bytes()).hexdigest(), file)
            except ValueError as error:
                broken.append(str(error))
            tick()
    if broken:
        more = f"; and {len(broken) - 5} more" if len(broken) > 5 else ""
        raise ValueError(f"{'; '.join(broken[:5])}{more}: take them out of the folder")
    return list(found.values()), list(found)


def find_questions(file: Path | None, images: Sequence[Path]) -> list[tuple[str, ...]]:
    """The questions about each image.

    A text file has a question a line, and images are asked them in turn. In a .jsonl file each line is an object such
    as {"image": "a.jpg", "question": "what is this?"}; images without one are asked nothing. Raises ValueError for what
    cannot be read, with the line.
    """
    if file is None:
        return [(QUESTIONS[n % len(QUESTIONS)],) for n in range(len(images))]
    if not file.is_file():
        raise ValueError(f"no such file of questions: {file}")
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file} has more than {MAX_BYTES // 2**20} MB")
    try:
        lines = [(number, text.strip()) for number, text in enumerate(file.read_text("utf-8-sig").split("\n"), 1)]
    except UnicodeDecodeError:
        raise ValueError(f"{file} is no text in UTF-8") from None
    if not (lines := [(number, text) for number, text in lines if text]):
        raise ValueError(f"{file} holds no question")
    if file.suffix.lower() != ".jsonl":
        if lines[0][1].startswith(("{", "[")):
            raise ValueError(f"{file} looks like JSON and is read as text, a question a line: name it .jsonl")
        return [(lines[n % len(lines)][1],) for n in range(len(images))]
    asked: dict[str, list[str]] = {}
    for number, text in lines:
        try:
            found = json.loads(text)
            name, question = found["image"], found["question"]
            if not (isinstance(name, str) and isinstance(question, str) and question.strip()):
                raise TypeError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ValueError(f'{file}, line {number}: not {{"image": "a.jpg", "question": "what is this?"}}') from None
        asked.setdefault(name, []).append(question)
    if unknown := [name for name in asked if name not in {image.name for image in images}]:
        raise ValueError(f"{file}: no image {unknown[0]!r} in the folder, or it is a copy of another one")
    return [tuple(asked.get(image.name, ())) for image in images]


class Answered(Asked):
    """A line of results.jsonl: what was said to one question about one image."""

    prediction: str
    tokens: float
    """Visual tokens of the image, averaged over the decoder layers, measured."""


@dataclass
class Album:
    """A user's images, asked by one model, in full or by a candidate. Called, it says of which images a
    candidate gives the full model's answers: (images,) bool."""

    reader: Reader
    images: Sequence[Path]
    questions: Sequence[tuple[str, ...]]
    store: Store[Answered]
    methods: Mapping[str, vtc.Method]
    """By name, as they were when the run began: their files may be written anew while it goes on."""
    batch_size: int = 8
    tick: progress.Tick = field(default=lambda steps=1, say=None: None)

    def __call__(self, candidate: Candidate, indices: Sequence[int]) -> np.ndarray:
        full, pruned = self._answers(FULL, indices), self._answers(candidate, indices)
        same = [all(map(marking.is_correct, *pair)) for pair in zip(pruned, full, strict=True)]
        self.tick(len(indices), f"{candidate.method}, {report.written(candidate.budget)}")
        return np.array(same, bool)

    def tokens(self, candidate: Candidate) -> float:
        """Measured, over what it was asked."""
        asked = [line for line in self.store.lines.values() if _of(line) == candidate]
        return float(np.mean([line["tokens"] for line in asked]))

    def _answers(self, candidate: Candidate, indices: Sequence[int]) -> list[list[str]]:
        """Of each image, to each of its questions; what is not known yet is asked, a batch at a time."""
        pairs = [(i, number) for i in indices for number in range(len(self.questions[i]))]
        new = [pair for pair in pairs if self._key(candidate, *pair) not in self.store.lines]
        for start in range(0, len(new), self.batch_size):
            self._ask(candidate, new[start : start + self.batch_size])
        said = {pair: self.store.lines[self._key(candidate, *pair)]["prediction"] for pair in pairs}
        return [[said[i, number] for number in range(len(self.questions[i]))] for i in indices]

    def _ask(self, candidate: Candidate, pairs: Sequence[tuple[int, int]]) -> None:
        opened = [open_image(self.images[i]) for i, _ in pairs]
        inputs = self.reader.inputs(opened, [self.questions[i][number] for i, number in pairs])
        if candidate == FULL:
            said, tokens = self.reader.answers(inputs), self.reader.visual_tokens(inputs).float().tolist()
        else:
            with vtc.compressed(self.reader.model, self.methods[candidate.method], candidate.budget) as trace:
                said = self.reader.answers(inputs)
            tokens = trace.average_tokens.tolist()
        self.store.add(
            [
                {**asdict(candidate), "question_id": self._id(*pair), "prediction": text, "tokens": count}
                for pair, text, count in zip(pairs, said, tokens, strict=True)
            ]
        )

    def _id(self, image: int, number: int) -> str:
        return f"{self.images[image].name}#{number}"

    def _key(self, candidate: Candidate, image: int, number: int) -> str:
        return key(candidate.method, candidate.budget, self._id(image, number))


def _of(line: Asked) -> Candidate:
    return Candidate(line["method"], line["budget"])
