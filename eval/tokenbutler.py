"""`vtc train tokenbutler`: the predictor of TokenButler, for one model and every budget.

The model is frozen and reads the training questions whole. What its decoder layers from 1 on make of them, before the
softmax, is what the predictor has to give:

    loss = mean over layers, key heads, the question's queries and visual tokens of (predicted - q k / sqrt d)^2

The paper has all columns under the causal mask, and heads of queries; what is never dropped is not to be predicted, and
heads that share a key share its fate: their mean is the target. AdamW, the learning rate falling as a cosine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor

import vtc
from vtc.choice import Choice, Seen
from vtc.core.compact import gather_heads
from vtc.eval import lessons
from vtc.eval.reader import Reader
from vtc.methods.tokenbutler import Importance, TokenButler
from vtc.methods.window import question
from vtc.observe import DecoderRow
from vtc.stage import Method, Shape, Stage
from vtc.view import View


@dataclass(frozen=True)
class Recipe(lessons.Recipe):
    """How the predictor is trained."""

    steps: int = 600
    batch_size: int = 16
    learning_rate: float = 1e-3


def train(recipe: Recipe, out: Path | None = None) -> TokenButler:
    """`lessons.learn` the predictor."""

    def loss(reader: Reader, method: TokenButler, step: int) -> tuple[Tensor, str]:
        error = missed(reader, method, lessons.questions(reader, recipe, step)[1])[0].mean()
        return error, f"error {error.item():.3f}"

    def report(reader: Reader, method: TokenButler) -> dict[str, Any]:
        return {"explained": explained(reader, method, recipe)}

    def cosine(done: float) -> float:
        return (1 + math.cos(math.pi * done)) / 2

    return lessons.learn(TokenButler().untrained, recipe, out, TokenButler.name, loss, report, cosine)


def explained(reader: Reader, method: TokenButler, recipe: Recipe, questions: int = 256) -> dict[str, Any]:
    """Of the variance of the logits among an image's tokens, the part that is predicted, on the validation split."""
    examples = lessons.unseen(recipe, questions)
    with torch.inference_mode():
        found = [missed(reader, method, prompts) for prompts in lessons.prompts(reader, recipe, examples)]
    error, variance = torch.cat(found, dim=2).mean(2)
    return {"layers": (1 - error / variance).tolist(), "questions": len(examples)}


def missed(reader: Reader, method: TokenButler, prompts: dict[str, Tensor]) -> Tensor:
    """(2, layers, images): the mean squared error, and the variance of what was to be predicted."""
    watched = Watched(method)
    with vtc.compressed(reader.model, watched):
        reader.model(**prompts, use_cache=False)
    return watched.found[0]


def weighed(logits: Tensor, view: View) -> Tensor:
    """Logits (images, key_heads, queries, tokens) as a row, times the root of each query's part in the question."""
    asks = question(view)[1]
    parts = asks / asks.sum(1, keepdim=True)
    return rearrange(logits * parts.sqrt()[:, None, :, None], "i g q n -> i (g q) n")


@dataclass(frozen=True)
class Predicted(Importance):
    """All predicted logits, `weighed`: (images, layers * key_heads * queries, tokens)."""

    def row(self, record: dict[str, Tensor], view: View) -> Tensor:
        return torch.cat([weighed(logits, view) for logits in self.logits(view)], dim=1)


@dataclass(frozen=True)
class Logits(DecoderRow):
    """What decoder layer `layer` makes of what enters it, before the softmax, the mean over the heads that share a key,
    `weighed`: (images, key_heads * queries, tokens)."""

    ahead: bool = True

    def row(self, record: dict[str, Tensor], view: View) -> Tensor:
        layer, (positions, _) = view.adapter.layers[self.layer], question(view)
        attention, hidden = view.adapter.decoder_attention(layer), layer.input_layernorm(view.hidden)
        query, key = attention.queries(attention.query(hidden)), attention.keys(attention.key(hidden))
        query = gather_heads(view.rotated(self.layer, query), positions[:, None])
        query = rearrange(query.float(), "b (g r) q d -> b g r q d", g=attention.key_heads)
        logits = query @ view.rotated(self.layer, key).float().transpose(2, 3)[:, :, None] * attention.scale
        if attention.softcap is not None:
            logits = (logits / attention.softcap).tanh() * attention.softcap
        tokens = view.of_tokens(rearrange(logits.mean(2), "b g q n -> b (g q) n"))
        return weighed(rearrange(tokens, "i (g q) n -> i g q n", g=attention.key_heads), view)


@dataclass(frozen=True)
class Watched(Method):
    """Drops nothing: the model reads all tokens, and the prediction is held against what its layers see."""

    of: TokenButler
    found: list[Tensor] = field(default_factory=list, compare=False)
    """What `missed` returns."""

    name: ClassVar[str] = "watched"
    paper: ClassVar[str] = "for training"
    adaptive: ClassVar[bool] = True

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        predicted = Predicted(1, self.of.predictor)
        layers = tuple(map(Logits, range(1, shape.decoder_layers)))

        def score(seen: Seen) -> Tensor:
            logits, valid = torch.stack([seen[need] for need in layers]), seen.valid[:, None]
            guess = rearrange(seen[predicted], "i (l x) n -> l i x n", l=len(layers))
            count = valid.sum(2, keepdim=True)
            middle = (logits * valid).sum(3, keepdim=True) / count
            squares = torch.stack((guess - logits, logits - middle)) ** 2 * valid
            self.found.append((squares / count).sum((3, 4)) / shape.key_heads)
            return seen.valid.float()

        last = shape.decoder_layers - 1
        return (Stage(last, score, (predicted, *layers), lambda scores, seen, keep: Choice(seen.valid)),)
