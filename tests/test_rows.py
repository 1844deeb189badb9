"""Rows of a cache that are changed, written down or reset."""

import copy

import pytest
import torch
from bare import COPIES, SHORT
from models import FAMILIES, prompt
from table import METHODS, SITES
from transformers import DynamicCache, StaticCache

import vtc
from vtc.methods.vtc_cls import VtcCls

ROW_CHANGES = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "select by mask": (lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "twice": (lambda cache: (cache.batch_repeat_interleave(2), cache.reorder_cache(torch.tensor([5, 1, 3, 0, 2, 4]))),
              [2, 0, 1, 0, 1, 2]),
}  # fmt: skip
CACHED = ["llava", "llava_next", "gemma3", "internvl", "paligemma2"]
"""Families whose next step needs nothing but the cache, two of them with sliding windows."""
PRUNING = {**{name: METHODS[name] for name in SITES}, "contiguous": (VtcCls(positions="contiguous"), 0.4)}


CHANGED = [("llava", setting, change, False) for setting in PRUNING for change in ROW_CHANGES]
CHANGED += [(name, setting, "twice", True) for name in CACHED for setting in PRUNING]


@pytest.mark.parametrize(("name", "setting", "change", "unwrapped"), CHANGED)
def test_rows_of_a_cache_take_their_state_along(name, setting, change, unwrapped):
    model, steps = FAMILIES[name].model, torch.tensor([[7, 8], [9, 10], [11, 12]])
    inputs = prompt(model, (2, 1, 0))
    apply, order = ROW_CHANGES[change]
    vtc.wrap(model, *PRUNING[setting])
    with torch.no_grad():
        cache = model(**inputs).past_key_values
        twin = copy.deepcopy(cache)
        expected = [model(input_ids=steps[:, n : n + 1], past_key_values=twin).logits for n in range(2)]
        if unwrapped:  # what is done to the cache meanwhile is the cache's
            vtc.unwrap(model)
        apply(cache)
        vtc.wrap(model, *PRUNING[setting])
        got = [model(input_ids=steps[order, n : n + 1], past_key_values=cache).logits for n in range(2)]
    vtc.unwrap(model)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("budget", [0.6, 1.0])
@pytest.mark.parametrize("method", ["tally", "vtc-cls", "fastv", "snapkv", "mikv", "tokenselect"])
@torch.no_grad()
def test_a_cache_that_is_written_down_goes_on(llava, method, budget):
    inputs, steps = prompt(llava, (2, 1)), torch.tensor([[7, 8], [9, 10]])
    vtc.wrap(llava, method, budget)
    cache = llava(**inputs).past_key_values
    others, seconds = [write(cache) for write in COPIES.values()], cache.vtc.trace.seconds

    def decoded(cache):
        return [llava(input_ids=steps[:, n : n + 1], past_key_values=cache).logits for n in range(2)]

    expected = decoded(cache)
    for other in others:
        assert type(other) is type(cache)
        assert other.vtc.trace.seconds == pytest.approx(seconds)
        assert all(map(torch.equal, decoded(other), expected))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("setting", PRUNING)
def test_a_cache_that_is_reset_is_new(llava, setting, kind):
    def fresh():
        return DynamicCache() if kind == "dynamic" else StaticCache(config=llava.config.text_config, max_cache_len=140)

    first, second = prompt(llava, (2, 1), seed=1), prompt(llava, (0, 0), seed=2, length=11)
    bare = llava.generate(**second, **SHORT, past_key_values=fresh())
    again = llava.generate(**first, **SHORT, past_key_values=fresh())
    vtc.wrap(llava, *PRUNING[setting])
    expected = llava.generate(**first, **SHORT, past_key_values=fresh())
    cache = fresh()
    for _ in range(2):
        assert torch.equal(llava.generate(**first, **SHORT, past_key_values=cache), expected)
        cache.reset()
        assert not vars(cache).keys() & {"vtc", "reset", "reorder_cache", "get_seq_length", "get_query_offset"}
        assert cache.get_seq_length() == 0
    assert torch.equal(llava.generate(**second, **SHORT, past_key_values=cache), bare)
    cache.reset()
    llava.generate(**first, **SHORT, past_key_values=cache)
    vtc.unwrap(llava)
    cache.reset()
    assert torch.equal(llava.generate(**first, **SHORT, past_key_values=cache), again)
