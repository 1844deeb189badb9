"""The table that every method and every family is in.

A method enters by itself, from `vtc.list_methods()`; a line here adds settings that are harder on it. What every
setting meets on every batch, on the first family, are the promises that a method can break (`every_setting`); all else
is met by the settings that are written down here, and on the other families by one of each kind. The smoke test of
`test_promises.py` takes every setting through every family once.
"""

from __future__ import annotations

import torch
from models import FAMILIES

import vtc
from vtc.budget import counts
from vtc.methods.atp import Atp
from vtc.methods.fastv import FastV
from vtc.methods.random import Random
from vtc.methods.tally import Tally
from vtc.methods.tokenbutler import TokenButler
from vtc.methods.tome import ToMe
from vtc.methods.transprune import TransPrune
from vtc.methods.uniform import Uniform
from vtc.methods.vflowopt import VFlowOpt
from vtc.methods.vtc_cls import VtcCls
from vtc.stage import Cache, Shape

torch.manual_seed(0)
SHAPE = Shape(6, 4, key_heads=2)
"""Of the first family's model; each image of it has 36 tokens."""
ATP = Atp(layers=(1, 3), rates=(0.0625, 0.0625)).untrained(SHAPE, 16)
ATP.modules.eval().requires_grad_(False)
BUTLER = TokenButler().untrained(SHAPE, 32)
BUTLER.modules.eval().requires_grad_(False)

HARD = {  # from easy to hard settings
    "random-half": (Random(), 0.5),
    "random-one": (Random(seed=1), 1),
    "uniform": (Uniform(), 0.25),
    "tome": (ToMe(), 0.4),
    "tally": (Tally(layer=2), 0.4),
    "tally-native": (Tally(power=1.5), None),
    "tally-whole": (Tally(power=1.0), 0.25),
    "vtc-cls": (VtcCls(), 0.4),
    "vtc-cls-ensemble": (VtcCls(layers=3), 5),
    "fastv-native": (FastV(), None),
    "fastv-early": (FastV(layer=1), 0.3),
    "fastv-late": (FastV(layer=4, ratio=0.9), None),
    "atp": (ATP, None),
    "tokenbutler": (BUTLER, 0.4),
    "vflowopt-late": (VFlowOpt(retain=(1.0, 0.6, 0.5), threshold=1.2), None),
    "vflowopt": (VFlowOpt(alpha=0.3, cell=0.4), 0.4),
    "vflowopt-plain": (VFlowOpt(cell=0.4, threshold=1.2), 0.4),
    "transprune-high": (TransPrune(), None),
    "transprune-ttv": (TransPrune(alpha=1.0, layers=(1, 3, 4)), 0.4),
    "chain": (vtc.Chain(VtcCls(), FastV(layer=3)), 0.4),
    "modified": (vtc.find_method("vtc-cls@sinks+fastv@debias"), 0.4),
}
ONLY_DROPS = {"vflowopt-late"}
"""Settings that merge nothing, of methods that do."""


def by_itself(kind: type[vtc.Method]) -> tuple[vtc.Method, float | None]:
    """A method as it is listed, at 40 % of the tokens or, where that is out of its reach, half way to its floor.

    One that decides by itself how many tokens stay is left to itself.
    """
    method = kind()
    if method.adaptive:
        return method, None
    try:
        counts(method, 36, 0.4, SHAPE)
    except vtc.BudgetError as error:
        return method, round((1 + error.floor) / 2, 2)
    return method, 0.4


METHODS = HARD | {
    name: by_itself(kind)
    for name, kind in vtc.list_methods().items()
    if name not in {method.name for method, _ in HARD.values()}
    and not any(isinstance(stage.site, Cache) for stage in kind().stages(SHAPE))  # those are in test_cache_site.py
}
"""Every setting. A method that has to be trained needs a line with its modules."""


def merges(setting: str) -> bool:
    """Whether a setting does more than drop: for it masking is no oracle."""
    return METHODS[setting][0].merges and setting not in ONLY_DROPS


BATCHES = {  # images of each row, padding side
    "single": ((1,), None),
    "two-images": ((2,), None),
    "left-padded": ((1, 1, 1), "left"),
    "right-padded": ((1, 1, 1), "right"),
    "mixed": ((2, 0, 1), "left"),
    "video": (("iv", "v"), "left"),
}

EACH_KIND = ("uniform", "vtc-cls", "fastv-early", "atp", "vflowopt-plain", "transprune-high", "tally")
"""One setting for each kind of stage and of observation."""
SITES = ("vtc-cls", "fastv-early", "transprune-high")
"""One before the decoder, one early in it and one at two of its layers."""
EACH_SITE = ("vtc-cls", "fastv-early")
"""One setting that drops before the decoder and one that drops within it."""


def every_setting(test):
    """Decorator: on the first family the test meets every setting, not only those that are written down."""
    test.settings = list(METHODS), EACH_KIND
    return test


def each_site(test):
    """Decorator: the test meets one setting of each kind, and outside the first family one a site."""
    test.settings = EACH_KIND, EACH_SITE
    return test


def settings(family: str, test) -> list[str]:
    """The settings that a family meets a test with."""
    first, other = getattr(test, "settings", (list(HARD), EACH_KIND))
    return list(first if family == "llava" else other)


def batches(family: str) -> list[str]:
    """The batches that a family is tested with: those with videos where it has them."""
    if family == "llava":
        return [name for name in BATCHES if name != "video"]
    return ["single", "right-padded", "mixed", *(["video"] if FAMILIES[family].video else [])]


def parametrize(metafunc) -> None:
    """A `pytest_generate_tests`: a test that takes `model`, `method` and `inputs` meets the table's whole product."""
    names = [name for name in ("model", "method", "inputs") if name in metafunc.fixturenames]
    if "model" not in names:
        return
    cells = [
        [family, *rest]
        for family in FAMILIES
        for rest in _product(
            settings(family, metafunc.function) if "method" in names else [],
            batches(family) if "inputs" in names else [],
        )
    ]
    metafunc.parametrize(names, cells, ids=["-".join(cell) for cell in cells], indirect=True)


def _product(*lists: list[str]) -> list[tuple[str, ...]]:
    result = [()]
    for values in lists:
        result = [(*head, value) for head in result for value in values] if values else result
    return result
