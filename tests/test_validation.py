"""What is no method is refused in one sentence that names it: hyper-parameters in code, in JSON, and in folders."""

import json
import shutil

import pytest
import torch
from models import FAMILIES, llava
from safetensors.torch import load_file, save_file

import vtc
from vtc.grids import squares
from vtc.methods.atp import Atp
from vtc.methods.fastv import FastV
from vtc.methods.random import Random
from vtc.methods.tome import ToMe
from vtc.methods.transprune import TransPrune
from vtc.methods.vflowopt import VFlowOpt
from vtc.methods.vtc_cls import VtcCls
from vtc.stage import Shape

NAN, INF = float("nan"), float("inf")


def sentence(error) -> str:
    """The message, which has to be one line of a length that can be read."""
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 600  # all methods are named in some
    return text


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (VtcCls, "positions", "contigous"),
        (VtcCls, "tiles", "evne"),
        (VtcCls, "ensemble", None),
        (VtcCls, "layers", 0),
        (VtcCls, "layers", 2.0),
        (VtcCls, "layers", True),
        (FastV, "ratio", 5),
        (FastV, "ratio", NAN),
        (FastV, "ratio", "0.5"),
        (FastV, "layer", 0),
        (FastV, "layer", -1),
        (FastV, "layer", (2,)),
        (ToMe, "share", -1),
        (ToMe, "share", INF),
        (Random, "seed", -1),
        (Random, "seed", 2**63),
        (Random, "seed", 1.5),
        (TransPrune, "alpha", 1.01),
        (TransPrune, "keep_ratios", (0.5, 0.2)),
        (TransPrune, "keep_ratios", (0.5, 0.2, 0.1, 0.1)),
        (TransPrune, "keep_ratios", (0.5, 0.2, NAN)),
        (TransPrune, "keep_ratios", [0.5, 0.2, 0.1]),
        (TransPrune, "layers", (0, 2, 3)),
        (TransPrune, "layers", 3),
        (VFlowOpt, "cell", 1e-9),
        (VFlowOpt, "cell", 0.0),
        (VFlowOpt, "cell", 2.0),
        (VFlowOpt, "alpha", NAN),
        (VFlowOpt, "threshold", -1.0),
        (VFlowOpt, "retain", (0.5, -0.1, 0.5)),
        (VFlowOpt, "layers", (2,)),
        (Atp, "rates", (0.0, 0.1, 0.1)),
        (Atp, "rates", (0.1,)),
        (Atp, "layers", (1, 2)),
        (Atp, "sharpness", 0.0),
        (Atp, "modules", [1, 2, 3]),
    ],
)
def test_a_method_says_which_hyper_parameter_does_not_fit(kind, name, value):
    with pytest.raises(ValueError, match=rf"^{kind.name}: .*\b{name}\b") as error:
        kind(**{name: value})
    sentence(error)


ODD_FILES = {
    "": "not a JSON file",
    "{": "not a JSON file",
    "\x00\x01": "not a JSON file",
    '{"method": "fastv",}': "not a JSON file",
    "{'method': 'fastv'}": "not a JSON file",
    "[" * 100_000: "not a JSON file",
    '{"a":' * 100_000: "not a JSON file",
    "9" * 5000: "not a JSON file",
    "null": "None where a JSON object",
    "[]": "where a JSON object",
    "3": "where a JSON object",
    '"fastv"': "where a JSON object",
    '[{"method": "fastv"}]': "where a JSON object",
    "NaN": "where a JSON object",
    "{}": "method is None",
    '{"ratio": 0.5}': "method is None",
    '{"method": null}': "method is None",
    '{"method": 3}': "method is 3",
    '{"method": ["fastv"]}': "method is",
    '{"method": {"fastv": 1}}': "method is",
    '{"method": ""}': "method is ''",
    '{"method": "fast"}': "method is 'fast'.*fastv",
    '{"method": "FastV"}': "method is 'FastV'",
    '{"method": "fastv", "laier": 2}': "no 'laier', but layer, ratio",
    '{"method": "fastv", "name": "x"}': "no 'name'",
    '{"method": "fastv", "stages": []}': "no 'stages'",
    '{"method": "fastv", "__class__": 1}': "no '__class__'",
    '{"method": "uniform", "seed": 1}': "no 'seed'",
    '{"method": "fastv", "layer": "2"}': "layer",
    '{"method": "fastv", "layer": 2.0}': "layer",
    '{"method": "fastv", "layer": [2]}': "layer",
    '{"method": "fastv", "layer": {}}': "layer",
    '{"method": "fastv", "layer": true}': "layer",
    '{"method": "fastv", "layer": 0}': "layer",
    '{"method": "fastv", "layer": -3}': "layer",
    '{"method": "fastv", "layer": 1e400}': "layer",
    '{"method": "fastv", "ratio": null}': "ratio",
    '{"method": "fastv", "ratio": NaN}': "ratio",
    '{"method": "fastv", "ratio": Infinity}': "ratio",
    '{"method": "fastv", "ratio": 5}': "ratio",
    '{"method": "fastv", "ratio": "half"}': "ratio",
    '{"method": "fastv", "ratio": true}': "ratio",
    '{"method": "fastv", "ratio": [[[0.5]]]}': "ratio",
    '{"method": "random", "seed": 1.0}': "seed",
    '{"method": "random", "seed": 1e30}': "seed",
    '{"method": "random", "seed": 99999999999999999999}': "seed",
    '{"method": "random", "seed": -1}': "seed",
    '{"method": "tome", "share": -1}': "share",
    '{"method": "tome", "share": 1.5}': "share",
    '{"method": "tome", "share": []}': "share",
    '{"method": "vtc-cls", "layers": 0}': "layers",
    '{"method": "vtc-cls", "layers": 1.5}': "layers",
    '{"method": "vtc-cls", "ensemble": "median"}': "ensemble",
    '{"method": "vtc-cls", "positions": "contigous"}': "positions",
    '{"method": "vtc-cls", "tiles": ["even"]}': "tiles",
    '{"method": "transprune", "keep_ratios": [0.5]}': "keep_ratios",
    '{"method": "transprune", "keep_ratios": [0.5, 0.4, 0.3, 0.2]}': "keep_ratios",
    '{"method": "transprune", "keep_ratios": "high"}': "keep_ratios",
    '{"method": "transprune", "keep_ratios": [0.5, null, 0.3]}': "keep_ratios.1",
    '{"method": "transprune", "layers": [1, 2, "3"]}': "layers.2",
    '{"method": "transprune", "layers": []}': "layers",
    '{"method": "transprune", "alpha": -0.5}': "alpha",
    '{"method": "vflowopt", "retain": [0.5, 0.5, 2]}': "retain.2",
    '{"method": "vflowopt", "retain": {"0": 0.5}}': "retain",
    '{"method": "vflowopt", "cell": 1e-9}': "cell",
    '{"method": "vflowopt", "cell": 0}': "cell",
    '{"method": "vflowopt", "threshold": -1}': "threshold",
    '{"method": "vflowopt", "alpha": "none"}': "alpha",
    '{"method": "vflowopt", "layers": [1, 2, 3]}': "layers",
    '{"method": "atp", "modules": "rm -rf"}': "modules",
    '{"method": "atp", "rates": [0.5]}': "rates",
    '{"method": "atp", "rates": [0.5, 0.5, 0]}': "rates.2",
    '{"method": "atp", "layers": [1]}': "layers",
    '{"method": "atp", "sharpness": 0}': "sharpness",
    '{"method": "atp", "sharpness": Infinity}': "sharpness",
}


@pytest.mark.parametrize(("text", "match"), ODD_FILES.items(), ids=range(len(ODD_FILES)))
def test_an_odd_file_is_one_sentence_that_names_the_file_and_the_field(tmp_path, text, match):
    path = tmp_path / "odd.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"odd\.json.*{match}") as error:
        vtc.find_method(path)
    sentence(error)


def test_a_file_of_bytes_is_no_method(tmp_path):
    (tmp_path / "odd.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a JSON file"):
        vtc.find_method(tmp_path / "odd.json")
    with pytest.raises(OSError, match=r"none\.json"):
        vtc.find_method(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("method", "match"),
    [
        (FastV(layer=6), "within 1 to 5"),
        (FastV(layer=10**30), "within 1 to 5"),
        (TransPrune(layers=(1, 2, 6)), "within 1 to 5"),
        (TransPrune(layers=(3, 2, 1)), "ascend within 1 to 5"),
        (TransPrune(layers=(2, 2, 3)), "ascend within 1 to 5"),
        (VFlowOpt(layers=(4, 9)), "within 1 to 5"),
        (VFlowOpt(layers=(4, 4)), "within 1 to 5"),
        (Atp(layers=(1, 2, 8)).untrained(Shape(9, 1), 4), "within 1 to 5"),
        (VtcCls(layers=5), "in 1 to 4"),
    ],
)
def test_layers_beyond_the_model_are_refused_when_it_is_wrapped(method, match):
    model = FAMILIES["llava"].model
    with pytest.raises(ValueError, match=match) as error:
        vtc.wrap(model, method, 0.5)
    sentence(error)
    assert "vtc" not in vars(model)


def test_cells_finer_than_the_patches_are_the_patches():
    """However small a cell is, there are no more of them than tokens; every one has a token."""
    for cell in (0.001, 0.01, 1 / 6):
        assert squares(((6, 6), (2, 3)), cell)[0].tolist() == list(range(42))
    assert squares(((6, 6), (2, 2)), 1.0)[0].tolist() == [0] * 36 + [1] * 4


# -- folders of trained modules -------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    Atp().untrained(Shape(8, 4), 8).save_pretrained(tmp_path / "atp" / "0.25")
    return tmp_path / "atp" / "0.25"


def change_weights(folder, **changes):
    save_file(load_file(folder / "model.safetensors") | changes, folder / "model.safetensors")


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda f: (f / "model.safetensors").write_bytes(b"torn"), r"model\.safetensors does not hold 3 modules"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), r"model\.safetensors does not hold 3 modules"),
        (lambda f: save_file({}, f / "model.safetensors"), r"model\.safetensors does not hold 3 modules"),
        (lambda f: change_weights(f, more=torch.zeros(1)), r"model\.safetensors does not hold 3 modules"),
        (lambda f: change_weights(f, **{"0.mix.bias": torch.zeros(3)}), r"model\.safetensors does not hold"),
        (lambda f: change_weights(f, **{"1.mix.bias": torch.full((8,), NAN)}), r"model\.safetensors .* not finite"),
        (lambda f: change_weights(f, **{"2.mix.weight": torch.full((8, 2), INF)}), r"model\.safetensors .* not finite"),
        (lambda f: change_config(f, rates=[0.5, 0.5]), r"config\.json: atp: .*rates"),
        (lambda f: change_config(f, rates=[0.5] * 4, layers=[1, 2, 3, 4]), "does not hold 4 modules"),
        (lambda f: change_config(f, width=10**12), r"config\.json: atp has no 'width'"),
        (lambda f: change_config(f, sharpness=NAN), r"config\.json: atp: sharpness"),
        (lambda f: (f / "config.json").write_text("[]"), r"config\.json holds \[\]"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json is not a JSON file"),
    ],
)
def test_a_damaged_folder_of_modules_is_named(folder, damage, match):
    damage(folder)
    with pytest.raises(ValueError, match=match):
        Atp.from_pretrained(folder)


def test_what_is_missing_is_an_error_of_the_file_system(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        Atp.from_pretrained(folder)


def test_a_model_from_nowhere_never_loads_the_working_directory(folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    model = llava(layers=8)
    model.config._name_or_path = ""
    with pytest.raises(ValueError, match=r"this model has modules for none, not for 0\.25"):
        vtc.wrap(model, "atp", 0.25)


def test_modules_are_those_of_the_budget(folder):
    """On a model whose images differ in size, too, where half a token is no measure of what is near."""
    shutil.copytree(folder, folder.parent / "not.a-number")
    model = FAMILIES["llava_next"].build()
    model.config._name_or_path = str(folder.parent.parent)
    assert vtc.wrap(model, "atp", 0.25).vtc.method.modules is not None
    for budget in (0.5, 0.3, 64):
        with pytest.raises(ValueError, match=rf"modules for 0\.25, not for {budget}"):
            vtc.wrap(model, "atp", budget)


def test_a_full_budget_needs_no_modules():
    model = FAMILIES["llava"].model
    for budget in (1.0, 36, 1000):
        vtc.wrap(model, "atp", budget)
    vtc.unwrap(model)


def test_modules_are_not_lost_in_a_json_file(tmp_path):
    with pytest.raises(ValueError, match="save_pretrained"):
        Atp().untrained(Shape(8, 4), 8).to_json(tmp_path / "atp.json")
    Atp(rates=(0.5, 0.2, 0.1)).to_json(tmp_path / "atp.json")
    assert vtc.find_method(tmp_path / "atp.json") == Atp(rates=(0.5, 0.2, 0.1))
