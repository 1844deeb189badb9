"""The forward pass in two halves, as training needs it: look at images, then read some of their tokens."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, LlavaForConditionalGeneration
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vtc.eval.reference.data import Pack

FLOAT32 = "sdpa_in_float32"
"""The attention that training uses: on CPUs its way back takes a third of the time that it takes in bfloat16."""


def _in_float32(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    with torch.autocast(query.device.type, enabled=False):
        output, weights = sdpa_attention_forward(module, query.float(), key.float(), value.float(), *args, **kwargs)
    return output.to(query.dtype), weights


AttentionInterface.register(FLOAT32, _in_float32)
AttentionMaskInterface.register(FLOAT32, sdpa_mask)


def look(model: LlavaForConditionalGeneration, pixels: Tensor) -> list[Tensor]:
    """What enters each vision layer up to, and what leaves, the layer that LLaVA reads: (batch, 1 + patches, width)."""
    tower = model.model.vision_tower
    states = [tower.pre_layrnorm(tower.embeddings((pixels / 255 - 0.25) / 0.25))]
    for layer in tower.encoder.layers[: model.config.vision_feature_layer + 1]:  # the last layer is never read
        states.append(layer(states[-1], attention_mask=None))
    return states


def cls_attention(model: LlavaForConditionalGeneration, states: list[Tensor]) -> Tensor:
    """Head-mean attention of the CLS token to each patch, in the layer that LLaVA reads: (batch, patches)."""
    layer = model.model.vision_tower.encoder.layers[len(states) - 2]
    normed = layer.layer_norm1(states[-2])
    heads = layer.self_attn.num_heads
    query = rearrange(layer.self_attn.q_proj(normed[:, :1]), "b q (h d) -> b h q d", h=heads)
    key = rearrange(layer.self_attn.k_proj(normed), "b k (h d) -> b h k d", h=heads)
    row = (query @ key.transpose(-1, -2) * layer.self_attn.scale).float().softmax(-1)
    return row.mean(1)[:, 0, 1:]


def gather(tokens: Tensor, keep: Tensor) -> Tensor:
    """Row b's tokens keep[b]: (batch, kept, width)."""
    return tokens.gather(1, repeat(keep, "b k -> b k d", d=tokens.shape[-1]))


def read(
    model: LlavaForConditionalGeneration,
    tokens: Tensor,
    keep: Tensor,
    pack: Pack,
    blind: Tensor | None = None,
) -> Tensor:
    """Decoder states (batch, pack length, width) behind projected `tokens` (batch, kept, width).

    `keep` (batch, kept) says which patches they are: they stand at the positions that they have in a whole image. Rows
    where `blind` is true see no visual token.
    """
    device, (rows, kept) = tokens.device, keep.shape
    embed = model.get_input_embeddings()
    ahead = pack.head.shape[1]
    behind = ahead + model.config.image_seq_length
    words = embed(torch.cat([pack.head, pack.ids], 1))
    inputs = torch.cat([words[:, :ahead], tokens.to(words.dtype), words[:, ahead:]], 1)
    positions = torch.cat([torch.arange(ahead, device=device).expand(rows, -1), ahead + keep, behind + pack.offset], 1)
    block = torch.cat([torch.zeros(rows, ahead + kept, dtype=torch.long, device=device), pack.block], 1)
    visible = (block[:, None] == 0) | (block[:, None] == block[:, :, None])
    visible &= torch.ones(visible.shape[-2:], dtype=torch.bool, device=device).tril()
    if blind is not None:
        visible[:, :, ahead : ahead + kept] &= ~blind[:, None, None]
    states = model.model.language_model(
        inputs_embeds=inputs, attention_mask=visible[:, None], position_ids=positions, use_cache=False
    ).last_hidden_state
    return states[:, ahead + kept :]


class Labels(nn.Module):
    """What training asks beside the questions; none of it is saved with the model.

    Patches: which words describe what touches a patch and where in the image it is, read off the *projected* token by
    the decoder's own word embeddings, so that a visual token arrives in the decoder as the sum of its words; and the
    row and column of the patch.
    CLS: what the image shows, asked in the last `DEPTH` layers, so that its attention learns to find things.
    """

    DEPTH = 3

    def __init__(self, vision: int, text: int, grid: int, present: int):
        super().__init__()
        self.place = nn.Linear(text, 2 * grid)
        self.grid = grid
        self.cls = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(vision), nn.Linear(vision, present)) for _ in range(self.DEPTH)
        )

    def patch_loss(self, tokens: Tensor, keep: Tensor, words: Tensor, embedding: Tensor, nothing: int) -> Tensor:
        """tokens (batch, kept, width) projected; keep (batch, kept); words (batch, kept, n) ids or -1."""
        scores = (tokens @ embedding.T).float().log_softmax(-1)
        given = words >= 0
        each = scores.gather(-1, words.clamp(min=0)).masked_fill(~given, 0).sum(-1) / given.sum(-1)
        weight = torch.where(words[..., 0] == nothing, 0.15, given.sum(-1).float() / 4)  # background is most of it
        place = self.place(tokens).float()
        rows = nn.functional.cross_entropy(place[..., : self.grid].flatten(0, 1), (keep // self.grid).flatten())
        columns = nn.functional.cross_entropy(place[..., self.grid :].flatten(0, 1), (keep % self.grid).flatten())
        return -(each * weight).sum() / weight.sum() + 0.1 * (rows + columns)

    def cls_loss(self, states: list[Tensor], present: Tensor) -> Tensor:
        """Binary cross entropy a label, times 10 to weigh as much as the patches."""
        scores = [one(state[:, 0]).float() for one, state in zip(self.cls, states[-self.DEPTH :], strict=True)]
        return 10 * sum(nn.functional.binary_cross_entropy_with_logits(s, present) for s in scores) / len(scores)
