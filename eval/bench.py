"""Seconds and bytes with and without compression, and what would be possible, in one interleaved run.

The limit is measured, not computed: the same model runs natively on prompts that are as short from the start as the
pruned ones are in the end. Where a method drops tokens in the middle of the stack, each span of layers counts with the
native prefill of its own length.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig, PreTrainedConfig, Qwen2Config
from transformers.models.auto import AutoModelForImageTextToText

import vtc

CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}


def _llava(text: PreTrainedConfig) -> LlavaConfig:
    return LlavaConfig(
        vision_config=CLIPVisionConfig(**CLIP_L_336),
        text_config=text,
        image_token_id=text.vocab_size - 1,
        image_seq_length=576,
    )


def _vicuna(width: int, inner: int, layers: int, heads: int) -> LlavaConfig:
    return _llava(
        LlamaConfig(
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            vocab_size=32064,
        )
    )


SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llava-1.5-7b": lambda: _vicuna(4096, 11008, 32, 32),
    "llava-1.5-13b": lambda: _vicuna(5120, 13824, 40, 40),
    "llava-qwen2-0.5b": lambda: _llava(
        Qwen2Config(
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=24,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=151936,
        )
    ),
}
"""True shapes, for random weights. `llava-qwen2-0.5b` is LLaVA-1.5's tower before the 0.5B decoder of OneVision."""

PARTS = ("vision", "score", "prefill", "decode", "kv_bytes")


@dataclass(frozen=True)
class Case:
    """What is measured: prompts of `text_tokens` besides one image a row, then `new_tokens` decoded."""

    batch: int = 1
    text_tokens: int = 60
    new_tokens: int = 8
    rounds: int = 3


def load(shape: str, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """A model with random weights: of a named shape, or of the shape of a folder's config.json.

    Raises ValueError that lists the shapes.
    """
    if shape in SHAPES:
        config = SHAPES[shape]()
    elif (Path(shape) / "config.json").is_file():
        config = AutoConfig.from_pretrained(shape)
    else:
        raise ValueError(f"unknown shape {shape!r}; known are {', '.join(SHAPES)}, and folders with a config.json")
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype).eval()


@torch.inference_mode()
def bench(model: torch.nn.Module, method: str, budget: vtc.stage.Budget, case: Case) -> dict[str, Any]:
    """Medians over rounds of seconds (and KV bytes) by part, for the full, the pruned and the natively short model.

    Returns {"full" | "pruned" | "limit": {part: value}, "tokens": {...}}; `prefill` contains `score`, `decode` is
    seconds a token, and the limit has no vision or score of its own.
    """
    inputs = _inputs(model, case)
    total = int((inputs["input_ids"][0] == model.config.image_token_id).sum())
    with vtc.compressed(model, method, budget) as trace:  # a first pass that says how many tokens are left where
        _run(model, inputs, 1)
    counts = trace.tokens_per_layer[0].tolist()
    text = inputs["input_ids"].shape[1] - total
    spans = {count: counts.count(count) / len(counts) for count in dict.fromkeys(counts)}

    rounds: dict[str, list[dict[str, float]]] = {"full": [], "pruned": [], "limit": []}
    for _ in track(range(case.rounds + 1), description="measuring", console=Console(stderr=True)):
        rounds["full"].append(_run(model, inputs, case.new_tokens))
        with vtc.compressed(model, method, budget) as trace:
            measured = _run(model, inputs, case.new_tokens)
            rounds["pruned"].append({**measured, "score": trace.seconds.get("score", 0.0)})
        short = {count: _short(model, count + text, case) for count in spans}
        rounds["limit"].append(
            {
                "vision": rounds["full"][-1]["vision"],
                **{part: sum(short[n][part] * share for n, share in spans.items()) for part in short[counts[0]]},
            }
        )
    medians = {
        kind: {part: statistics.median(run[part] for run in runs[1:]) for part in runs[0]}  # the first warms up
        for kind, runs in rounds.items()
    }
    return {
        **medians,
        "tokens": {"full": total, "average": sum(counts) / len(counts), "last": counts[-1], "text": text},
    }


def _inputs(model: torch.nn.Module, case: Case) -> dict[str, Tensor]:
    config, generator = model.config, torch.Generator().manual_seed(0)
    text = torch.randint(2, config.image_token_id, (case.batch, case.text_tokens), generator=generator)
    image = torch.full((case.batch, config.image_seq_length), config.image_token_id)
    size = config.vision_config.image_size
    return {
        "input_ids": torch.cat((text[:, :8], image, text[:, 8:]), dim=1).to(model.device),
        "pixel_values": torch.randn(case.batch, 3, size, size, generator=generator).to(model.device, model.dtype),
    }


def _run(model: torch.nn.Module, inputs: dict[str, Tensor], new_tokens: int) -> dict[str, float]:
    base = model.base_model
    vision, features = _timed(lambda: base.get_image_features(inputs["pixel_values"], return_dict=True), model)
    ids = inputs["input_ids"]
    prefill, out = _timed(
        lambda: model(input_ids=ids, mm_encoder_outputs={"image": features}, use_cache=True, logits_to_keep=1), model
    )
    return {"vision": vision, "prefill": prefill, **_decode(model, out, ids.shape[1], new_tokens)}


def _short(model: torch.nn.Module, length: int, case: Case) -> dict[str, float]:
    ids = torch.randint(2, model.config.image_token_id, (case.batch, length), device=model.device)
    prefill, out = _timed(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1), model)
    return {"prefill": prefill, **_decode(model, out, length, case.new_tokens)}


def _decode(model: torch.nn.Module, out: Any, length: int, new_tokens: int) -> dict[str, float]:
    cache = out.past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)

    def steps() -> None:
        token = out.logits[:, -1:].argmax(-1)
        for step in range(new_tokens):
            positions = torch.full_like(token, length + step)
            token = model(input_ids=token, position_ids=positions, past_key_values=cache).logits[:, -1:].argmax(-1)

    return {"decode": _timed(steps, model)[0] / new_tokens, "kv_bytes": held}


def _timed(work: Callable[[], Any], model: torch.nn.Module) -> tuple[float, Any]:
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    result = work()
    wait()
    return time.perf_counter() - start, result


def table(result: dict[str, Any], title: str) -> Table:
    """Each part: full, pruned, their ratio, and the ratio that was possible."""
    rows = Table(
        title=title, caption="gain = full / pruned; possible = full / the same model on a natively short prompt"
    )
    for column in ("", "full", "pruned", "gain", "possible"):
        rows.add_column(column, justify="right" if column else "left")
    full, pruned, limit = result["full"], result["pruned"], result["limit"]
    for part in PARTS:
        ours = pruned.get(part)
        unit, scale = ("MiB", 2**-20) if part == "kv_bytes" else ("ms", 1e3)
        name = {"kv_bytes": "KV cache", "decode": "decode, a token", "score": "of which scoring"}.get(part, part)
        known = [f"{full[part] * scale:.1f} {unit}" if part in full else "", f"{ours * scale:.2f} {unit}"]
        ratios = [f"{full[part] / x[part]:.2f}x" if part in full and part in x else "" for x in (pruned, limit)]
        rows.add_row(name, *known, *ratios)
    return rows
