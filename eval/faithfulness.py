"""Does a method's score map say what the answer hangs on? Score maps against occlusion on one model.

Ground truth is occlusion: hide one visual token from the unwrapped model (its positions untouched) and see how much
log-probability its own answer loses. A map is good when it ranks tokens as the losses do (Spearman), when the answer
dies soon as the best tokens are deleted first, and when it comes soon as they are inserted first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

import torch
from rich.table import Table
from scipy.stats import spearmanr
from torch import Tensor

import vtc
from vtc.eval import progress
from vtc.eval.reader import Reader
from vtc.eval.run import check_methods

if TYPE_CHECKING:
    from vtc.eval.scenes import Example

STEPS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Shares of the tokens that are deleted or inserted."""


class Row(TypedDict):
    """A method's means over `n` questions.

    Deletion (lower is better) and insertion (higher is better) are areas under the answer's probability over the share
    of tokens.
    """

    method: str
    spearman: float
    deletion: float
    insertion: float
    n: int


def faithfulness(
    reader: Reader, examples: Sequence[Example], methods: Sequence[str | vtc.Method], bar: bool = False
) -> list[Row]:
    """One row a method, means over the examples; with `bar` stderr shows how far it is.

    Raises ValueError for unknown methods and for one that has no score map.
    """
    check_methods([method for method in methods if isinstance(method, str)])
    totals: dict[str, list[tuple[float, float, float]]] = {}
    with progress.bar("occluding", len(examples), shown=bar) as tick:
        for example in examples:
            inputs = reader.inputs([example.image], [example.question])
            places = (inputs["input_ids"][0] == reader.model.config.image_token_id).nonzero()[:, 0]
            all_tokens = torch.ones(1, len(places), dtype=torch.bool)
            target = _next_log_probabilities(reader, inputs, all_tokens, places).argmax()
            loss = -_answer(reader, inputs, ~torch.eye(len(places), dtype=torch.bool), places, target)
            for method in methods:
                scores = _score_map(reader, inputs, method)
                areas = _areas(reader, inputs, scores, places, target)
                name = method if isinstance(method, str) else method.name
                totals.setdefault(name, []).append((spearmanr(scores, loss.cpu()).statistic, *areas))
            tick()
    return [_row(name, found) for name, found in totals.items()]


def _row(method: str, found: list[tuple[float, float, float]]) -> Row:
    values = torch.tensor(found, dtype=torch.float64).nan_to_num()  # a constant map ranks nothing
    spearman, deletion, insertion = values.mean(0).tolist()
    return {"method": method, "spearman": spearman, "deletion": deletion, "insertion": insertion, "n": len(found)}


def _score_map(reader: Reader, inputs: dict[str, Tensor], method: str | vtc.Method) -> Tensor:
    """The method's scores over all of an image's tokens, at its first stage: (tokens,)."""
    method = vtc.find_method(method)
    budget = 0.5 if method.ratios() is None else None
    with vtc.compressed(reader.model, method, budget) as trace, torch.inference_mode():
        reader.model(**inputs)
    return trace.scores(0)[0]


def _areas(
    reader: Reader, inputs: dict[str, Tensor], scores: Tensor, places: Tensor, target: Tensor
) -> tuple[float, float]:
    order = scores.argsort(descending=True)
    best = torch.zeros(len(STEPS), len(places), dtype=torch.bool)
    for row, share in enumerate(STEPS):
        best[row, order[: round(share * len(places))]] = True
    chances = _answer(reader, inputs, torch.cat((~best, best)), places, target).exp().cpu()
    steps = torch.tensor(STEPS)
    deletion, insertion = (torch.trapezoid(part, steps).item() for part in chances.split(len(STEPS)))
    return deletion, insertion


def _answer(reader: Reader, inputs: dict[str, Tensor], visible: Tensor, places: Tensor, target: Tensor) -> Tensor:
    """Log-probability of the answer's first token, for each row of `visible` (cases, tokens): (cases,)."""
    return _next_log_probabilities(reader, inputs, visible, places)[:, target]


@torch.inference_mode()
def _next_log_probabilities(reader: Reader, inputs: dict[str, Tensor], visible: Tensor, places: Tensor) -> Tensor:
    """(cases, vocabulary): what the unwrapped model says next when only the `visible` tokens are not hidden."""
    ids, cases = inputs["input_ids"], len(visible)
    mask = torch.ones(cases, ids.shape[1], dtype=torch.long, device=ids.device)
    mask[:, places] = visible.long().to(ids.device)
    encoded = reader.model.get_image_features(inputs["pixel_values"], return_dict=True)
    encoded.pooler_output = list(encoded.pooler_output) * cases
    logits = reader.model(
        input_ids=ids.expand(cases, -1),
        attention_mask=mask,
        position_ids=torch.arange(ids.shape[1], device=ids.device).expand(cases, -1),
        mm_encoder_outputs={"image": encoded},
        logits_to_keep=1,
    ).logits
    return logits[:, -1].float().log_softmax(-1)


def table(rows: list[Row]) -> Table:
    """The rows for the terminal."""
    result = Table(title="score maps against occlusion", caption="deletion: lower is better; the others: higher")
    for column in ("method", "spearman", "deletion", "insertion", "n"):
        result.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        values = (row["spearman"], row["deletion"], row["insertion"])
        result.add_row(row["method"], *(f"{value:.3f}" for value in values), str(row["n"]))
    return result
