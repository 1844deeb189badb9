"""Cases drawn at random: no answer that the masking oracle does not give, no exception without a sentence of its own.

The suite runs 300 of them; `python tests/test_fuzz.py 5000 [first]` runs that many and says what it met.
"""

from __future__ import annotations

import copy
import functools
import linecache
import random
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from models import FAMILIES, batch, family, rows, visual
from transformers import DynamicCache
from transformers.cache_utils import QuantizedLayer

import vtc
from vtc.methods.fastv import FastV
from vtc.methods.random import Random
from vtc.methods.tally import Tally
from vtc.methods.tome import ToMe
from vtc.methods.transprune import TransPrune
from vtc.methods.uniform import Uniform
from vtc.methods.vflowopt import VFlowOpt
from vtc.methods.vtc_cls import VtcCls

CHUNKS, CASES = 10, 300


@dataclass(frozen=True)
class Case:
    """One wrapped model and one way to use it."""

    seed: int
    family: str
    method: vtc.Method
    budget: int | float | None
    images: tuple[int | str, ...]
    """Of each row: a number, or letters for images and videos."""
    pad: str
    hidden: str
    """What the attention mask hides beside the padding."""
    mode: Callable[[Case, Any, dict, list], list]
    half: bool
    flags: tuple[tuple[str, object], ...]
    """Options of a plain forward."""

    @classmethod
    def draw(cls, seed: int) -> Case:
        pick = random.Random(seed)
        name = pick.choice(list(FAMILIES))
        mode = pick.choice(MODES)
        contents = [0, 1, 1, 2, *(["v", "iv"] if FAMILIES[name].video else [])]
        flags = {
            "logits_to_keep": pick.choice([0, 0, 1, 3, 1000]),
            "output_hidden_states": pick.choice([None, None, True, [0, 3], -1]),
            "use_cache": pick.choice([True, True, False]),
        }
        return cls(
            seed,
            name,
            _method(pick),
            pick.choice([None, 1.0, 0, 1, 2, 7, 30, 1000, *(pick.uniform(0.02, 1.0) for _ in range(6))]),
            tuple(pick.choice(contents) for _ in range(pick.choice([1, 1, 2, 3]))),
            pick.choice(["left", "right"]) if mode is forward else "left",
            pick.choice(["nothing", "nothing", "image", "holes", "holes everywhere", "images", "row"]),
            mode,
            pick.random() < 0.1,
            tuple(flags.items()),
        )

    def inputs(self, model) -> tuple[list, dict]:
        """The rows, and their batch under its attention mask."""
        parts = rows(model, self.images, length=4 + self.seed % 5, seed=self.seed % 7)
        inputs = batch(model, parts, pad=self.pad)
        mask, shown = inputs["attention_mask"].clone(), visual(inputs["input_ids"])
        dice = torch.rand(mask.shape, generator=torch.Generator().manual_seed(self.seed))
        if self.hidden == "image":
            mask[shown & (shown.cumsum(1) <= 36)] = 0
        elif self.hidden == "holes":
            mask[shown & (dice < 0.4)] = 0
        elif self.hidden == "holes everywhere":
            mask[:, :-1][dice[:, :-1] < 0.2] = 0
        elif self.hidden == "images":
            mask[shown] = 0
        elif self.hidden == "row":
            mask[0] = 0
        return parts, {**inputs, "attention_mask": mask}


def _method(pick: random.Random) -> vtc.Method:
    """A method with settings within their meaning."""
    kinds = ["random", "uniform", "vtc-cls", "vtc-cls", "fastv", "fastv", "transprune", "tome", "vflowopt", "tally"]
    kind = pick.choice(kinds)
    if kind == "random":
        return Random(seed=pick.randrange(5))
    if kind == "uniform":
        return Uniform()
    if kind == "vtc-cls":
        return VtcCls(
            layers=pick.choice([None, 1, 2]),
            positions=pick.choice(["original"] * 3 + ["contiguous"]),
            tiles=pick.choice(["compete", "even"]),
        )
    if kind == "fastv":
        return FastV(layer=pick.choice([None, 1, 3, 5]), ratio=pick.choice([0.2, 0.5, 0.9]))
    if kind == "transprune":
        layers = tuple(sorted(pick.sample(range(1, 6), 3)))
        return TransPrune(alpha=pick.choice([0.0, 0.5, 1.0]), layers=pick.choice([None, layers]))
    if kind == "tome":
        return ToMe()
    if kind == "tally":
        return Tally(power=pick.choice([1.0, 2.0]), layer=pick.choice([None, 1, 5]))
    return VFlowOpt(cell=pick.choice([0.3, 0.5]), threshold=1.2, alpha=pick.choice([0.0, 0.3]))


# -- what a case does: what was seen and what the oracle says, to be compared -----------------------------------------


def forward(case: Case, model, inputs: dict, parts: list) -> list:
    flags = dict(case.flags)
    inputs = _placed(model, inputs)
    with torch.no_grad():
        out = model(**inputs, **flags)
    trace = _traced(model)
    shape, wanted = inputs["input_ids"].shape, flags["logits_to_keep"] or inputs["input_ids"].shape[1]
    assert out.logits.shape[:2] == (shape[0], min(shape[1], wanted))
    for states in out.get("hidden_states") or ():
        assert states is None or states.shape[:2] == shape
    expected = _masked(model, trace, inputs, inputs["input_ids"][:, :0])[:, -wanted:]
    stays = oracle.visible_keys(model, trace, inputs)[-1][:, -wanted:]
    return [(out.logits[stays], expected[stays])]


def generate(case: Case, model, inputs: dict, parts: list, **options) -> list:
    out = model.generate(**inputs, **GREEDY, **options, return_dict_in_generate=True, output_logits=True)
    return [_answers(model, _traced(model), inputs, out.sequences, out.logits)]


def static(case: Case, model, inputs: dict, parts: list) -> list:
    return generate(case, model, inputs, parts, cache_implementation="static")


def guesses(case: Case, model, inputs: dict, parts: list) -> list:
    ids = inputs["input_ids"][:1].clone()
    ids[0, -4:-2] = ids[0, -2:]  # an n-gram to guess from
    parts = [copy.copy(parts[0])]
    parts[0].ids = parts[0].ids[:-4] + ids[0, -4:].tolist()
    alone = batch(model, parts)
    guessed, expected = (model.generate(**alone, **GREEDY, prompt_lookup_num_tokens=tokens) for tokens in (3, None))
    if _dropped_nothing(model):  # a guess joins PaliGemma's prefix then, as it does in the bare model
        expected = vtc.unwrap(model).generate(**alone, **GREEDY, prompt_lookup_num_tokens=3)
    return [(guessed, expected)]


def beams(case: Case, model, inputs: dict, parts: list) -> list:
    width = 2 + case.seed % 2
    options = {"num_beams": width, "length_penalty": 0.0, "max_new_tokens": 4, "do_sample": False}
    out = model.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
    trace = _traced(model)

    class Rows:
        depth = trace.depth

        def alive(self, layer):
            return trace.alive(layer)[::width]

    length = inputs["input_ids"].shape[1]
    new = out.sequences[:, length:]
    full = _masked(model, Rows(), inputs, new)[:, length - 1 : -1].log_softmax(-1)
    chosen, real = full.gather(2, new[..., None])[..., 0].sum(1), inputs["attention_mask"].any(1)
    return [(out.sequences_scores[real], chosen[real])]


def second_turn(case: Case, model, inputs: dict, parts: list) -> list:
    if family(model).first_position is None and case.hidden != "nothing":
        return []  # transformers itself goes on from another position where the mask has holes
    out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    trace, count = _traced(model), len(inputs["input_ids"])
    question = torch.randint(7, 90, (count, 4), generator=torch.Generator().manual_seed(case.seed))
    mask = torch.cat((inputs["attention_mask"], torch.ones(count, GREEDY["max_new_tokens"] + 4).long()), dim=1)
    again = model.generate(
        input_ids=torch.cat((out.sequences, question), dim=1),
        attention_mask=mask,
        past_key_values=out.past_key_values,
        **GREEDY,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return [_answers(model, trace, inputs, again.sequences, again.logits)]


def second_image(case: Case, model, inputs: dict, parts: list) -> list:
    kind = family(model)
    if kind.first_position is None or kind.types == "token_type_ids" or any(oracle.windows(model)):
        return []  # transformers itself numbers or masks a second image in one more forward differently
    first, second = (rows(model, (1,), seed=case.seed + n)[0] for n in range(2))
    both = batch(model, [first + second])
    with torch.no_grad():
        cache = model(**batch(model, [first])).past_key_values
        early = _traced(model)
        late = {**batch(model, [second]), "attention_mask": both["attention_mask"]}
        out = model(**late, past_key_values=cache).logits
    trace = _traced(model)

    class Both:
        depth = trace.depth

        def alive(self, layer):
            return [torch.cat((early.alive(layer)[0], trace.alive(layer)[0] + sum(early.sizes)))]

    expected = _masked(model, Both(), both, both["input_ids"][:, :0])
    return [(out[:, -1], expected[:, -1])]


def rows_of_a_cache(case: Case, model, inputs: dict, parts: list) -> list:
    if family(model).first_position is None:
        return []  # the positions of a prompt are on the module, not with the cache
    count = len(inputs["input_ids"])
    step = torch.randint(7, 90, (count, 1), generator=torch.Generator().manual_seed(case.seed))
    order = torch.randint(0, count, (count + 1,), generator=torch.Generator().manual_seed(case.seed))
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        expected = model(input_ids=step, past_key_values=copy.deepcopy(cache)).logits[order]
        [cache.reorder_cache, cache.batch_select_indices][case.seed % 2](order)
        logits = model(input_ids=step[order], past_key_values=cache).logits
        cache.reset()
        again = model(**inputs, past_key_values=cache).logits
        fresh = model(**inputs).logits
    real = inputs["attention_mask"].any(1)
    return [(logits[real[order]], expected[real[order]]), (again[real], fresh[real])]


def cropped(case: Case, model, inputs: dict, parts: list) -> list:
    if any(oracle.windows(model)):
        return []  # a window's cache has forgotten what a crop would need
    count = len(inputs["input_ids"])
    draw = torch.Generator().manual_seed(case.seed)
    step, more = (torch.randint(7, 90, (count, n), generator=draw) for n in (1, 3))
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        expected = model(input_ids=step, past_key_values=copy.deepcopy(cache)).logits
        model(input_ids=more, past_key_values=cache)
        cache.crop(-3)
        logits = model(input_ids=step, past_key_values=cache).logits
    real = inputs["attention_mask"].any(1)
    return [(logits[real], expected[real])]


class Int8Layer(QuantizedLayer):
    """Keys and values as int8 with one scale a token and head."""

    def _quantize(self, tensor, axis):
        scale = tensor.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, tensor):
        return tensor[0] * tensor[1]


def quantised(case: Case, model, inputs: dict, parts: list) -> list:
    """Near the logits of the cache that is not; how near is another test's."""
    if any(oracle.windows(model)):
        return []  # transformers has no quantised sliding window
    cache = DynamicCache()
    cache.layers = [Int8Layer(residual_length=4) for _ in oracle.layers(model)]
    out = model.generate(**inputs, **GREEDY, past_key_values=cache, return_dict_in_generate=True, output_logits=True)
    assert torch.stack(out.logits)[:, inputs["attention_mask"].any(1)].isfinite().all()
    return []


GREEDY = {"do_sample": False, "max_new_tokens": 4}
MODES = [
    *(forward, forward, generate, generate, static, guesses, beams, second_turn, second_image, rows_of_a_cache),
    *(cropped, quantised),
]


def _placed(model, inputs: dict) -> dict:
    """With positions along the line, as generate() gives them; also in three axes, where transformers cannot number
    a prompt whose images are hidden."""
    mask, first = inputs["attention_mask"], family(model).first_position
    positions = (mask.cumsum(1) - 1 + (first or 0)).masked_fill(mask == 0, first or 0)
    return {**inputs, "position_ids": positions if first is not None else positions.expand(3, -1, -1)}


def _traced(model):
    return model.vtc.trace if "vtc" in vars(model) else None


def _dropped_nothing(model) -> bool:
    trace = _traced(model)
    return trace is not None and all(stage.kept.equal(stage.valid) for stage in trace.stages)


def _masked(model, trace, inputs: dict, new):
    """The oracle's logits: those of the bare model with the dropped keys masked."""
    return oracle.masked_logits(vtc.unwrap(model), trace, inputs, new)


def _answers(model, trace, inputs: dict, sequences, logits) -> tuple:
    """The logits of generated tokens, and those of the masked model."""
    new = sequences[:, inputs["input_ids"].shape[1] :]
    expected = _masked(model, trace, inputs, new[:, :-1])[:, -len(logits) :]
    real = inputs["attention_mask"].any(1)  # of a row of nothing, nothing is promised
    return torch.stack(logits, dim=1)[real], expected[real]


@functools.cache
def _half(name: str):
    return FAMILIES[name].build().to(torch.bfloat16)


def is_sentence(error: Exception) -> bool:
    """Whether vtc itself raised an exception, by a statement that says what is wrong."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    inside = Path(frame.filename).is_relative_to(Path(vtc.__file__).parent)
    raised = linecache.getline(frame.filename, frame.lineno).strip().startswith("raise ")
    return inside and raised and isinstance(error, ValueError | RuntimeError | TypeError) and len(str(error)) > 20


def check(case: Case) -> str:
    """Run a case. Returns what came of it; raises AssertionError for what must not."""
    model = _half(case.family) if case.half else FAMILIES[case.family].model
    parts, inputs = case.inputs(model)
    if case.half:
        inputs = {name: x.to(torch.bfloat16) if x.is_floating_point() else x for name, x in inputs.items()}
        parts = [copy.deepcopy(part) for part in parts]
        for item in (item for part in parts for item in part.items):
            tensors = item.tensors.items()
            item.tensors = {name: x.to(torch.bfloat16) if x.is_floating_point() else x for name, x in tensors}
    exact = not case.method.merges and not case.half and getattr(case.method, "positions", "") != "contiguous"
    try:
        try:
            vtc.wrap(model, case.method, case.budget)
            pairs = case.mode(case, model, inputs, parts)
        finally:
            vtc.unwrap(model)
    except AssertionError:
        raise
    except Exception as error:
        if is_sentence(error):
            return f"refused: {type(error).__name__}"
        if not _bare_raises(case, model, inputs, parts, error):
            raise AssertionError(f"{case}: {error!r}") from error
        return f"bare, too: {type(error).__name__}"
    for got, expected in pairs if exact else []:
        torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3, msg=lambda text: f"{case}: {text}")
    return case.mode.__name__ if exact else f"{case.mode.__name__}, ran"


def _bare_raises(case: Case, model, inputs: dict, parts: list, error: Exception) -> bool:
    """Whether the untouched model raises the same for the same call."""
    try:
        case.mode(case, model, inputs, parts)
    except Exception as own:
        return type(own) is type(error) and str(own) == str(error)
    return False


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_cases_drawn_at_random(chunk):
    met = Counter(check(Case.draw(seed)) for seed in range(chunk, CASES, CHUNKS))
    assert sum(met[mode.__name__] for mode in MODES if mode.__name__ in met) > CASES // CHUNKS // 3, (
        met
    )  # not all refused


@pytest.mark.parametrize("seed", [2655])
def test_cases_that_were_wrong_once(seed):
    """2655: a static cache's mask, cut by sliding windows, was taken for what the prompt's mask hides."""
    assert check(Case.draw(seed)) == "static"


def main() -> None:
    count, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0
    met, wrong = Counter(), 0
    warnings.simplefilter("ignore")
    for seed in range(first, first + count):
        try:
            met[check(Case.draw(seed))] += 1
        except AssertionError as error:
            wrong += 1
            print(f"seed {seed}: {str(error)[:600]}\n", flush=True)
    print(f"{count} cases, {wrong} wrong")
    for what, times in met.most_common():
        print(f"{times:6d} {what}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
