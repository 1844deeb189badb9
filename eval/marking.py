"""When an answer is right: what results.jsonl holds was decided here."""

from __future__ import annotations


def normalise(answer: str) -> str:
    """Lower case, no surrounding space, no final period."""
    return answer.strip().lower().removesuffix(".").strip()


def is_correct(prediction: str, answer: str) -> bool:
    """Exact match after `normalise`."""
    return normalise(prediction) == normalise(answer)
