"""LAQ: a few tokens of the answer are said ahead on a smaller cache, and their queries score the whole one."""

from __future__ import annotations

from contextvars import Context, ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import torch
from einops import reduce
from pydantic import Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache

import vtc.select as select
from vtc.adapter import Adapter
from vtc.attention import attention_rows
from vtc.choice import Seen, by_head
from vtc.core.compact import gather, gather_heads
from vtc.core.patch import before
from vtc.methods.window import AfterPrefill, Kernel, WindowRow, pooled
from vtc.need import Need
from vtc.stage import Cache, Shape, Stage
from vtc.view import View


@dataclass(frozen=True)
class LAQ(AfterPrefill):
    """In each layer's cache keep, for each key head, the visual tokens that the beginning of the answer attends to.

    "Lookahead Q-Cache: Achieving More Consistent KV Cache Eviction via Pseudo Query" (arXiv 2505.20334): after the
    prefill SnapKV leaves a smaller copy of the cache; the model says a few tokens with it, greedily; their queries
    attend to the whole prompt, and what each layer keeps is chosen by the mean of that, pooled. Then the answer begins
    anew. The copy holds a share of the visual tokens, where the paper has a number of all tokens (512); SnapKV's window
    is the question, not the last 32 tokens; neighbours are those on the image's grid, not 7 in a row; pseudo queries
    see all of the prompt, the last keys of which the released code hides. LAQ++, which adds the prompt's last queries,
    is not here. The steps ahead are part of the prefill, whose peak of memory grows by the copy. It saves memory and
    decoding where answers are longer than what is said ahead, and the first token comes later.
    """

    steps: Annotated[int, Field(ge=1, le=64)] = 8
    """Tokens that are said ahead, at most: none after the end of an answer."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Of the visual tokens, in the copy."""
    kernel: Kernel = 3

    name: ClassVar[str] = "laq"
    paper: ClassVar[str] = "LAQ, arXiv 2505.20334"

    def stage(self, layer: int, shape: Shape) -> Stage:
        windows, last = tuple(map(WindowRow, range(shape.decoder_layers))), shape.decoder_layers - 1
        ahead = LookAhead(last, self.steps, self.share, self.kernel, windows)
        own = slice(shape.key_heads * layer, shape.key_heads * (layer + 1))

        def score(seen: Seen) -> Tensor:
            return pooled(seen[ahead][:, own], seen, self.kernel, "max")

        return Stage(Cache(layer, after=last), score, (ahead,) if layer == last else (windows[layer], ahead))


saying: ContextVar[dict[int, list[Any]] | None] = ContextVar("vtc_saying_ahead", default=None)
"""By decoder layer what is seen while tokens are said ahead: rotary tables and queries, in turn."""


@dataclass(frozen=True)
class LookAhead(Need):
    """Mean attention that tokens said ahead pay the visual tokens, all layers' (images, layers * key_heads, tokens)."""

    reads_text: ClassVar[bool] = True

    steps: int
    share: float
    kernel: Kernel
    windows: tuple[WindowRow, ...]

    def modules(self, adapter: Adapter) -> dict[str, nn.Module]:
        if getattr(adapter.model, "get_output_embeddings", lambda: None)() is None:
            raise ValueError("this method says tokens ahead, and this model has no head to say them with")
        return self.windows[-1].modules(adapter)

    def hooks(self, adapter: Adapter) -> list[RemovableHandle]:
        def positions(decoder: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if (record := self.record()) is not None and kwargs.get("position_ids") is not None:
                record["positions"] = kwargs["position_ids"]

        def tables(layer: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if (said := saying.get()) is not None:
                said.setdefault(layer, []).append(kwargs["position_embeddings"])

        def query(layer: int, module: nn.Module, args: tuple, output: Tensor) -> None:
            if (said := saying.get()) is not None:
                said[layer].append(output)

        handles = [*super().hooks(adapter), before(adapter.decoder, positions)]
        for number, layer in enumerate(adapter.layers):
            asks = adapter.decoder_attention(layer).query
            handles.append(before(layer, partial(tables, number)))
            handles.append(asks.register_forward_hook(partial(query, number)))
        return handles

    @torch.no_grad()
    def row(self, record: dict[str, Tensor], view: View) -> Tensor:
        last = view.last_positions()
        before = torch.arange(view.stream.length, device=last.device) + view.visibility.start
        positions = gather(record.get("positions", before[None]), last, dim=-1)
        cache, real = self._smaller(record, view)
        said, counts = Context().run(self._say, view, cache, real, last, positions)  # in it nothing is compressed
        return torch.cat([self._paid(view, layer, said[layer], counts) for layer in range(len(said))], dim=1)

    def _smaller(self, record: dict[str, Tensor], view: View) -> tuple[DynamicCache, Tensor]:
        """SnapKV's copy of the cache, and which of its keys may be seen: (batch, length) bool, alike in all layers."""
        seen, cache = view.stream.seen(()), DynamicCache()
        counts = [max(1, round(self.share * count)) if count else 0 for count in view.stream.counts]
        number = torch.tensor(counts).to(seen.valid.device, non_blocking=True)
        for window in self.windows:
            row = view.stream.rows[window] if window is not self.windows[-1] else window.row(record, view)
            keep = by_head(select.top_k, pooled(row, seen, self.kernel, "max"), seen, number).keep
            (keys, values), past = view.cached(window.layer), view.past[window.layer]
            stays, lengths = view.stream.stays(keep), view.stream.lengths_after(counts)
            columns, index = past.then(view.stream.columns).staying(past, stays, lengths)
            if columns.weight is not None:
                raise ValueError("this method cannot look ahead over merged tokens that count several times")
            cache.update(gather_heads(keys, index), gather_heads(values, index), window.layer)
        return cache, self._prompt(view, columns.by_head(1).place[:, 0])

    def _prompt(self, view: View, place: Tensor) -> Tensor:
        """Which columns are of the prompt: neither filling nor guessed behind it."""
        end = gather(view.stream.columns.place, view.last_positions())
        return (place >= 0) & (place <= end.view(-1, *[1] * (place.ndim - 1)))

    def _say(
        self, view: View, cache: DynamicCache, real: Tensor, last: Tensor, positions: Tensor
    ) -> tuple[dict[int, list[Any]], Tensor]:
        """What is seen of the tokens said ahead, and which of them count: (batch, steps) float32."""
        model, decoder = view.adapter.model, view.adapter.decoder
        said: dict[int, list[Any]] = {}
        saying.set(said)
        ends = torch.tensor(_ends(model), device=last.device)
        states, goes_on = decoder.norm(gather(view.hidden, last)), torch.ones_like(last, dtype=torch.bool)
        counts: list[Tensor] = []
        for _ in range(self.steps):
            token = model.get_output_embeddings()(states).argmax(-1)
            goes_on = goes_on & ~torch.isin(token, ends) if counts else goes_on
            counts.append(goes_on)
            real, positions = torch.cat((real, torch.ones_like(goes_on)), dim=1), positions + 1
            states = decoder(
                input_ids=token,
                attention_mask=real.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        return said, torch.cat(counts, dim=1).float()

    def _paid(self, view: View, layer: int, said: list[Any], counts: Tensor) -> Tensor:
        """The mean of a layer's pseudo queries over its whole cache: (images, key_heads, tokens)."""
        attention, past = view.adapter.decoder_attention(view.adapter.layers[layer]), view.past[layer]
        seen = zip(said[::2], said[1::2], strict=True)
        query = torch.cat([view.adapter.rotate(attention.queries(x), *tables) for tables, x in seen], dim=2)
        columns, (keys, _) = past.then(view.stream.columns), view.cached(layer)
        visible = self._prompt(view, columns.place)[..., None, :]
        rows = attention_rows(query, keys, attention.scale, visible, columns.weight, attention.softcap)
        mean = torch.einsum("bhqn,bq->bhn", rows, counts / counts.sum(1, keepdim=True))[..., past.length :]
        return view.of_tokens(reduce(mean, "b (g r) n -> b g n", "sum", g=attention.key_heads))


def _ends(model: Any) -> list[int]:
    """The tokens that end an answer."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
