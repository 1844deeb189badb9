"""What `vtc train` does for every method with trained modules: the model is frozen, its training questions teach."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

import vtc
from vtc.eval import benchmarks, progress
from vtc.eval.reader import Reader, load, model_path
from vtc.eval.scenes import Example
from vtc.stage import Shape
from vtc.trained import Trained

M = TypeVar("M", bound=Trained)


@dataclass(frozen=True)
class Recipe:
    """How the modules of a method are trained."""

    model: str = "reference"
    steps: int = 300
    batch_size: int = 32
    learning_rate: float = 1e-2
    seed: int = 0
    benchmarks: tuple[str, ...] = ("scenes",)
    """What teaches, a step each in turn."""


def questions(reader: Reader, recipe: Recipe, step: int) -> tuple[list[Example], dict[str, Tensor]]:
    """The questions of the training split that a step reads, and their prompts."""
    turn, place = divmod(step, len(recipe.benchmarks))
    benchmark, first = benchmarks.find(recipe.benchmarks[place]), turn * recipe.batch_size
    examples = [benchmark.example("train", recipe.seed, first + n) for n in range(recipe.batch_size)]
    return examples, reader.inputs([e.image for e in examples], [e.question for e in examples])


def unseen(recipe: Recipe, questions: int) -> list[Example]:
    """Questions of the validation split, as many of each benchmark."""
    each = questions // len(recipe.benchmarks)
    return [one for name in recipe.benchmarks for one in benchmarks.find(name).load("val", each, recipe.seed)]


def prompts(reader: Reader, recipe: Recipe, examples: Sequence[Example]) -> Iterator[dict[str, Tensor]]:
    """The prompts of these questions, a batch at a time."""
    for first in range(0, len(examples), recipe.batch_size):
        batch = examples[first : first + recipe.batch_size]
        yield reader.inputs([e.image for e in batch], [e.question for e in batch])


def learn(
    untrained: Callable[[Shape, int], M],
    recipe: Recipe,
    out: Path | None,
    folder: str,
    loss: Callable[[Reader, M, int], tuple[Tensor, str]],
    report: Callable[[Reader, M], dict[str, Any]],
    pace: Callable[[float], float] = lambda done: 1.0,
    finish: Callable[[Reader, M], M] = lambda reader, method: method,
) -> M:
    """Train the modules of a method, save them and return the method with them. Beside them lies report.json.

    Goes on from `out`/state.pt when it is there. Raises ValueError where that belongs to another recipe.

    Args:
        untrained: the method with new modules, for a model of this shape and width.
        out: where to save; None: in `folder` beside the checkpoint, where `vtc.wrap` looks.
        loss: of the method, its modules in training, at a step; and what the bar is to say.
        report: what report.json has to tell of the trained method.
        pace: the learning rate's factor when this part of the steps is done.
        finish: what is done to the trained method before it is saved.
    """
    path = model_path(recipe.model)
    out = out or Path(path) / folder
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    reader = load(path, str(accelerator.device))
    reader.model.requires_grad_(False)
    torch.manual_seed(recipe.seed)
    adapter = vtc.adapter.find(reader.model)
    method = untrained(adapter.shape(), adapter.decoder.config.hidden_size)
    assert method.modules is not None
    optimizer = torch.optim.AdamW(method.modules.parameters(), lr=recipe.learning_rate, weight_decay=0.0)
    modules, optimizer = accelerator.prepare(method.modules, optimizer)
    done = _resume(out, recipe, modules, optimizer)
    with progress.bar(method.name, recipe.steps, done) as tick:
        for step in range(done, recipe.steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * pace(step / recipe.steps)
            found, said = loss(reader, replace(method, modules=modules.train()), step)
            optimizer.zero_grad()
            accelerator.backward(found)
            optimizer.step()
            tick(say=f"{method.name}: {said}")
            if (step + 1) % 50 == 0:
                _save(out, recipe, modules, optimizer, step + 1)
    trained = finish(reader, replace(method, modules=accelerator.unwrap_model(modules).eval()))
    trained.save_pretrained(out)
    told = {"recipe": asdict(recipe), **report(reader, trained)}
    (out / "report.json").write_text(json.dumps(told, indent=2) + "\n")
    (out / "state.pt").unlink(missing_ok=True)
    accelerator.end_training()
    return trained


def _save(out: Path, recipe: Recipe, modules: Any, optimizer: Any, step: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    state = {
        "recipe": asdict(recipe),
        "step": step,
        "modules": modules.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(state, out / "state.part")
    (out / "state.part").replace(out / "state.pt")


def _resume(out: Path, recipe: Recipe, modules: Any, optimizer: Any) -> int:
    if not (out / "state.pt").exists():
        return 0
    state = torch.load(out / "state.pt", weights_only=True)
    if state["recipe"] != asdict(recipe):
        raise ValueError(f"{out}/state.pt belongs to another recipe: choose another --out, or delete it")
    modules.load_state_dict(state["modules"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
