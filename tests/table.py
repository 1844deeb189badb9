"""The table that every method and every family is in: a new one inherits all behaviour tests by a line here."""

from __future__ import annotations

import torch
from models import llava

from vtc.methods.atp import Atp
from vtc.methods.fastv import FastV
from vtc.methods.random import Random
from vtc.methods.transprune import TransPrune
from vtc.methods.uniform import Uniform
from vtc.methods.vflowopt import VFlowOpt
from vtc.methods.vtc_cls import VtcCls
from vtc.stage import Shape

FAMILIES = {"llava": llava}

torch.manual_seed(0)
ATP = Atp(layers=(1, 3), rates=(0.0625, 0.0625)).untrained(Shape(6, 4), 16)
ATP.modules.eval().requires_grad_(False)

METHODS = {  # from easy to hard settings
    "random-half": (Random(), 0.5),
    "random-one": (Random(seed=1), 1),
    "uniform": (Uniform(), 0.25),
    "vtc-cls": (VtcCls(), 0.4),
    "vtc-cls-ensemble": (VtcCls(layers=3), 5),
    "fastv-native": (FastV(), None),
    "fastv-early": (FastV(layer=1), 0.3),
    "fastv-late": (FastV(layer=4, ratio=0.9), None),
    "atp": (ATP, None),
    "vflowopt-late": (VFlowOpt(retain=(1.0, 0.6, 0.5), threshold=1.2), None),
    "vflowopt": (VFlowOpt(alpha=0.3, cell=0.4), 0.4),
    "transprune-high": (TransPrune(), None),
    "transprune-ttv": (TransPrune(alpha=1.0, layers=(1, 3, 4)), 0.4),
}

MERGING = {"vflowopt"}
"""Those that do more than drop: for them masking is no oracle."""

BATCHES = {  # images of each row, padding side
    "single": ((1,), None),
    "two-images": ((2,), None),
    "left-padded": ((1, 1, 1), "left"),
    "right-padded": ((1, 1, 1), "right"),
    "mixed": ((2, 0, 1), "left"),
}
