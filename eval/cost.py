"""What a schedule of visual tokens costs: FLOPs, KV bytes, and the speed-up that is possible at all.

Counts follow PyramidDrop, SparseVLM and TransPrune (gated feed-forward, three matrices), with grouped-query attention;
they are multiply-accumulates times two. `config` is the decoder's config.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def layer_flops(tokens: int, config: Any) -> float:
    """FLOPs of one decoder layer over `tokens` positions."""
    width, inner = config.hidden_size, config.intermediate_size
    groups = config.num_key_value_heads / config.num_attention_heads
    projections = 2 * tokens * width**2 * (1 + groups)
    attention = 2 * tokens**2 * width
    return 2 * (projections + attention + 3 * tokens * width * inner)


def prefill_flops(visual: Sequence[int], text: int, config: Any) -> float:
    """FLOPs of a prefill whose layer l reads visual[l] visual tokens and `text` others."""
    return sum(layer_flops(tokens + text, config) for tokens in visual)


def kv_bytes(visual: Sequence[float], text: int, config: Any, element: int) -> float:
    """Bytes of keys and values that one row holds after that prefill; `element` is the size of one number in bytes."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_key_value_heads * head * element * sum(tokens + text for tokens in visual)


def speed_up_limit(visual: Sequence[int], full: int, text: int, config: Any, fixed: float = 0.0) -> float:
    """Prefill speed-up where FLOPs bind: the unpruned prefill over the pruned one.

    `fixed` is what pruning does not change, in FLOPs: the vision tower and the projector.
    """
    unpruned = prefill_flops([full] * len(visual), text, config)
    return (fixed + unpruned) / (fixed + prefill_flops(visual, text, config))
