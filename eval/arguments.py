"""What a command line or a task file asks of the model `vtc` of lmms-eval: passed on, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import vtc
from vtc.methods.compose import with_budget

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "top_h", "epsilon_cutoff", "eta_cutoff")
DECODING = (
    *SAMPLING,
    *("do_sample", "num_beams", "length_penalty", "early_stopping"),
    *("max_new_tokens", "min_new_tokens", "max_length", "min_length", "max_time", "eos_token_id"),
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "suppress_tokens", "begin_suppress_tokens"),
    *("exponential_decay_length_penalty", "renormalize_logits", "remove_invalid_values", "sequence_bias"),
    *("use_cache", "cache_implementation", "prompt_lookup_num_tokens"),
)
"""Options of `generate` that leave one reply a question."""
STOPS = ("until", "stop_strings")
NOT_A_STOP = "\n\n"
"""lmms-eval puts it in where a task names no stop; it would cut answers off after their first paragraph."""
ELSEWHERE = ("image_aspect_ratio",)
"""For the original LLaVA's code: here the checkpoint's processor decides."""


def generation(asked: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `generate` for a task file's or --gen_kwargs' `asked`, and "until": strings that end a reply.

    Greedy unless there is a temperature or `do_sample`. Raises ValueError for what `generate` does not take.
    """
    asked = {name: value for name, value in asked.items() if value is not None and name not in ELSEWHERE}
    given = [asked.pop(name) for name in STOPS if name in asked]
    stops = [stop for one in given for stop in ([one] if isinstance(one, str) else one)]
    if unknown := sorted(set(asked) - set(DECODING)):
        raise ValueError(f"generation takes no {', '.join(unknown)}; it takes {', '.join((*sorted(DECODING), *STOPS))}")
    sampled = asked.pop("do_sample", asked.get("temperature", 0) > 0) and asked.get("temperature", 1) > 0
    length = {} if "max_length" in asked else {"max_new_tokens": 1024}
    options = {**length, "num_beams": 1, **{k: v for k, v in asked.items() if sampled or k not in SAMPLING}}
    if sampled:
        options["do_sample"] = True
    if until := tuple(stop for stop in dict.fromkeys(stops) if stop and stop != NOT_A_STOP):
        options["until"] = until
    return options


def method(name: str | vtc.Method, given: Mapping[str, Any]) -> vtc.Method:
    """A method by name, JSON file or as it is, with the hyper-parameters that were `given`; lists as "[7,9,12]".

    Raises ValueError for an unknown method, TypeError for hyper-parameters that it does not have.
    """
    found = vtc.find_method(name)
    known = [field.name for field in fields(found) if field.init and field.name != "modules"]
    if unknown := sorted(set(given) - set(known)):
        raise TypeError(f"{found.name} has no {', '.join(unknown)}; it has {', '.join(known) or 'no hyper-parameter'}")
    return found.tuned({name: _value(value) for name, value in given.items()})


def _value(given: Any) -> Any:
    return tuple(json.loads(given)) if isinstance(given, str) and given.startswith("[") else given


def budget(given: int | float | str | None, method: str | vtc.Method | None = None) -> int | float | None:
    """A budget as the command line takes it: 64, 0.25 or "25%"; where none is given what the method's file names."""
    if given is None and method is not None:
        return with_budget(method)[1]
    if not isinstance(given, str):
        return given
    try:
        return float(given.removesuffix("%")) / 100 if given.endswith("%") else float(given)
    except ValueError:
        raise ValueError(f"{given!r} is no budget: use tokens (64), a fraction (0.25) or a percentage (25%)") from None


def batch_size(given: int | str) -> int:
    """How many questions are asked at once. Raises ValueError for anything but a whole number, such as "auto"."""
    if not str(given).isdecimal() or int(given) < 1:
        raise ValueError(f"batch_size={given}: vtc does not search for one, give it a whole number")
    return int(given)
