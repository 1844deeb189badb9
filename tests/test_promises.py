"""The promises of the design, for every method and family in the table."""

import copy
import re
import threading

import oracle
import pytest
import torch
from bare import GREEDY, fingerprint, logits
from models import FAMILIES, batch, family, prompt, rows, visual
from table import BATCHES, HARD, METHODS, SHAPE, batches, each_site, every_setting, merges
from table import parametrize as pytest_generate_tests  # noqa: F401

import vtc
from vtc import merge
from vtc.methods.fastv import FastV
from vtc.stage import Cache
from vtc.trained import Trained

# -- nothing is nothing -------------------------------------------------------------------------------------------


@every_setting
def test_full_budget_is_bit_identical(model, method, inputs, untouched):
    outputs, text = untouched
    vtc.wrap(model, method[0], 1.0)
    assert torch.equal(logits(model, inputs), outputs.logits)
    assert torch.equal(model.generate(**inputs, **GREEDY), text)


def test_unwrapped_is_bit_identical_and_bare(model, method, inputs, untouched):
    expected, before = untouched[0].logits, fingerprint(model)
    assert not torch.equal(logits(vtc.wrap(model, *method), inputs), expected)
    vtc.unwrap(model)
    assert torch.equal(logits(model, inputs), expected)
    assert fingerprint(model) == before


@each_site
def test_no_hook_stays_after_an_exception(model, method):
    inputs, before = prompt(model), fingerprint(model)

    def explode(ids, scores):
        raise RuntimeError("inside generate")

    with pytest.raises(RuntimeError, match="inside generate"), vtc.compressed(model, *method):
        model.generate(**inputs, **GREEDY, logits_processor=[explode])
    assert fingerprint(model) == before


@each_site
def test_an_exception_in_a_layer_does_not_spoil_the_next_call(model, method):
    inputs = prompt(model)
    vtc.wrap(model, *method)
    expected = logits(model, inputs)
    handle = oracle.layers(model)[-1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        logits(model, inputs)
    handle.remove()
    assert torch.equal(logits(model, inputs), expected)


# -- dropping is masking ------------------------------------------------------------------------------------------


@every_setting
def test_dropping_is_masking(model, dropping, inputs):
    """Prefill and 8 decoded tokens against the full model with the dropped keys masked in the layers after the drop."""
    vtc.wrap(model, *dropping)
    out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    trace, length = model.vtc.trace, inputs["input_ids"].shape[1]
    prefill = logits(model, inputs) if inputs["attention_mask"][:, 0].all() else None
    vtc.unwrap(model)
    new = out.sequences[:, length:]
    if inputs["attention_mask"][:, -1].all():
        expected = oracle.masked_logits(model, trace, inputs, new[:, :-1])[:, length - 1 :]
        torch.testing.assert_close(torch.stack(out.logits, dim=1), expected, atol=1e-4, rtol=1e-4)
    if prefill is not None:
        expected = oracle.masked_logits(model, trace, inputs, new[:, :0])
        stays = oracle.visible_keys(model, trace, inputs)[-1]
        torch.testing.assert_close(prefill[stays], expected[stays], atol=1e-4, rtol=1e-4)


def accounts_for_every_token(trace) -> None:
    """Each token that enters a stage is kept, or taken in by one that is kept, or dropped; and nothing else."""
    for stage in trace.stages:
        for image, (kept, valid) in enumerate(zip(stage.kept, stage.valid, strict=True)):
            tokens, stays = valid.nonzero()[:, 0].tolist(), kept.nonzero()[:, 0].tolist()
            assert {*stays} <= {*tokens}
            into = range(len(valid)) if stage.into is None else stage.into[image].tolist()
            for token in tokens:
                assert into[token] == token if token in stays else stage.into is None or into[token] in (-1, *stays)
            if stage.into is not None:
                sizes = merge.sizes(stage.into)[image]
                lost = sum(into[token] == -1 for token in range(len(valid)))
                assert sizes.sum() + lost == len(valid)
                assert (sizes.nonzero()[:, 0].tolist() == stays) or not stays


SMOKE = {
    name: [setting for setting in METHODS if setting not in HARD or setting in ("tome", "random-half", "chain")]
    for name in FAMILIES
    if name != "llava"
}
"""What the table does not try on the other families."""


@pytest.mark.parametrize(("name", "setting"), [(name, setting) for name in SMOKE for setting in SMOKE[name]])
def test_every_method_on_every_family(name, setting):
    """Dropping is masking, or every token is accounted for; or an early error says what this model lacks."""
    model, (method, budget) = FAMILIES[name].model, METHODS[setting]
    modes = [batch for batch in batches(name) if batch != "right-padded"]
    images, pad = BATCHES[modes[(list(METHODS).index(setting) + list(FAMILIES).index(name)) % len(modes)]]
    inputs = prompt(model, images, pad=pad)
    try:
        with vtc.compressed(model, method, budget) as trace, torch.no_grad():
            out = model.generate(
                **inputs, do_sample=False, max_new_tokens=2, return_dict_in_generate=True, output_logits=True
            )
    except vtc.BudgetError:
        raise
    except ValueError as error:
        assert "this method" in str(error)  # noqa: PT017  # what it needs, and the model has not
        return
    assert trace.average_tokens.sum() < sum(trace.sizes)
    accounts_for_every_token(trace.record)
    if not merges(setting):
        length = inputs["input_ids"].shape[1]
        expected = oracle.masked_logits(model, trace.record, inputs, out.sequences[:, length:-1])[:, length - 1 :]
        torch.testing.assert_close(torch.stack(out.logits, dim=1), expected, atol=1e-4, rtol=1e-4)


def test_every_method_is_in_the_table():
    """Those at the cache in its own, those that are trained by a line with their modules."""
    shape = vtc.Shape(6, 4)
    named = {method.name for method, _ in METHODS.values()}
    for name, kind in vtc.list_methods().items():
        assert name in named or isinstance(kind().stages(shape)[0].site, Cache), name
        assert name in {method.name for method, _ in HARD.values()} or not issubclass(kind, Trained), name


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "paligemma2"])
@pytest.mark.parametrize("setting", ["vtc-cls", "fastv-early", "transprune-high"])
def test_eager_and_sdpa_agree(name, setting):
    sdpa, eager = FAMILIES[name].model, FAMILIES[name].build(attn="eager")
    inputs = prompt(sdpa, (2, 0, 1))
    real = inputs["attention_mask"].bool()
    a, b = (logits(vtc.wrap(model, *METHODS[setting]), inputs)[real] for model in (sdpa, eager))
    vtc.unwrap(sdpa)
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_without_cache(model, dropping):
    """Gapped positions with neither mask nor cache must not be taken for packed sequences."""
    inputs = prompt(model)
    mask = inputs.pop("attention_mask")
    vtc.wrap(model, *dropping)
    with torch.no_grad():
        out = model(**inputs, use_cache=False).logits
    trace = model.vtc.trace
    vtc.unwrap(model)
    inputs["attention_mask"] = mask
    expected = oracle.masked_logits(model, trace, inputs, mask[:, :0])
    torch.testing.assert_close(out[:, -1], expected[:, -1], atol=1e-4, rtol=1e-4)


# -- batches, turns, modes ----------------------------------------------------------------------------------------


@every_setting
def test_padded_batch_equals_single_runs(model, method):
    parts = rows(model, (1, 2, 1))
    vtc.wrap(model, *method)
    together = model.generate(**batch(model, parts), **GREEDY)[:, -8:]
    kept = model.vtc.trace.kept()
    for row, part in enumerate(parts):
        assert torch.equal(model.generate(**batch(model, [part]), **GREEDY)[0, -8:], together[row])
        assert torch.equal(model.vtc.trace.kept()[0], kept[row])


def test_second_turn_continues_on_the_pruned_cache(model, dropping):
    first = prompt(model, (1, 1), pad="left")
    vtc.wrap(model, *dropping)
    out = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    trace = model.vtc.trace
    question = torch.randint(2, 99, (2, 5), generator=torch.Generator().manual_seed(3))
    ids = torch.cat((out.sequences, question), dim=1)
    mask = torch.cat((first["attention_mask"], torch.ones(2, 13, dtype=torch.long)), dim=1)
    second = model.generate(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=out.past_key_values,
        **GREEDY,
        return_dict_in_generate=True,
        output_logits=True,
    )
    vtc.unwrap(model)
    new = second.sequences[:, first["input_ids"].shape[1] :]
    expected = oracle.masked_logits(model, trace, first, new[:, :-1])[:, -8:]
    torch.testing.assert_close(torch.stack(second.logits, dim=1), expected, atol=1e-4, rtol=1e-4)


@each_site
def test_second_turn_with_a_second_image(model, dropping):
    """The new image is pruned by its own right; what turn one dropped stays dropped."""
    if (kind := family(model)).first_position is None or kind.types == "token_type_ids" or any(oracle.windows(model)):
        pytest.skip("transformers itself numbers or masks a second image in one more forward differently")
    first, second = rows(model, (1,), seed=1)[0], rows(model, (1,), seed=2)[0]
    both = batch(model, [first + second])
    vtc.wrap(model, *dropping)
    with torch.no_grad():
        cache = model(**batch(model, [first])).past_key_values
        kept, size = [model.vtc.trace.alive(layer)[0] for layer in range(6)], sum(model.vtc.trace.sizes)
        out = model(
            **{**batch(model, [second]), "attention_mask": both["attention_mask"]}, past_key_values=cache
        ).logits
    trace = model.vtc.trace
    alive = [[torch.cat((old, trace.alive(layer)[0] + size))] for layer, old in enumerate(kept)]
    vtc.unwrap(model)

    class Both:
        depth = 6

        def alive(self, layer):
            return alive[layer]

    expected = oracle.masked_logits(model, Both(), both, both["input_ids"][:, :0])
    torch.testing.assert_close(out[:, -1], expected[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mode", ["beams", "samples"])
def test_beams_and_samples_score_as_the_masked_model(model, dropping, mode):
    parts = rows(model, (1, 2))
    inputs = batch(model, parts)
    options = {
        "beams": {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "length_penalty": 0.0},
        "samples": {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
    }[mode]
    vtc.wrap(model, *dropping)
    torch.manual_seed(0)
    out = model.generate(
        **inputs, **options, max_new_tokens=5, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    trace = model.vtc.trace
    vtc.unwrap(model)
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    for number, part in enumerate(parts):
        here, copies = slice(2 * number, 2 * number + 2), trace.batch // 2

        class Repeated:
            depth = trace.depth

            def alive(self, layer, row=number * copies):
                return trace.alive(layer)[row : row + 1] * 2

        wide, tokens = batch(model, [part, part]), new[here]
        start = wide["input_ids"].shape[1]
        expected = oracle.masked_logits(model, Repeated(), wide, tokens)[:, start - 1 : -1]
        chosen = expected.log_softmax(-1).gather(2, tokens[..., None])[..., 0]
        if mode == "beams":
            torch.testing.assert_close(out.sequences_scores[here], chosen.sum(1), atol=1e-3, rtol=1e-4)
        else:
            torch.testing.assert_close(torch.stack(out.logits, 1)[here], expected, atol=1e-4, rtol=1e-4)


@each_site
def test_two_threads_on_one_model(model, method):
    prompts = [prompt(model, (1,), seed=seed, length=8 + seed) for seed in range(4)]
    vtc.wrap(model, *method)
    expected, short = [], GREEDY | {"max_new_tokens": 4}
    for inputs in prompts:
        expected.append((model.generate(**inputs, **short), model.vtc.trace.kept()[0]))
    results = [None] * 4

    def ask(n):
        for _ in range(3):
            text = model.generate(**prompts[n], **short)
            results[n] = (text, model.vtc.trace.kept()[0])

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for (text, kept), (expected_text, expected_kept) in zip(results, expected, strict=True):
        assert torch.equal(text, expected_text)
        assert torch.equal(kept, expected_kept)


@each_site
def test_interleaved_generations_and_a_copied_cache(model, method):
    """State lives on the cache: two half-done generations and a deep copy do not disturb each other."""
    if family(model).first_position is None:
        pytest.skip("transformers keeps the positions of a prompt on the module: two half-done forwards share them")
    vtc.wrap(model, *method)
    a, b = prompt(model, (1,), seed=1), prompt(model, (2,), seed=2)
    step = torch.tensor([[7]])
    with torch.no_grad():
        caches = [model(**inputs).past_key_values for inputs in (a, b)]
        twin = copy.deepcopy(caches[0])
        mixed = [model(input_ids=step, past_key_values=cache).logits for cache in (*caches, twin)]
        alone = [model(input_ids=step, past_key_values=model(**inputs).past_key_values).logits for inputs in (a, b, a)]
    for got, expected in zip(mixed, alone, strict=True):
        assert torch.equal(got, expected)


# -- what comes back ----------------------------------------------------------------------------------------------


def test_outputs_have_their_usual_shapes_and_the_loss_is_the_masked_one(request, model, method, inputs, untouched):
    labels, plain = inputs["input_ids"].clone(), untouched[0]
    labels[:, :-4] = -100  # the answer, as in instruction tuning
    labels[inputs["attention_mask"] == 0] = -100
    with torch.no_grad():
        out = vtc.wrap(model, *method)(**inputs, labels=labels, output_hidden_states=True)
    trace = model.vtc.trace
    vtc.unwrap(model)
    assert out.logits.shape == plain.logits.shape
    assert [h.shape for h in out.hidden_states] == [h.shape for h in plain.hidden_states]
    if inputs["attention_mask"][:, 0].all() and not merges(request.node.callspec.params["method"]):
        with oracle.masked_layers(model, oracle.visible_keys(model, trace, inputs), inputs), torch.no_grad():
            expected = model(**inputs, labels=labels, use_cache=False, output_hidden_states=True)
        torch.testing.assert_close(out.loss, expected.loss, atol=1e-4, rtol=1e-4)
        for layer, (states, masked) in enumerate(zip(out.hidden_states, expected.hidden_states, strict=True)):
            stays = oracle.visible_keys(model, trace, inputs)[max(layer - 1, 0)]
            torch.testing.assert_close(states[stays], masked[stays], atol=1e-4, rtol=1e-4)


@each_site
def test_gradients_flow(model, method):
    inputs = prompt(model)
    vtc.wrap(model, *method)
    model(**inputs, labels=inputs["input_ids"].masked_fill(visual(inputs["input_ids"]), -100)).loss.backward()
    tower = [weight.grad for name, weight in model.named_parameters() if "vision_" in name or "visual" in name]
    assert sum(grad.abs().sum() for grad in tower if grad is not None) > 0
    model.zero_grad()


@every_setting
def test_the_trace_is_true(request, model, method, inputs):
    """Counted from what the layers were really given, not from what the method says; every token is accounted for."""
    lengths = {}
    layers = oracle.layers(model)
    vtc.wrap(model, *method)
    handles = [
        layer.register_forward_pre_hook(lambda m, args, n=n: lengths.__setitem__(n, args[0].shape[1]))
        for n, layer in enumerate(layers)
    ]
    out = model(**inputs)
    for handle in handles:
        handle.remove()
    trace, ids = model.vtc.trace, inputs["input_ids"]
    text = (inputs["attention_mask"].bool() & ~visual(ids)).sum(1)
    for layer in range(len(layers)):
        alive = trace.alive(layer)
        assert len(alive) == len(ids)
        assert all(torch.equal(kept, kept.sort().values) and kept.dtype == torch.long for kept in alive)
        assert [len(kept) for kept in alive] == trace.tokens_per_layer[:, layer].tolist()
        if layer and not torch.equal(trace.tokens_per_layer[:, layer], trace.tokens_per_layer[:, 0]):
            assert lengths[layer] == (text + trace.tokens_per_layer[:, layer]).max()
            assert out.past_key_values.layers[layer].get_seq_length() == lengths[layer]
    assert torch.allclose(trace.average_tokens, trace.tokens_per_layer.float().mean(1))
    for stage in range(len(trace.stages)):
        entered = trace.kept(stage - 1) if stage else [torch.arange(visual(row).sum()) for row in ids]
        if [len(kept) for kept in trace.kept(stage)] == [len(index) for index in entered]:
            with pytest.raises(ValueError, match="kept every token"):
                trace.scores(stage)
            continue
        assert [len(scores) for scores in trace.scores(stage)] == [len(index) for index in entered]
    assert set(trace.seconds) == {"vision", "score", "select", "compact", "prefill"}
    accounts_for_every_token(trace)
    merged = any(stage.into is not None for stage in trace.stages)
    assert merged == merges(request.node.callspec.params["method"])


@each_site
def test_a_prompt_without_an_image_is_left_alone(model, method):
    inputs = prompt(model, (0,))
    expected = model.generate(**inputs, **GREEDY)
    vtc.wrap(model, *method)
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    trace = model.vtc.trace
    assert [index.tolist() for index in (*trace.alive(5), *trace.kept())] == [[], []]
    assert trace.average_tokens.tolist() == [0.0]


@each_site
def test_inputs_embeds(model, method):
    if family(model).first_position is None:
        pytest.skip("without ids transformers cannot tell positions in three axes")
    inputs = prompt(model)
    vtc.wrap(model, *method)
    expected = logits(model, inputs)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(logits(model, {**inputs, "inputs_embeds": embeds}), expected)


# -- budgets and errors -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("budget", [1, 3, 9, 20, 35, 0.1, 0.25, 0.5, 0.9])
def test_a_budget_is_the_layer_average(llava, budget):
    model = llava
    for name, kind in vtc.list_methods().items():
        if kind.adaptive:  # trained or measured for one model, and met on average over the data
            continue
        if issubclass(kind, Trained):
            name = next(method for method, _ in HARD.values() if method.name == name)
        tokens = model.config.image_seq_length
        target = budget if isinstance(budget, int) else budget * tokens
        first = vtc.find_method(name).stages(SHAPE)[0].site
        late = (first * tokens + 6 - first) / 6 if first and isinstance(first, int) else 0  # all until then, then one
        # all at 2 bits, of 64 bytes a token and head; scales of 2 + 2 bytes, factors of 2, and one to tell the level
        late = {
            "bits": (36 * (1 + 4 + 4) + 8 * 4) / 64,
            "mikv": (36 * (1 + 4 + 16) + 8 * 2) / 64,
            "zipcache": (36 * (1 + 4 + 2) + 8 * 4 + 8 * 2) / 64,
        }.get(name, late)
        if target < late - 0.5:
            with pytest.raises(vtc.BudgetError) as error:
                vtc.wrap(model, name, budget)
            assert error.value.floor * tokens == pytest.approx(late)
            continue
        vtc.wrap(model, name, budget)
        model(**prompt(model, (1, 2), pad="left"))
        average = model.vtc.trace.average_tokens / torch.tensor([1.0, 2.0])
        assert (average - target).abs().max() <= 0.5


def test_budget_zero_is_blind(model):
    inputs = prompt(model)
    vtc.wrap(model, "random", 0)
    out = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert model.vtc.trace.average_tokens.tolist() == [0.0]
    other = {**inputs, "pixel_values": torch.rand_like(inputs["pixel_values"]) + 0.1}
    assert torch.equal(model.generate(**other, **GREEDY), out.sequences)


@pytest.mark.parametrize(
    ("method", "budget", "error", "message"),
    [
        ("no-such", None, ValueError, "fastv, .*random, .*vtc-cls"),
        ("random", None, ValueError, "pass budget="),
        ("random", 1.5, ValueError, r"\(0, 1\]"),
        ("random", -1, ValueError, "negative"),
        ("random", "half", TypeError, "number of tokens"),
        ("fastv", 0.01, vtc.BudgetError, "0.190 to 1.0"),
        (FastV(layer=6), 0.5, ValueError, "1 to 5"),
    ],
)
def test_errors_are_early_and_change_nothing(llava, method, budget, error, message):
    before = fingerprint(llava)
    with pytest.raises(error, match=message):
        vtc.wrap(llava, method, budget)
    assert fingerprint(llava) == before


def test_an_unknown_model_is_told_where_to_add_one():
    with pytest.raises(TypeError, match=r"llava.*integrations/llava\.py"):
        vtc.wrap(torch.nn.Linear(2, 2), "random", 0.5)


def test_wrapping_twice_replaces(llava):
    inputs = prompt(llava)
    vtc.wrap(llava, "random", 0.5)
    once = len(fingerprint(llava)), logits(llava, inputs)
    vtc.wrap(llava, "fastv", 0.3)
    vtc.wrap(llava, "random", 0.5)
    assert (len(fingerprint(llava)), llava.vtc.trace.batch) == (once[0], 0)
    assert torch.equal(logits(llava, inputs), once[1])


def test_compressed_yields_a_trace_and_puts_an_outer_wrapping_back(llava):
    inputs = prompt(llava)
    outer = logits(vtc.wrap(llava, "random", 0.5), inputs)
    with vtc.compressed(llava, "uniform", 4) as trace:
        llava.generate(**inputs, **GREEDY)
    assert trace.average_tokens.tolist() == [4.0]
    assert torch.equal(logits(llava, inputs), outer)


def test_a_trace_prints_what_happened(llava):
    """36 visual tokens an image, 6 layers: at half of the tokens fastv keeps 14 of each from layer 1 on."""
    inputs = prompt(llava, (1, 2))
    with vtc.compressed(llava, "fastv", 0.5) as trace:
        assert repr(trace) == "<Trace: nothing has run>"
        llava.generate(**inputs, **GREEDY)
    assert repr(trace).startswith(
        "<Trace: 3 images; 108 visual tokens, 42 from layer 1 on, 53 averaged over 6 layers; vision 0."
    )
    assert re.search(r"; vision [\d.]+ s, .*prefill [\d.]+ s, decode [\d.]+ s>$", repr(trace))
