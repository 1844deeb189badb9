"""One comparison as JSON: what the API returns, what the page lets one download, and what its viewer draws from."""

from __future__ import annotations

import platform
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from vtc.demo.asking import Answer, Asked, HandPicked, Pair
from vtc.demo.view import fates
from vtc.stage import Method


def record(model: str, device: str, asked: Asked, pair: Pair, truth: str | None) -> dict[str, Any]:
    """Settings, answers, figures, and what became of each visual token (see `view.fates`)."""
    picked = isinstance(asked.method, HandPicked)
    return {
        "model": model,
        "device": device,
        "versions": versions(),
        "images": [{"name": picture.name, "size": picture.image.size} for picture in asked.pictures],
        "question": asked.question,
        "truth": truth,
        "method": asked.method.name,
        "settings": {} if picked else hyper_parameters(asked.method),
        "budget": asked.budget,
        "answers": {"full": _answer(pair.full), "compressed": _answer(pair.compressed)},
        "speed": pair.why,
        "tokens": sum(pair.trace.sizes),
        "tokens_per_layer": pair.trace.tokens_per_layer[0].tolist(),
        "kept": pair.trace.kept()[0].tolist(),
        **fates(pair.trace),
    }


def hyper_parameters(method: Method) -> dict[str, Any]:
    """What a method was set to, as far as it is data."""
    assert is_dataclass(method)
    plain = (bool, int, float, str, tuple, type(None))
    return {field.name: value for field in fields(method) if isinstance(value := getattr(method, field.name), plain)}


def _answer(answer: Answer) -> dict[str, Any]:
    """With milliseconds in the place of seconds."""
    figures = asdict(answer)
    for name in ("prefill", "decode"):
        seconds = figures.pop(name)
        figures[f"{name}_ms"] = None if seconds is None else round(1e3 * seconds, 3)
    return figures


@cache
def versions() -> dict[str, str]:
    """Of Python and of the packages that make the answer."""
    import vtc

    found = {"python": platform.python_version(), "vtc": vtc.__version__}
    for package in ("torch", "transformers", "gradio"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # built from source without metadata
            found[package] = "unknown"
    return found
