"""scenes and pages as tasks of lmms-eval: what `vtc_scenes.yaml` and `vtc_pages.yaml` refer to.

A data file holds no images: it says which benchmark, split, seed and how many questions, and a document is drawn when
it is asked for.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from vtc.eval import benchmarks, marking

if TYPE_CHECKING:
    from datasets import Dataset

    from vtc.eval.scenes import Example, Split

PATH = Path(__file__).parent
"""The folder to give lmms-eval as --include_path."""


@lru_cache(maxsize=4096)
def _example(benchmark: str, split: Split, seed: int, index: int) -> Example:
    return benchmarks.find(benchmark).example(split, seed, index)


def documents(dataset: Dataset) -> Dataset:
    """One document a question, {"benchmark", "split", "seed", "index"}, for each line of the data file."""
    from datasets import Dataset

    source = ("benchmark", "split", "seed")
    return Dataset.from_list(
        [{name: row[name] for name in source} | {"index": i} for row in dataset for i in range(row["questions"])]
    )


def example(doc: dict[str, Any]) -> Example:
    return _example(doc["benchmark"], doc["split"], doc["seed"], doc["index"])


def images(doc: dict[str, Any]) -> list[Image.Image]:
    return [example(doc).image]


def question(doc: dict[str, Any]) -> str:
    return example(doc).question


def answer(doc: dict[str, Any]) -> str:
    return example(doc).answer


def score(doc: dict[str, Any], replies: list[str]) -> dict[str, float]:
    """The accuracy over all questions, and that of the question's own kind."""
    correct = float(marking.is_correct(replies[0], answer(doc)))
    return {"accuracy": correct, f"accuracy_{example(doc).task}": correct}
