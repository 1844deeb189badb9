"""Local data in the schema of lmms-eval's own tasks, made from scenes: their prompts and metrics, our images.

`datasets` looks for a folder of a data set's name under the working folder before it asks any hub.
"""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, Image, List

from vtc.eval import scenes

QUESTIONS = 8
"""Of each task."""


def save_all(folder: Path) -> None:
    mixed = [scenes.example("test", 0, i) for i in range(QUESTIONS)]
    exist = [scenes.example("test", 0, scenes.TASKS.index("exist") + 9 * i) for i in range(QUESTIONS)]
    shape = [scenes.example("test", 0, scenes.TASKS.index("shape") + 9 * i) for i in range(QUESTIONS)]
    save(folder, "POPE", "test", default=[pope(number, example) for number, example in enumerate(exist)])
    save(folder, "MME", "test", default=[row for number in range(QUESTIONS // 2) for row in mme(number)])
    save(folder, "ai2d", "test", default=[ai2d(example) for example in shape])
    save(folder, "textvqa", "validation", default=[textvqa(number, example) for number, example in enumerate(mixed)])
    questions = {"ScienceQA-IMG": [scienceqa(number, example) for number, example in enumerate(shape)]}
    save(folder, "ScienceQA", "test", **questions)
    images = [{"id": str(number), "image": example.image} for number, example in enumerate(mixed)]
    asked = [
        {"id": str(number), "imageId": str(number), "question": example.question, "answer": example.answer}
        for number, example in enumerate(mixed)
    ]
    save(folder, "GQA", "testdev", testdev_balanced_instructions=asked, testdev_balanced_images=images)
    save(folder, "SEED-Bench", "test", default=[seed(number, example) for number, example in enumerate(shape)])
    save(folder, "MMBench", "dev", en=[mmbench(number, example) for number, example in enumerate(shape)])
    save(folder, "RefCOCO", "val", default=[refcoco(number) for number in range(QUESTIONS)])


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


def seed(number: int, example: scenes.Example) -> dict:
    """Two kinds of questions, as its metrics count them apart."""
    choices = dict(zip(("choice_a", "choice_b", "choice_c", "choice_d"), options(example), strict=True))
    return {
        **choices,
        "question_id": str(number),
        "question": example.question,
        "answer": "ABCD"[options(example).index(example.answer)],
        "data_type": ("image", "video")[number % 2],
        "image": [example.image],
    }


def mmbench(number: int, example: scenes.Example) -> dict:
    return {
        **dict(zip("ABCD", options(example), strict=True)),
        "index": number,
        "question": example.question,
        "hint": "nan",
        "answer": "ABCD"[options(example).index(example.answer)],
        "category": ("shape", "form")[number % 2],
        "L2-category": "perception",
        "source": "scenes",
        "split": "dev",
        "image": example.image,
    }


def refcoco(number: int) -> dict:
    """Two descriptions of one thing; its box as (left, top, width, height)."""
    scene, _ = scenes.training_scene("test", 0, number)
    left, top, right, bottom = scene.things[0].box
    named = " ".join(scene.things[0].words)
    return {
        "question_id": str(number),
        "answer": [named, f"the {named}"],
        "bbox": [float(left), float(top), float(right - left), float(bottom - top)],
        "image": scene.image,
    }


def options(example: scenes.Example) -> list[str]:
    """Four shapes, the right one among them."""
    wrong = [shape for shape in scenes.SHAPES if shape != example.answer][:3]
    return sorted([example.answer, *wrong])


def textvqa(number: int, example: scenes.Example) -> dict:
    """All ten people agree."""
    return {
        "question_id": number,
        "question": example.question,
        "answers": [example.answer] * 10,
        "ocr_tokens": [""],
        "image": example.image,
    }


def save(folder: Path, name: str, split: str, **configs: list[dict]) -> None:
    """A data set with one split, and the rows of each of its configurations."""
    where = folder / "lmms-lab-encoder" / name
    where.mkdir(parents=True)
    card = ["---", "configs:"]
    for config, rows in configs.items():
        data = Dataset.from_list(rows)
        if "image" in rows[0]:
            data = data.cast_column("image", List(Image()) if isinstance(rows[0]["image"], list) else Image())
        data.to_parquet(where / f"{config}.parquet")
        card += [f"- config_name: {config}", "  data_files:", f"  - split: {split}", f"    path: {config}.parquet"]
    (where / "README.md").write_text("\n".join([*card, "---", ""]))
