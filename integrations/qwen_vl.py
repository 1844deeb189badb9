"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: packed patches of any resolution, a patch merger, positions in three axes.

A visual token is a merged square of patches; its score is their mean. An image is one crop of the tower, a frame of a
video another. Qwen2.5-VL's tower has windowed blocks, in which a patch is seen by its window only: scores come from the
blocks with full attention. Qwen3-VL adds features of earlier tower blocks to its first decoder states: they leave
together with their token. VFlowOpt's entropy term is not available: patches come packed, of all frames and images.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.vision_utils import get_vision_window_index

from vtc.adapter import Adapter, HfModule, register
from vtc.attention import Attention, TowerStates
from vtc.grids import Grid


@register
class QwenVL(Adapter):
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    has_pixels = False

    def encoder_blocks(self) -> Sequence[HfModule]:
        return self.backbone.visual.blocks

    def tower_blocks(self) -> Sequence[HfModule]:
        blocks = self.encoder_blocks()
        full = getattr(self.backbone.visual, "fullatt_block_indexes", range(len(blocks)))
        return [block for number, block in enumerate(blocks) if number in full]

    def has_cls(self) -> bool:
        return False

    def tower_attention(self, block: HfModule) -> Attention:
        return Attention(block.attn.qkv, block.attn.qkv, block.attn.num_heads, block.attn.num_heads, block.attn.scaling)

    def tower_modules(self, block: HfModule) -> dict[str, HfModule]:
        return {"qkv": block.attn.qkv, "rotary": self.backbone.visual.rotary_pos_emb}

    def tower_states(self, block: HfModule, record: dict[str, Any], call: dict[str, Any]) -> TowerStates:
        attention, frames = block.attn, self._frames(call)
        query, key, _ = record["qkv"].unflatten(-1, (3, attention.num_heads, -1)).transpose(0, 1).unbind(0)
        cos, sin = (self._windowed(table, call)[None] for table in record["rotary"])

        def states(x: Tensor) -> Tensor:
            rotated = self.rotate(x.float().transpose(0, 1)[None], cos.float(), sin.float())[0].transpose(0, 1)
            return pad_sequence(rotated.split(frames), batch_first=True).transpose(1, 2)

        valid = pad_sequence([torch.ones(frame, dtype=torch.bool) for frame in frames], batch_first=True)
        return TowerStates(states(query), states(key), attention.scaling, valid.to(query.device))

    def patches(self, states: Tensor, call: dict[str, Any]) -> Tensor:
        return pad_sequence(states.split(self._frames(call)), batch_first=True)

    def pack(self, patches: Tensor, call: dict[str, Any]) -> list[Tensor]:
        grids, unit = self._grids(call), self.backbone.visual.spatial_merge_size**2
        packed = torch.cat([frame[:length] for frame, length in zip(patches, self._frames(call), strict=True)])
        tokens = packed.unflatten(0, (-1, unit)).mean(1)
        if (index := self._window_index(call)) is not None:
            tokens = tokens[index.argsort().to(tokens.device)]
        return list(tokens.split([time * height * width // unit for time, height, width in grids]))

    def parts(self, call: dict[str, Any], sizes: list[int]) -> list[list[Grid]]:
        merge = self.backbone.visual.spatial_merge_size
        return [[(height // merge, width // merge)] * time for time, height, width in self._grids(call)]

    def rotary_tables(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        # in time, height and width; a line of text positions may come before them
        return super().rotary_tables(hidden, positions[-3:] if positions.ndim == 3 else positions.expand(3, -1, -1))

    def late_features(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
        if (late := kwargs.get("deepstack_visual_embeds")) is None:
            return kwargs, []
        mask = kwargs["visual_pos_masks"]
        dense = [
            states.new_zeros(*mask.shape, states.shape[-1]).masked_scatter(mask[..., None], states) for states in late
        ]
        return {**kwargs, "visual_pos_masks": None, "deepstack_visual_embeds": None}, dense

    def _grids(self, call: dict[str, Any]) -> list[list[int]]:
        """(time, height, width) in patches of each image or video."""
        return next(call[name] for name in ("image_grid_thw", "video_grid_thw") if name in call).tolist()

    def _frames(self, call: dict[str, Any]) -> list[int]:
        """The patches of each crop of the tower: an image, or a frame of a video."""
        return [height * width for time, height, width in self._grids(call) for _ in range(time)]

    def _window_index(self, call: dict[str, Any]) -> Tensor | None:
        """The order of merged squares in a tower with windows."""
        tower = self.backbone.visual
        if not hasattr(tower, "window_size"):
            return None
        grids = torch.tensor(self._grids(call))
        return get_vision_window_index(grids, tower.spatial_merge_size, tower.window_size, tower.patch_size)[0]

    def _windowed(self, table: Tensor, call: dict[str, Any]) -> Tensor:
        if (index := self._window_index(call)) is None:
            return table
        squares = table.unflatten(0, (-1, self.backbone.visual.spatial_merge_size**2))
        return squares[index.to(table.device)].flatten(0, 1)
