"""`vtc train atp`: the trained modules of ATP-LLaVA, for one model and one budget.

The model is frozen; only the thresholds learn, through soft gates, from the next-token loss and a target budget
(ATP-LLaVA, Eq. 12-14):

    loss = next token + lambda_atp * sum_l (tokens_l / all) * (l / depth) + lambda_target * |average / all - budget|

Tokens are counted as vtc counts budgets, averaged over the decoder layers, where the paper's re-implementations average
over the modules; both terms are fractions of the image's tokens, so that the weights mean the same for any resolution.
The gates get steeper while the training runs, so that soft and hard agree in the end. Where they do not, as scores lie
close to their thresholds, the thresholds on redundancy are moved by one constant until the hard drop meets the budget.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vtc
from vtc.core.call import answering
from vtc.eval import lessons, progress
from vtc.eval.reader import Reader
from vtc.methods.atp import Atp
from vtc.trace import Trace

CALIBRATING = 8
"""Batches that thresholds are moved on."""
NEAR = 0.01
"""How far from the budget the hard drop may end, as a fraction of an image's tokens."""
FURTHEST, HALVINGS = 8.0, 10
"""How far the thresholds can be moved, before the sigmoid, and how often the way is halved."""


@dataclass(frozen=True)
class Recipe(lessons.Recipe):
    """How the modules of one budget are trained. `budget` is a fraction of the image's tokens."""

    budget: float = 0.25
    lambda_atp: float = 0.01
    lambda_target: float = 4.0
    sharpest: float = 60.0
    """The slope of the gates in the last step; it rises from the method's own."""


def train(recipe: Recipe, out: Path | None = None) -> Atp:
    """`lessons.learn` the thresholds of one budget."""

    def loss(reader: Reader, method: Atp, step: int) -> tuple[Tensor, str]:
        steeper = (recipe.sharpest / method.sharpness) ** (step / max(1, recipe.steps - 1))
        found, average = _loss(reader, replace(method, sharpness=method.sharpness * steeper), recipe, step)
        return found, f"average {average:.3f} for {recipe.budget:g}"

    def report(reader: Reader, method: Atp) -> dict[str, Any]:
        return {"spread": spread(reader, method, recipe)}

    def finish(reader: Reader, method: Atp) -> Atp:
        return calibrated(reader, method, recipe)

    folder = f"{Atp.name}/{recipe.budget:g}"
    return lessons.learn(Atp().untrained, recipe, out, folder, loss, report, finish=finish)


def calibrated(reader: Reader, method: Atp, recipe: Recipe) -> Atp:
    """With thresholds that leave `recipe.budget` on average, on training questions behind those of the steps.

    The same method where it is met to `NEAR` as it is. A budget that is out of reach is missed as little as it can be.
    """
    prompts = [lessons.questions(reader, recipe, recipe.steps + n)[1] for n in range(CALIBRATING)]

    def above(shift: float) -> float:
        return shares(reader, _moved(method, shift), prompts).mean().item() - recipe.budget

    if abs(above(0.0)) <= NEAR:
        return method
    low, high = -FURTHEST, FURTHEST  # the higher the thresholds, the fewer tokens
    with progress.bar("calibrating", HALVINGS) as tick:
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if above(middle) > 0 else (low, middle)
            tick()
    return _moved(method, (low + high) / 2)


def _moved(method: Atp, shift: float) -> Atp:
    """With `shift` on what the sigmoids of the thresholds on redundancy are given."""
    modules = copy.deepcopy(method.modules)
    assert modules is not None
    with torch.no_grad():
        for module in modules:
            module.redundant.bias += shift
    return replace(method, modules=modules)


@torch.inference_mode()
def shares(reader: Reader, method: Atp, prompts: Iterable[dict[str, Tensor]]) -> Tensor:
    """(questions, layers): what the hard drop leaves before each layer, as a fraction of an image's tokens."""
    found = []
    for inputs in prompts:
        with vtc.compressed(reader.model, method) as trace:
            reader.model(**inputs)
        found.append(trace.tokens_per_layer / torch.tensor(trace.sizes)[:, None])
    return torch.cat(found)


def spread(reader: Reader, method: Atp, recipe: Recipe, questions: int = 256) -> dict[str, Any]:
    """What the hard drop leaves on the validation split, as fractions of an image's tokens.

    `average`: mean, standard deviation, least and most of the layer average over the questions. `layers`: mean and
    standard deviation of what is left after each pruned layer.
    """
    examples = lessons.unseen(recipe, questions)
    left = shares(reader, method, lessons.prompts(reader, recipe, examples))
    average = left.mean(1)
    layers = [stage.site for stage in method.stages(vtc.adapter.find(reader.model).shape())]
    return {
        "average": {name: getattr(average, name)().item() for name in ("mean", "std", "min", "max")},
        "layers": {
            layer: {name: getattr(left[:, layer], name)().item() for name in ("mean", "std")} for layer in layers
        },
        "questions": len(examples),
    }


def _loss(reader: Reader, method: Atp, recipe: Recipe, step: int) -> tuple[Tensor, float]:
    inputs, answered = _batch(reader, recipe, step)
    with vtc.compressed(reader.model, method) as trace:
        token = answering.set(answered)  # the modules see the question alone, as when they are used
        try:
            answer = reader.model(**inputs).loss
        finally:
            answering.reset(token)
        average, late = soft_tokens(trace.record)
    excess = (average - recipe.budget).abs()
    return answer + recipe.lambda_atp * late + recipe.lambda_target * excess, average.item()


def soft_tokens(trace: Trace) -> tuple[Tensor, Tensor]:
    """From the gates of a forward: the tokens averaged over the layers, and summed over the modules weighted by depth.

    Both are fractions of an image's tokens, means over images, with their gradient.
    """
    sizes = torch.tensor(trace.sizes, dtype=torch.float)
    starts = [*(stage.site for stage in trace.stages), trace.depth]
    gates = torch.stack([stage.gate * stage.valid for stage in trace.stages]).cumprod(0)
    shares = gates.sum(2) / sizes.to(gates)
    spans = torch.tensor([end - start for start, end in pairwise(starts)]).to(shares)
    average = (starts[0] + (shares * spans[:, None]).sum(0)) / trace.depth
    late = (shares * torch.tensor(starts[:-1]).to(shares)[:, None] / trace.depth).sum(0)
    return average.mean(), late.mean()


def _batch(reader: Reader, recipe: Recipe, step: int) -> tuple[dict[str, Tensor], int]:
    """Questions of the training split with their answers, of which alone are labels; and the columns of the answers."""
    examples, prompts = lessons.questions(reader, recipe, step)
    tokenizer = reader.processor.tokenizer
    answers = tokenizer(
        [f" {e.answer}{tokenizer.eos_token}" for e in examples],
        return_tensors="pt",
        padding=True,
        padding_side="right",
        add_special_tokens=False,
    ).to(reader.device)
    mask = answers["attention_mask"]
    labels = answers["input_ids"].masked_fill(mask == 0, -100)
    inputs = {
        **prompts,
        "input_ids": torch.cat((prompts["input_ids"], answers["input_ids"]), dim=1),
        "attention_mask": torch.cat((prompts["attention_mask"], mask), dim=1),
        "labels": torch.cat((torch.full_like(prompts["input_ids"], -100), labels), dim=1),
    }
    return inputs, mask.shape[1]
