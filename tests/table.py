"""The table that every method and every family is in: a new one inherits all behaviour tests by a line here."""

from __future__ import annotations

import torch
from models import FAMILIES

from vtc.methods.atp import Atp
from vtc.methods.fastv import FastV
from vtc.methods.random import Random
from vtc.methods.tally import Tally
from vtc.methods.tome import ToMe
from vtc.methods.transprune import TransPrune
from vtc.methods.uniform import Uniform
from vtc.methods.vflowopt import VFlowOpt
from vtc.methods.vtc_cls import VtcCls
from vtc.stage import Shape

torch.manual_seed(0)
ATP = Atp(layers=(1, 3), rates=(0.0625, 0.0625)).untrained(Shape(6, 4), 16)
ATP.modules.eval().requires_grad_(False)

METHODS = {  # from easy to hard settings
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
    "vflowopt-late": (VFlowOpt(retain=(1.0, 0.6, 0.5), threshold=1.2), None),
    "vflowopt": (VFlowOpt(alpha=0.3, cell=0.4), 0.4),
    "vflowopt-plain": (VFlowOpt(cell=0.4, threshold=1.2), 0.4),
    "transprune-high": (TransPrune(), None),
    "transprune-ttv": (TransPrune(alpha=1.0, layers=(1, 3, 4)), 0.4),
}

MERGING = {"vflowopt", "tome", "tally"}
"""Those that do more than drop: for them masking is no oracle."""

BATCHES = {  # images of each row, padding side
    "single": ((1,), None),
    "two-images": ((2,), None),
    "left-padded": ((1, 1, 1), "left"),
    "right-padded": ((1, 1, 1), "right"),
    "mixed": ((2, 0, 1), "left"),
    "video": (("iv", "v"), "left"),
}

EACH_KIND = ("uniform", "vtc-cls", "fastv-early", "atp", "vflowopt-plain", "transprune-high", "tally")
"""One method for each kind of stage and of observation: all that is run on each family but the first."""


EACH_SITE = ("vtc-cls", "fastv-early")
"""One method that drops before the decoder and one that drops within it."""


def each_site(test):
    """Decorator: outside the first family, run the test with one method a site only."""
    test.each_site = True
    return test


def _methods(family: str, test) -> list[str]:
    """The methods that a family meets a test with."""
    return list(METHODS if family == "llava" else EACH_SITE if hasattr(test, "each_site") else EACH_KIND)


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
            _methods(family, metafunc.function) if "method" in names else [],
            batches(family) if "inputs" in names else [],
        )
    ]
    metafunc.parametrize(names, cells, ids=["-".join(cell) for cell in cells], indirect=True)


def _product(*lists: list[str]) -> list[tuple[str, ...]]:
    result = [()]
    for values in lists:
        result = [(*head, value) for head in result for value in values] if values else result
    return result
