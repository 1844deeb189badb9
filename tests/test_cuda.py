"""On a GPU: how often a wrapped model waits for the device, and products of half precision. The rest is for CPUs."""

import warnings

import pytest
import torch
from models import llava, prompt

import vtc
from vtc.methods.tokenselect import in_full

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="waiting for the device needs a GPU")


def waits(work) -> int:
    """How often `work` waits for the GPU, as torch counts it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("method", ["random", "vtc-cls", "fastv"])
@torch.no_grad()
def test_a_pruned_forward_waits_twice_at_prefill_and_once_at_a_step_of_ones_own(method):
    """The lengths of padded rows and the images' places go to the host before the decoder; at a later step that gets a
    mask, whether it hides what the pruned cache shows. generate() makes the masks of its steps, which are not asked.
    """
    model = llava()
    inputs = {name: x.cuda() for name, x in prompt(model, (1, 2)).items()}
    model, step = model.cuda(), torch.tensor([[7], [9]], device="cuda")
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)

    def counts() -> tuple[int, int]:
        cache = model(**inputs).past_key_values  # warms up, and makes the caches of lookups
        more = {"input_ids": step, "attention_mask": mask, "past_key_values": cache}
        return waits(lambda: model(**inputs)), waits(lambda: model(**more))

    bare = counts()
    with vtc.compressed(model, method, 0.4):
        prefill, decode = counts()
    assert prefill - bare[0] <= 2
    assert decode - bare[1] <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_of_half_precision_are_float32(dtype):
    """Beyond the range of float16, without a copy of the keys."""
    generator = torch.Generator("cuda").manual_seed(0)
    query, keys = (torch.randn(2, 3, n, 64, device="cuda", generator=generator) for n in (4, 99))
    query, keys = (40 * query).to(dtype), (60 * keys).to(dtype)
    expected = query.double() @ keys.double().transpose(2, 3)
    torch.testing.assert_close(in_full(query, keys).double(), expected, atol=1.0, rtol=1e-4)
