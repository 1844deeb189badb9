"""Methods made of methods: chains, and modifiers; and the texts that stand for them."""

import json
import math
import re
from dataclasses import dataclass, replace
from typing import ClassVar

import oracle
import pytest
import torch
from bare import logits
from models import FAMILIES, llava, prompt
from oracle import attentions, top
from table import HARD

import vtc
from vtc.budget import average_tokens, counts
from vtc.eval import folder, tune
from vtc.eval.reader import Reader
from vtc.methods.atp import Atp
from vtc.methods.compose import Chain
from vtc.methods.fastv import FastV
from vtc.methods.modifiers import Debias, Sinks, fit_recency
from vtc.methods.random_kv import RandomKv
from vtc.methods.tome import ToMe
from vtc.methods.transprune import TransPrune
from vtc.methods.uniform import Uniform
from vtc.methods.vflowopt import VFlowOpt
from vtc.methods.vtc_cls import VtcCls
from vtc.stage import Method, Shape, Stage
from vtc.trained import Trained

SHAPE = Shape(32, 23, key_heads=8)


# -- chains -----------------------------------------------------------------------------------------------------------


def test_a_chain_is_its_methods_one_after_the_other():
    """By hand: what the first one keeps is all that there is for the second, which runs on what it sees by masks."""
    sdpa, eager = llava(), llava(attn="eager")
    inputs = prompt(sdpa, (1,))
    with vtc.compressed(sdpa, Chain(VtcCls(layers=1), FastV(layer=3), split=(0.25,)), 16) as trace:
        sdpa(**inputs)
    first, second = counts(sdpa_chain := Chain(VtcCls(layers=1), FastV(layer=3), split=(0.25,)), 36, 16, Shape(6, 4))
    assert (3 * first + 3 * second) / 6 == pytest.approx(16, abs=0.5)
    tower, _ = attentions(eager, inputs)
    kept = top(tower[3][0, :, 0, 1:].mean(0).tolist(), first)
    assert trace.kept(0)[0].tolist() == kept
    places = (inputs["input_ids"][0] == 99).nonzero()[:, 0]
    visible = inputs["attention_mask"].bool().clone()
    visible[0, places] = False
    visible[0, places[kept]] = True
    with oracle.masked_layers(eager, [visible] * 6):
        _, decoder = attentions(eager, inputs)
    row = decoder[2][0, :, -1].mean(0)[places[kept]]
    torch.testing.assert_close(trace.scores(1)[0], row, atol=1e-5, rtol=1e-4)
    assert trace.kept(1)[0].tolist() == [kept[index] for index in top(row.tolist(), second)]
    assert sdpa_chain.name == "vtc-cls+fastv"


@pytest.mark.parametrize("split", [0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("budget", [0.9, 0.5, 0.3])
def test_the_split_is_of_the_logarithm(split, budget):
    tokens = 100_000
    chain = Chain("vtc-cls", "fastv", split=(split,))
    first, second = counts(chain, tokens, budget, SHAPE)
    assert math.log(first / tokens) == pytest.approx(split * math.log(second / tokens), abs=1e-3)
    assert average_tokens(tokens, (first, second), (0, 2), 32) == pytest.approx(budget * tokens, abs=1)


def test_three_methods_share_equally():
    tokens = 100_000
    chain = Chain("vtc-cls", "fastv", FastV(layer=8))
    first, second, third = counts(chain, tokens, 0.3, SHAPE)
    assert first / tokens == pytest.approx(second / first, abs=1e-3)
    assert second / first == pytest.approx(third / second, abs=1e-3)
    a, b, c = counts(Chain(*chain.methods, split=(0.2, 0.75)), tokens, 0.3, SHAPE)
    whole = math.log(c / tokens)
    assert [math.log(a / tokens) / whole, math.log(b / a) / whole] == pytest.approx([0.2, 0.6], abs=1e-3)


@pytest.mark.parametrize(
    "spec", ["vtc-cls+fastv", "tome+transprune", "uniform+random-kv", "fastv+random-kv", "vtc-cls@sinks+fastv@debias"]
)
def test_every_budget_is_met_or_the_floor_is_named(spec):
    chain = vtc.find_method(spec)
    sites = [stage.site for stage in chain.stages(SHAPE)]
    for tokens in (1, 5, 36, 576):
        for budget in (1, 0.02, 0.1, 0.35, 0.8, 1.0, tokens):
            wanted = max(1, budget * tokens) if isinstance(budget, float) else budget
            floor = average_tokens(tokens, (1,) * len(sites), sites, 32)
            if wanted < floor - 0.5:
                with pytest.raises(vtc.BudgetError, match=rf"^{re.escape(chain.name)} cannot reach") as error:
                    counts(chain, tokens, budget, SHAPE)
                assert error.value.floor * tokens == pytest.approx(floor)
            else:
                kept = counts(chain, tokens, budget, SHAPE)
                assert average_tokens(tokens, kept, sites, 32) == pytest.approx(wanted, abs=0.5 + 1e-9)
    assert counts(chain, 36, 1.0, SHAPE) == (36,) * len(sites)


def test_without_a_budget_each_runs_with_its_papers_knobs():
    chain = Chain(FastV(layer=2, ratio=0.5), TransPrune(layers=(7, 9, 12), keep_ratios=(0.8, 0.5, 0.25)))
    assert counts(chain, 1000, None, SHAPE) == (500, 400, 250, 125)
    with pytest.raises(ValueError, match=r"vtc-cls\+fastv has no default number of tokens"):
        counts(Chain("vtc-cls", "fastv"), 1000, None, SHAPE)


@pytest.mark.parametrize("name", ["llava", "gemma3", "qwen3_vl"])
@pytest.mark.parametrize("spec", ["vtc-cls+fastv", "uniform+transprune@debias"])
def test_dropping_is_masking_in_a_chain(name, spec):
    model = FAMILIES[name].model
    inputs = prompt(model, (1, 2))
    with vtc.compressed(model, spec, 0.4) as trace:
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=4, return_dict_in_generate=True, output_logits=True
        )
    length = inputs["input_ids"].shape[1]
    expected = oracle.masked_logits(model, trace.record, inputs, out.sequences[:, length:-1])[:, length - 1 :]
    torch.testing.assert_close(torch.stack(out.logits, 1), expected, atol=1e-4, rtol=1e-4)
    assert len({tuple(tokens) for tokens in trace.tokens_per_layer.T.tolist()}) > 1


def test_a_chain_that_ends_in_the_cache():
    """The stream is the first method's, and what decoding sees the second's."""
    model = FAMILIES["llava"].model
    inputs = prompt(model, (1,))
    with vtc.compressed(model, "vtc-cls+random-kv", 9) as trace, torch.no_grad():
        out = model(**inputs)
    assert trace.tokens_per_layer[0].tolist() == [18] * 6
    assert trace.held_per_layer[0].tolist() == [9] * 6
    assert trace.average_tokens.tolist() == [9]
    text = int((inputs["input_ids"] != 99).sum())
    assert [layer.keys.shape[2] for layer in out.past_key_values.layers] == [text + 9] * 6


def test_tome_in_a_chain_leaves_what_its_own_stage_keeps():
    """In the tower too: it is bound to its part of the budget, not to the whole."""
    model = FAMILIES["llava"].model
    vtc.wrap(model, Chain(ToMe(), FastV(layer=3)), 0.4)
    logits(model, prompt(model, (1,)))
    tome, trace = model.vtc.method.methods[0], model.vtc.trace
    vtc.unwrap(model)
    kept = len(trace.kept(0)[0])
    assert kept > 0.4 * 36 + 1
    assert tome.share == pytest.approx(kept / 36)


@dataclass(frozen=True)
class Half(Trained):
    """A stand-in for trained methods: it says what it was bound to."""

    bound: float | None = None
    name: ClassVar[str] = "half"
    paper: ClassVar[str] = "none"

    def bind(self, model, budget, tokens):
        return replace(self, bound=budget)

    def stages(self, shape):
        return (Stage(0, lambda seen: seen.valid.float()),)


def test_parts_are_bound_to_their_own_budgets():
    model = FAMILIES["llava"].model
    chain = Chain(Half(), FastV(layer=3)).bind(model, 9, 36)
    first, _ = counts(chain, 36, 9, Shape(6, 4))
    assert chain.methods[0].bound == pytest.approx(first / 36)
    whole = Chain(Half(), FastV(layer=3)).bind(model, 0.25, None)
    assert whole.methods[0].bound == pytest.approx(first / 36, abs=0.02)
    assert Chain(Half(), FastV(layer=3)).bind(model, 1.0, 36).methods[0].bound == 1.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Chain("fastv"), "two methods or more"),
        (lambda: Chain("fastv", "magic"), "unknown method 'magic'"),
        (lambda: Chain("fastv", Atp()), "atp decides by itself"),
        (lambda: Chain("vtc-cls", "fastv", split=(0.5, 0.5)), "1 numbers share between 2 methods"),
        (lambda: Chain("vtc-cls", "fastv", split=(1.0,)), r"split\.0: .*less than 1"),
        (lambda: vtc.find_method("vtc-cls+"), "unknown method ''"),
        (lambda: vtc.find_method("vtc-cls@magic"), "unknown modifier 'magic'; vtc knows sinks, debias"),
        (lambda: Sinks("vtc-cls"), "stands behind a method"),
        (lambda: Sinks(VtcCls(), times=0.5), r"vtc-cls@sinks: times: .*greater than 1"),
        (lambda: Debias(Atp()), "it takes no @debias"),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fastv+vtc-cls", "vtc-cls begins before decoder layer 0, and the method before it still drops before layer 1"),
        ("vtc-cls+uniform", "uniform begins before decoder layer 0"),
        (
            "transprune+fastv",
            "fastv begins before decoder layer 1, and the method before it still drops",
        ),
        ("random-kv+fastv", "what drops from the cache comes last in a chain, not before fastv"),
        ("random@debias", "random does not score by the text's attention"),
    ],
)
def test_what_does_not_fit_a_model_is_refused_before_work(spec, message):
    with pytest.raises(ValueError, match=message):
        vtc.wrap(FAMILIES["llava"].model, spec, 0.5)
    assert "vtc" not in vars(FAMILIES["llava"].model)


def test_a_floor_below_reach_names_the_chain():
    with pytest.raises(vtc.BudgetError, match=r"fastv\+transprune cannot reach 1 of 36") as error:
        counts(Chain(FastV(layer=2), TransPrune(layers=(3, 4, 5))), 36, 1, Shape(6, 4))
    assert error.value.floor == pytest.approx((2 * 36 + 4) / 6 / 36)


COMPOSED = [
    Chain(VtcCls(layers=2), FastV(layer=3), split=(0.3,)),
    Chain(Uniform(), FastV(), Sinks(RandomKv(seed=4))),
    Sinks(VtcCls(), times=2.0),
    Debias(Sinks(FastV(layer=2)), recency=1.5),
    Chain(Sinks(VtcCls()), Debias(TransPrune(alpha=0.25))),
]


@pytest.mark.parametrize("method", COMPOSED)
def test_what_is_composed_survives_json(method, tmp_path):
    file = tmp_path / "a+b@c.json"
    method.to_json(file)
    assert vtc.find_method(file) == method
    assert vtc.find_method(vtc.find_method(method)) is method


def test_json_names_methods_by_texts_too_and_errors_name_the_file(tmp_path):
    file = tmp_path / "chain.json"
    file.write_text('{"chain": ["vtc-cls@sinks", {"method": "fastv", "layer": 3}]}')
    assert vtc.find_method(file) == Chain(Sinks(VtcCls()), FastV(layer=3))
    for text, message in (
        ('{"chain": ["vtc-cls", 3]}', "holds 3 where a name or a JSON object"),
        ('{"chain": ["vtc-cls", "fastv"], "speed": 3}', "speed"),
        ('{"chain": 5}', "not iterable"),
        ('{"modifier": "magic", "method": "fastv"}', "magic"),
        ('{"modifier": "sinks"}', "holds None where"),
        ('{"modifier": "sinks", "method": "fastv", "times": "x"}', r"fastv@sinks: times"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=rf"chain\.json.*{message}"):
            vtc.find_method(file)


def test_what_is_tuned_reaches_the_parts():
    chain = vtc.find_method("vtc-cls+fastv@debias")
    assert chain.space == {
        "split.0": (0.05, 0.95), "0.layers": (1, 8), "1.recency": (0.0, 3.0), "1.method.layer": (1, 8)
    }  # fmt: skip
    tuned = chain.tuned({"split.0": 0.2, "0.layers": 2, "1.recency": 2.0, "1.method.layer": 4})
    assert tuned == Chain(VtcCls(layers=2), Debias(FastV(layer=4), recency=2.0), split=(0.2,))
    assert chain.tuned({"split": [0.3]}).split == (0.3,)


def test_tune_searches_a_chain():
    reader = Reader(FAMILIES["llava"].model, None)
    found = tune.searched(reader, vtc.find_method("vtc-cls+fastv@debias"))
    assert found == {"split.0": (0.05, 0.95), "0.layers": (1, 4), "1.recency": (0.0, 3.0), "1.method.layer": (1, 5)}


def test_the_digest_of_a_run_knows_the_parts(monkeypatch):
    """Trained modules inside a chain, and the code of each of its methods."""
    model, digests = FAMILIES["llava"].model, []
    for weight in (0.0, 1.0):
        modules = torch.nn.ModuleList([torch.nn.Linear(1, 1)])
        modules[0].weight.data.fill_(weight)
        modules[0].bias.data.zero_()
        digests.append(folder._method_digest(model, Chain(Half(modules=modules), FastV(layer=3)), (0.5,)))
    assert digests[0] != digests[1]
    assert [part.name for part in folder._with_parts(Chain(Sinks(VtcCls()), FastV()))] == [
        *("vtc-cls@sinks+fastv", "vtc-cls@sinks", "vtc-cls", "fastv")
    ]


# -- modifiers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "internvl", "qwen2_5_vl", "llava_next"])
def test_sinks_rank_behind_all_others(name):
    """Norms that are made extreme by hand, against a loop: patches that win all attention are the last to stay."""
    model = FAMILIES[name].model
    inputs, adapter = prompt(model, (2, 1)), vtc.adapter.find(model)
    block = adapter.tower_blocks()[-1]

    def swell(module, args, output):
        grown = output.clone()
        grown.view(-1, grown.shape[-1])[5::29] *= 40
        return grown

    handle = block.register_forward_hook(swell, prepend=True)
    states = []
    watch = block.register_forward_hook(lambda module, args, output: states.append(output))
    try:
        with vtc.compressed(model, "vtc-cls", 0.5) as bare:
            logits(model, inputs)
        with vtc.compressed(model, "vtc-cls@sinks", 0.5) as masked:
            logits(model, inputs)
    finally:
        handle.remove()
        watch.remove()
    tower = {name: x for name, x in inputs.items() if name in ("pixel_values", "image_sizes", "image_grid_thw")}
    packed = adapter.pack(adapter.patches(states[0], tower).float().norm(dim=-1)[..., None], tower)
    norm = [part.tolist() for part in torch.cat(packed)[:, 0].split(bare.sizes)]
    scores, after = (torch.cat(trace.scores(0)).split(trace.sizes) for trace in (bare, masked))
    found = 0
    for one, other, norms in zip(scores, after, norm, strict=True):
        middle = sorted(norms)[(len(norms) - 1) // 2]
        sinks = [index for index in range(len(norms)) if norms[index] > 3 * middle]
        others = [index for index in range(len(norms)) if index not in sinks]
        found += len(sinks)
        for index in others:
            assert other[index] == one[index]
        for index in sinks:
            assert other[index] < min(one[i].item() for i in others)
        assert sorted(sinks, key=lambda i: one[i].item()) == sorted(sinks, key=lambda i: other[i].item())
    assert found


@pytest.mark.parametrize(
    "name", ["cdpruner", "holov", "vispruner", "hiprune", "divprune", "visionzip", "prumerge-plus", "vtc-cls", "fastv"]
)
def test_sinks_leave_first_whatever_a_method_makes_of_its_scores(name):
    """Two patches of extreme norm by hand: they neither stay nor are taken in, but where the others do not suffice."""
    model, sinks = llava(), [4, 20]

    def swell(module, args, output):
        grown = output.clone()
        grown[:, [1 + sink for sink in sinks]] *= 40  # behind the CLS token
        return grown

    vtc.adapter.find(model).tower_blocks()[3].register_forward_hook(swell, prepend=True)
    for count in (8, 12, 30, 35):
        with vtc.compressed(model, Sinks(vtc.find_method(name)), count) as trace:
            logits(model, prompt(model))
        kept, scores = trace.kept(0)[0].tolist(), trace.scores(0)[0].tolist()
        if len(kept) <= 34:
            assert not {*sinks} & {*kept}
            assert trace.stages[0].into is None or (trace.stages[0].into[0, sinks] == -1).all()
        else:
            assert sorted({*range(36)} - {*kept}) == [min(sinks, key=lambda sink: (scores[sink], -sink))]


def test_no_sinks_no_change_and_sinks_at_the_cache():
    model = FAMILIES["llava"].model
    inputs = prompt(model, (1, 2))
    for spec in ("vtc-cls", "random-kv", "fastv"):
        with vtc.compressed(model, spec, 0.4) as bare:
            plain = logits(model, inputs)
        with vtc.compressed(model, Sinks(vtc.find_method(spec), times=1e6), 0.4) as masked:
            assert torch.equal(logits(model, inputs), plain)
        assert all(map(torch.equal, bare.kept(), masked.kept()))


@pytest.mark.parametrize("spec", ["fastv", "tally"])
def test_debias_divides_attention_by_its_trend(spec):
    """By hand: each token's attention over e^(1.3 i / 36), of its place in the image, also after others have left."""
    model = FAMILIES["llava"].model
    inputs = prompt(model, (1, 2))
    with vtc.compressed(model, HARD["fastv-early"][0] if spec == "fastv" else "vtc-cls+fastv", 0.4) as bare:
        logits(model, inputs)
    inner = HARD["fastv-early"][0] if spec == "fastv" else vtc.find_method("vtc-cls+fastv").methods[1]
    method = Debias(inner, recency=1.3)
    with vtc.compressed(model, method if spec == "fastv" else Chain("vtc-cls", method), 0.4) as debiased:
        logits(model, inputs)
    for image, (entered, plain, found) in enumerate(
        zip(
            bare.record.stages[-1].entered,
            bare.record.stages[-1].scores,
            debiased.record.stages[-1].scores,
            strict=True,
        )
    ):
        expected = [
            score / math.exp(1.3 * index / 36) for index, score in zip(entered.tolist(), plain.tolist(), strict=True)
        ]
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-6, rtol=1e-4)
        kept = [index for index, stays in enumerate(debiased.record.stages[-1].kept[image]) if stays]
        assert kept == top(expected, len(kept))


@pytest.mark.parametrize("recency", [-0.5, 0.0, 0.91, 2.4])
def test_the_trend_is_fitted_by_least_squares(recency):
    place = torch.arange(576) / 576
    clean = 0.002 * (recency * place).exp()
    assert fit_recency(clean) == pytest.approx(recency, abs=1e-6)
    noisy = clean * (1 + 0.3 * torch.rand(576, generator=torch.Generator().manual_seed(0)))

    def loss(recency):
        curve = [math.exp(recency * x) for x in place.tolist()]
        mu = sum(a * b for a, b in zip(curve, noisy.tolist(), strict=True)) / sum(a * a for a in curve)
        return sum((mu * a - b) ** 2 for a, b in zip(curve, noisy.tolist(), strict=True))

    found = fit_recency(noisy)
    assert loss(found) <= min(loss(found + step) for step in (-0.1, -0.01, 0.01, 0.1))


@dataclass(frozen=True)
class Cutting(Method):
    """Its selection looks at attention itself."""

    name: ClassVar[str] = "cutting"
    paper: ClassVar[str] = "none"

    def stages(self, shape):
        (stage,) = FastV(layer=2).stages(shape)
        (need,) = stage.needs
        select = lambda scores, seen, keep: stage.select(seen[need].mean(1), seen, keep)  # noqa: E731
        return (replace(stage, select=select),)


def test_a_selection_sees_the_same_rows():
    model = FAMILIES["llava"].model
    inputs = prompt(model, (1,))
    kept = []
    for method in (Debias(FastV(layer=2), recency=3.0), Debias(Cutting(), recency=3.0)):
        with vtc.compressed(model, method, 0.5) as trace:
            logits(model, inputs)
        kept.append(trace.kept()[0].tolist())
    assert kept[0] == kept[1]


def test_json_of_a_chain_reads_well(tmp_path):
    Chain(Sinks(VtcCls()), FastV(layer=3), split=(0.4,)).to_json(tmp_path / "chain.json")
    found = json.loads((tmp_path / "chain.json").read_text())
    assert [*found] == ["chain", "split"]
    assert found["chain"][0] | {"method": "vtc-cls"} == {"modifier": "sinks", "method": "vtc-cls", "times": 3.0}
    assert found["chain"][1]["layer"] == 3
    assert VFlowOpt.merges
    assert not Chain("vtc-cls", "fastv").merges
    assert Chain(ToMe(), "fastv").merges
