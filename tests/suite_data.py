"""Local data in the schema of lmms-eval's own tasks, made from scenes: their prompts and metrics, our images.

`datasets` looks for a folder of a data set's name under the working folder before it asks any hub.
"""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, Image

from vtc.eval import scenes

QUESTIONS = 8
"""Of each task."""


def save_all(folder: Path) -> None:
    exist = [scenes.example("test", 0, scenes.TASKS.index("exist") + 9 * i) for i in range(QUESTIONS)]
    shape = [scenes.example("test", 0, scenes.TASKS.index("shape") + 9 * i) for i in range(QUESTIONS)]
    _save(folder, "POPE", [pope(number, example) for number, example in enumerate(exist)])
    _save(folder, "MME", [row for number in range(QUESTIONS // 2) for row in mme(number)])
    _save(folder, "ai2d", [ai2d(example) for example in shape])
    _save(folder, "ScienceQA", [scienceqa(number, example) for number, example in enumerate(shape)], "ScienceQA-IMG")


def pope(number: int, example: scenes.Example) -> dict:
    return {
        "question_id": str(number),
        "question": example.question,
        "answer": example.answer,
        "image": example.image,
        "category": "random",
    }


def mme(number: int) -> list[dict]:
    """Two questions about one image, the answers yes and no, as MME counts them."""
    scene, _ = scenes.training_scene("test", 0, number)
    there = {(shape.color, shape.noun) for shape in scene.shapes}
    missing = min({(color, shape) for color in scenes.COLORS for shape in scenes.SHAPES} - there)
    shared = {"question_id": f"{number}.png", "category": "existence", "image": scene.image}
    asked = {"Yes": min(there), "No": missing}
    return [{**shared, "question": f"is there a {' '.join(words)}?", "answer": a} for a, words in asked.items()]


def ai2d(example: scenes.Example) -> dict:
    return {
        "question": example.question,
        "options": list(scenes.SHAPES),
        "answer": str(scenes.SHAPES.index(example.answer)),
        "image": example.image,
    }


def scienceqa(number: int, example: scenes.Example) -> dict:
    """Every other question comes without its image."""
    return {
        "question": example.question,
        "choices": list(scenes.SHAPES),
        "answer": scenes.SHAPES.index(example.answer),
        "hint": "",
        "image": None if number % 2 else example.image,
    }


def _save(folder: Path, name: str, rows: list[dict], config: str = "default") -> None:
    where = folder / "lmms-lab-encoder" / name
    where.mkdir(parents=True)
    Dataset.from_list(rows).cast_column("image", Image()).to_parquet(where / "test.parquet")
    (where / "README.md").write_text(
        f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: test\n    path: test.parquet\n---\n"
    )
