"""TokenButler: one small trained predictor tells after layer 0 what all later layers will attend to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from einops import rearrange
from torch import Tensor, nn

from vtc.adapter import Adapter
from vtc.methods.predictor import DIM, Predictor
from vtc.methods.window import question
from vtc.observe import TokenStates
from vtc.stage import Shape, Stage
from vtc.trained import Trained
from vtc.view import View


@dataclass(frozen=True)
class Importance(TokenStates):
    """Predicted attention of the question to the visual tokens, (images, 1, tokens), from the states entering `layer`.

    The mean over the queries, and over the key heads of all layers from `layer` on.
    """

    reads_text: ClassVar[bool] = True

    predictor: Predictor | None

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        shape = adapter.shape()
        here = adapter.decoder.config.hidden_size, (shape.decoder_layers - self.layer) * shape.key_heads
        if self.predictor is not None and (known := (self.predictor.width, self.predictor.channels)) != here:
            raise ValueError(
                f"these modules of tokenbutler are of another model: they read states of {known[0]} channels and know "
                f"{known[1]} key heads in all layers, and here are {here[0]} and {here[1]}"
            )
        return {}

    def logits(self, view: View) -> Iterator[Tensor]:
        """For each layer from `layer` on, q k / sqrt(DIM) of the `question`: (images, key_heads, queries, tokens)."""
        assert self.predictor is not None, "bind finds it or raises"
        states = view.adapter.layers[self.layer].input_layernorm(view.hidden)
        query, key = self.predictor(states.float(), view.stream.columns.place, question(view)[0])
        key = rearrange(view.of_tokens(rearrange(key, "b c n d -> b (c d) n")), "i (c d) n -> i c d n", d=DIM)
        heads = view.adapter.shape().key_heads
        for asks, seen in zip(query[view.stream.row].split(heads, dim=1), key.split(heads, dim=1), strict=True):
            yield asks @ seen / DIM**0.5

    def row(self, record: dict[str, Tensor], view: View) -> Tensor:
        asks = question(view)[1]
        weights, hidden = asks / asks.sum(1, keepdim=True), ~view.alive[:, None, None]
        rows = [x.masked_fill(hidden, torch.finfo(x.dtype).min).softmax(-1).mean(1) for x in self.logits(view)]
        return torch.einsum("iqn,iq->in", torch.stack(rows).mean(0), weights)[:, None]


@dataclass(frozen=True)
class TokenButler(Trained):
    """Before decoder layer 1 drop the visual tokens that a predictor expects the later layers to attend to least.

    "TokenButler: Token Importance is Predictable" (arXiv 2503.07518): one predictor beside layer 0, with the heads of
    all later layers in its outputs, is trained to give their logits before the softmax; the model is frozen.

    Different here, as visual tokens leave in the prefill: the paper drops nothing, and each query of each layer and
    head reads its own choice of keys. Here a token's predicted attention, the softmax over its image, is averaged over
    the question, heads and layers, and what leaves before layer 1 has left for all of them. So only the columns of
    visual tokens in the rows of the question are learnt, of key heads instead of query heads (`vtc.eval.tokenbutler`).
    The predictor reads what the attention of layer 1 reads: layer 0 is whole, as in the paper. Left out: the paper's
    second MLP, which predicts how much a head matters.

    On the reference model it beats the attention of layer 0 used directly at a quarter of the tokens and below, and not
    at half; of the attention of layer 1, made ahead, it can be told apart at its floor alone (docs/suites.md).
    """

    name: ClassVar[str] = "tokenbutler"
    paper: ClassVar[str] = "TokenButler, arXiv 2503.07518"

    def stages(self, shape: Shape) -> tuple[Stage, ...]:
        (layer,) = shape.layers((1,), of=1)
        need = Importance(layer, self.predictor)
        return (Stage(layer, lambda seen: seen[need][:, 0], (need,)),)

    @property
    def predictor(self) -> Predictor | None:
        return None if self.modules is None else cast(Predictor, self.modules[0])

    # -- the trained modules --------------------------------------------------------------------------------------

    def untrained(self, shape: Shape, width: int) -> TokenButler:
        """With a new predictor for this model, ready for training; `width` is the decoder's."""
        narrow, channels = max(DIM, width // 4 // DIM * DIM), (shape.decoder_layers - 1) * shape.key_heads
        return replace(self, modules=nn.ModuleList([Predictor(width, narrow, min(512, width), channels)]))

    @property
    def parts(self) -> int:
        return 1

    def built(self, state: dict[str, Tensor]) -> nn.ModuleList:
        (narrow, width), (out, hidden) = state["0.narrow.weight"].shape, state["0.key.2.weight"].shape
        return nn.ModuleList([Predictor(width, narrow, hidden, out // DIM)])
