"""Under torch.autocast, as Trainer(bf16=True) runs a model: what is seen and chosen is so in float32."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from models import prompt
from table import BATCHES, METHODS

import vtc
from vtc.methods.tome import matches
from vtc.observe import ReceivedAttention, TextRow
from vtc.select import top_k
from vtc.stage import Method, Stage


@pytest.mark.parametrize("batch", ["single", "mixed"])
@pytest.mark.parametrize("setting", METHODS)
@torch.no_grad()
def test_every_method_runs_under_autocast(llava, setting, batch):
    images, pad = BATCHES[batch]
    with vtc.compressed(llava, *METHODS[setting]) as trace, torch.autocast("cpu", torch.bfloat16):
        logits = llava(**prompt(llava, images, pad=pad)).logits
    assert logits.isfinite().all()
    assert trace.average_tokens.sum() < sum(trace.sizes)
    assert all(stage.scores is None or stage.scores.dtype == torch.float32 for stage in trace.stages)


FEATURES = torch.randn(3, 40, 40, generator=torch.Generator().manual_seed(0))
PRODUCT = FEATURES @ FEATURES


@dataclass(frozen=True)
class Exact(Method):
    """All that a paper's author writes, its rows, scores and selections, multiplies as it does outside autocast."""

    name: ClassVar[str] = "exact"

    def stages(self, shape):
        return tuple(Stage(need.before * (not need.tower), self.score, (need,), self.select) for need in NEEDS)

    def ratios(self):
        return 0.8, 0.5

    def score(self, seen):
        assert torch.equal(FEATURES @ FEATURES, PRODUCT)
        return seen.valid.float()

    def select(self, scores, seen, keep):
        assert torch.equal(FEATURES @ FEATURES, PRODUCT)
        return top_k(scores, seen, keep)


@dataclass(frozen=True)
class TowerProduct(ReceivedAttention):
    def row(self, record, context):
        assert torch.equal(FEATURES @ FEATURES, PRODUCT)
        return super().row(record, context)


@dataclass(frozen=True)
class DecoderProduct(TextRow):
    def row(self, record, context):
        assert torch.equal(FEATURES @ FEATURES, PRODUCT)
        return super().row(record, context)


NEEDS = TowerProduct(2), DecoderProduct(2)


@torch.no_grad()
def test_rows_scores_and_selections_are_as_outside_autocast(llava):
    with vtc.compressed(llava, Exact(), None) as trace, torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(FEATURES @ FEATURES, PRODUCT)
        llava(**prompt(llava, (2, 0, 1)))
    assert trace.tokens_per_layer[0].tolist() == [58, 58, 36, 36, 36, 36]


def test_matches_of_float32_keys_are_as_outside_autocast():
    key = torch.randn(4, 65, 32, generator=torch.Generator().manual_seed(0)).repeat(1, 4, 1)
    key = key + 1e-3 * torch.randn(key.shape, generator=torch.Generator().manual_seed(1))
    expected = matches(key, 60, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(matches(key, 60, 1), expected)
