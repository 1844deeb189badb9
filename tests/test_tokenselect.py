"""TokenSelect: what a step does not read is masked for that step alone; nothing leaves the cache."""

import copy
import math
from dataclasses import dataclass, replace

import oracle
import pytest
import torch
from models import FAMILIES, batch, continued, prompt, rows, visual
from models import llava as llava_model
from test_cache_methods import projected
from test_cache_site import GREEDY, PLAIN, WINDOWED

import vtc
from vtc.cache.held import nbytes
from vtc.choice import Seen
from vtc.eval.memory import peak_size
from vtc.methods.tokenselect import TokenSelect, votes
from vtc.select import top_k
from vtc.stage import Stage

METHODS = {"anew": TokenSelect(alike=1.0), "again": TokenSelect(alike=0.3), "paper": TokenSelect()}
"""Thresholds at which random models choose anew at each step, now and then, and as the paper does."""


@dataclass(frozen=True)
class Weighed(TokenSelect):
    """Behind a stage whose survivors count twice."""

    def stages(self, shape):
        def select(scores, seen, keep):
            return replace(top_k(scores, seen, keep), weight=torch.full_like(scores, 2.0))

        return (Stage(0, lambda seen: seen.valid.float(), select=select), *super().stages(shape))


@pytest.fixture(params=PLAIN)
def model(request):
    yield FAMILIES[request.param].model
    vtc.unwrap(FAMILIES[request.param].model)


def hidden(model, reads: list[tuple[int, int, dict]], inputs: dict, full: dict):
    """The unwrapped model over prompt and answer, in which the queries in columns `start` to `end` see of the visual
    tokens those in the columns that `read[layer]` (batch, tokens) lists, for (start, end, read) in `reads`."""
    ids, real = full["input_ids"], full["attention_mask"].bool()
    images = torch.nn.functional.pad(visual(inputs["input_ids"]), (0, ids.shape[1] - inputs["input_ids"].shape[1]))

    def sees(layer: int):
        seen = oracle.allowed(model, layer, ids.shape[1], len(ids), full) & real[:, None]
        for start, end, read in reads:
            for row, columns in enumerate(read[layer].tolist()):
                gone = images[row].clone()
                gone[[column for column in columns if column >= 0]] = False
                seen[row, start:end, gone] = False
        return seen[:, None]

    return oracle.seeing(model, sees)


def answered(model, inputs, **options):
    """An answer, and for each of its later tokens (start, end, read) as `hidden` takes them."""
    start, reads = inputs["input_ids"].shape[1], []

    def note(module, args, kwargs, output):
        if columns := model.vtc.trace.reads.columns:
            reads.append((start + len(reads), start + len(reads) + 1, dict(columns)))

    hook = model.register_forward_hook(note, with_kwargs=True)
    try:
        return model.generate(**inputs, **GREEDY | options), reads
    finally:
        hook.remove()


@torch.no_grad()
def masked(model, reads, inputs, new):
    """(batch, steps, vocabulary) of the steps that decode `new`, whose first came from the full prefill."""
    full, start = continued(model, inputs, new[:, :-1]), inputs["input_ids"].shape[1]
    with hidden(model, reads, inputs, full):
        return model(**full, use_cache=False).logits[:, start - 1 :]


@pytest.mark.parametrize("images", [(1,), (2, 0, 1)])
@pytest.mark.parametrize("name", ["anew", "again"])
def test_what_is_not_read_is_masked_for_this_step(model, name, images):
    inputs = prompt(model, images)
    vtc.wrap(model, METHODS[name], 0.3)
    out, reads = answered(model, inputs)
    trace = model.vtc.trace
    vtc.unwrap(model)
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    assert [len(read) for _, _, read in reads] == [trace.depth] * 5
    torch.testing.assert_close(torch.stack(out.logits, 1), masked(model, reads, inputs, new), atol=1e-4, rtol=1e-4)
    for row in range(len(images)):
        wanted = sum(round(0.3 * size) for size, of in zip(trace.sizes, trace.rows, strict=True) if of == row)
        for _, _, read in reads:
            columns = [column[row][column[row] >= 0].tolist() for column in read.values()]
            assert all(len({*own}) == len(own) == wanted for own in columns)
        assert trace.average_tokens[row] == wanted
    assert (trace.held_per_layer == trace.tokens_per_layer).all()  # nothing leaves
    assert (0 < trace.reads.reuse < 1) if name == "again" else trace.reads.reuse == 0


@pytest.mark.parametrize("seed", range(3))
def test_scores_are_those_of_loops(seed):
    """The vote of each head by a softmax over the candidates alone."""
    generator = torch.Generator().manual_seed(seed)
    products, valid = torch.randn(3, 4, 11, generator=generator) * 3, torch.rand(3, 11, generator=generator) < 0.7
    ours = votes(products, Seen({}, valid, torch.arange(11).expand(3, -1), ()))
    for row in range(3):
        total = [0.0] * 11
        for head in range(4):
            mass = sum(math.exp(products[row, head, token]) for token in range(11) if valid[row, token])
            for token in range(11):
                total[token] += math.exp(products[row, head, token]) / mass if valid[row, token] else 0.0
        torch.testing.assert_close(ours[row], torch.tensor(total))


@pytest.mark.parametrize("alike", [1.0, 0.5])
def test_what_is_read_is_what_loops_choose(llava, alike):
    """Of each step, from what goes into the attention of a layer: products, votes, the highest, and what holds."""
    inputs, layer = prompt(llava, (2, 0, 1), pad="left", seed=3), 3
    vtc.wrap(llava, TokenSelect(alike=alike), 7)
    steps = []
    with projected(llava, layer) as found:
        hook = llava.register_forward_hook(lambda *_: steps.append({name: x.clone() for name, x in found.items()}))
        _, reads = answered(llava, inputs)
        hook.remove()
    keys, held, again, asked = steps[0]["key"], {}, 0, 0
    for step, (_, _, read) in zip(steps[1:], reads, strict=True):
        for row, count in enumerate((14, 0, 7)):
            query, places = step["query"][row, :, 0], visual(inputs["input_ids"][row]).nonzero()[:, 0].tolist()
            flat = query.flatten()
            asked += 1
            if row in held and flat @ held[row][0] / (flat.norm() * held[row][0].norm()) >= alike:
                again += 1
            elif places:
                total = [0.0] * len(places)
                for head in range(4):
                    products = [math.exp(query[head] @ keys[row, head // 2, place]) for place in places]
                    for token, product in enumerate(products):
                        total[token] += product / sum(products)
                held[row] = flat, [places[token] for token in oracle.top(total, count)]
            else:
                held[row] = flat, []
            assert [column for column in read[layer][row].tolist() if column >= 0] == held[row][1]
    assert (0 < again < asked) if alike < 1 else again == 0


def test_products_beyond_the_range_of_half_precision():
    """In float16, with weights that make products of more than 65504: the choice is that of double precision."""
    model, layer = llava_model().half(), 3
    with torch.no_grad():
        for own in model.base_model.language_model.layers:
            own.self_attn.q_proj.weight *= 90
            own.self_attn.k_proj.weight *= 90
    inputs, steps = prompt(model, (1,)), []
    inputs["pixel_values"] = inputs["pixel_values"].half()
    vtc.wrap(model, TokenSelect(alike=1.0), 9)
    with projected(model, layer) as found:
        model.register_forward_hook(lambda *_: steps.append({name: x.clone() for name, x in found.items()}))
        _, reads = answered(model, inputs)
    places = visual(inputs["input_ids"][0]).nonzero()[:, 0]
    keys, largest = steps[0]["key"][0, :, places].double(), 0.0
    for step, (_, _, read) in zip(steps[1:], reads, strict=True):
        products = torch.stack([keys[head // 2] @ step["query"][0, head, 0].double() for head in range(4)])
        largest = max(largest, float(products.max()))
        chosen = oracle.top(products.softmax(1).sum(0).tolist(), 9)
        assert read[layer][0].tolist() == places[chosen].tolist()
    assert largest > 65504


def test_a_full_budget_and_the_prefill_are_as_before(model):
    inputs, options = prompt(model, (1, 2)), {"do_sample": False, "max_new_tokens": 6}
    with torch.no_grad():
        untouched, text = model(**inputs).logits, model.generate(**inputs, **options)
        assert torch.equal(vtc.wrap(model, "tokenselect", 0.1)(**inputs).logits, untouched)
        assert not torch.equal(model.generate(**inputs, **options), text)
        vtc.wrap(model, "tokenselect", 1.0)
        out = model.generate(**inputs, **GREEDY)
        vtc.unwrap(model)
        assert torch.equal(out.sequences, text)
        same = zip(out.logits, model.generate(**inputs, **GREEDY).logits, strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in same)


def test_all_is_held_and_a_step_is_handed_what_it_reads(llava, monkeypatch):
    inputs, shapes = prompt(llava, (2,)), []
    with torch.no_grad():
        whole = llava(**inputs).past_key_values
    vtc.wrap(llava, "tokenselect", 9)
    with torch.no_grad():
        cache = llava(**inputs).past_key_values
        assert nbytes(cache) == nbytes(whole) + sum(layer.number.nbytes for layer in cache.layers)
        kernel = torch.nn.functional.scaled_dot_product_attention

        def noting(query, key, *args, **kwargs):
            shapes.append(key.shape[2])
            return kernel(query, key, *args, **kwargs)

        monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", noting)
        llava(input_ids=torch.tensor([[7]]), past_key_values=cache)
    text = int((~visual(inputs["input_ids"])).sum())
    assert shapes == [text + 18 + 1] * 6
    trace = llava.vtc.trace
    assert trace.average_tokens.tolist() == [18]
    assert trace.held_sizes.tolist() == [[72] * 6]
    assert trace.read_sizes.tolist() == [[72 / 2 + 2 * 18] * 6]
    assert peak_size(trace).tolist() == [72 * 6]


@pytest.mark.parametrize("pad", ["left", "right"])
def test_padded_rows_equal_single_runs(llava, pad):
    parts, new = rows(llava, (1, 2, 0, 1)), torch.tensor([[7, 7, 31, 8]])
    vtc.wrap(llava, METHODS["again"], 0.3)

    @torch.no_grad()
    def decoded(inputs):
        places = continued(llava, inputs, new[:, :0].expand(len(inputs["input_ids"]), 0))["position_ids"]
        cache, found = llava(**inputs, position_ids=places).past_key_values, []
        for token in new[0]:
            inputs = continued(llava, inputs, token.expand(len(inputs["input_ids"]), 1))
            last = {name: inputs[name][:, -1:] for name in ("input_ids", "position_ids")}
            found.append(llava(**last, attention_mask=inputs["attention_mask"], past_key_values=cache).logits)
        return torch.cat(found, 1)

    together = decoded(batch(llava, parts, pad=pad))
    assert llava.vtc.trace.reads.reuse > 0
    for row, part in enumerate(parts):
        torch.testing.assert_close(together[row], decoded(batch(llava, [part]))[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_beams(llava, name, monkeypatch):
    """Each beam reads what it would read by itself, with what its own past chose."""
    inputs, options = prompt(llava, (1,)), {"num_beams": 3, "do_sample": False, "length_penalty": 0.0}
    vtc.wrap(llava, METHODS[name], 0.3)
    out = llava.generate(**inputs, **options, max_new_tokens=5, return_dict_in_generate=True, output_scores=True)
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    with torch.no_grad():
        first = llava(**inputs)
        logits, cache = [first.logits[:, -1]], first.past_key_values
        for token in new[0, :-1]:
            logits.append(llava(input_ids=token.view(1, 1), past_key_values=cache).logits[:, -1])
    chosen = torch.stack(logits, 1).log_softmax(-1).gather(2, new[..., None])
    torch.testing.assert_close(out.sequences_scores, chosen.sum((1, 2)), atol=1e-3, rtol=1e-4)


def test_a_next_turn_of_text_reads_by_the_mean_of_its_queries(llava):
    """And a copy of the cache from which guesses are cropped goes on as before."""
    inputs, layer = prompt(llava, (1, 2), pad="left"), 2
    start, question = inputs["input_ids"].shape[1], torch.tensor([[3, 4, 5], [6, 7, 8]])
    full, step = continued(llava, inputs, question), torch.tensor([[9], [11]])
    vtc.wrap(llava, METHODS["anew"], 7)
    with torch.no_grad(), projected(llava, layer) as found:
        cache = llava(**inputs).past_key_values
        keys, twin = found["key"], copy.deepcopy(cache)
        llava(input_ids=question[:, :2], attention_mask=full["attention_mask"][:, :-1], past_key_values=twin)
        twin.crop(-2)
        asked = {"input_ids": question, "attention_mask": full["attention_mask"]}
        out = llava(**asked, past_key_values=cache).logits
        first, query = dict(llava.vtc.trace.reads.columns), found["query"].mean(2)
        assert torch.equal(llava(**asked, past_key_values=twin).logits, out)
        last = continued(llava, full, step)
        then = llava(input_ids=step, attention_mask=last["attention_mask"], past_key_values=cache).logits
        second = dict(llava.vtc.trace.reads.columns)
    vtc.unwrap(llava)
    for row, count in enumerate((7, 14)):
        places = visual(inputs["input_ids"][row]).nonzero()[:, 0]
        products = torch.stack([keys[row, head // 2, places] @ query[row, head] for head in range(4)])
        best = oracle.top(products.softmax(1).sum(0).tolist(), count)
        assert first[layer][row][first[layer][row] >= 0].tolist() == places[best].tolist()
    reads = [(start, start + 3, first), (start + 3, start + 4, second)]
    with hidden(llava, reads, inputs, last), torch.no_grad():
        expected = llava(**last, use_cache=False).logits[:, start:]
    torch.testing.assert_close(torch.cat((out, then), 1), expected, atol=1e-4, rtol=1e-4)


def test_a_next_turn_with_an_image_reads_everything_and_then_of_both(llava):
    first, second = (rows(llava, (1, 2), seed=1), rows(llava, (2, 1), seed=2))
    one, two = batch(llava, first), batch(llava, second, pad="right")
    both = {name: torch.cat((one[name], two[name]), 1) for name in ("input_ids", "attention_mask")}
    parts = zip(one["pixel_values"].split([1, 2]), two["pixel_values"].split([2, 1]), strict=True)
    both["pixel_values"] = torch.cat([pixels for pair in parts for pixels in pair])
    vtc.wrap(llava, METHODS["anew"], 9)
    step, turn, end = torch.tensor([[7], [8]]), one["input_ids"].shape[1], both["input_ids"].shape[1]
    full = continued(llava, both, step)
    longer = continued(llava, full, step)

    def given(start, stop, rows=slice(None)):
        ids, places = (longer[name][rows, start:stop] for name in ("input_ids", "position_ids"))
        return {"input_ids": ids, "position_ids": places, "attention_mask": longer["attention_mask"][rows, :stop]}

    with torch.no_grad():
        cache = llava(**{**one, **given(0, turn)}).past_key_values
        said = continued(llava, one, step)
        llava(input_ids=step, attention_mask=said["attention_mask"], past_key_values=cache)
        cache.crop(-1)
        prefill = llava(**{**two, **given(turn, end)}, past_key_values=cache).logits
        out = llava(**given(end, end + 1), past_key_values=cache).logits
        read = dict(llava.vtc.trace.reads.columns)
        copied = copy.deepcopy(cache)
        copied.batch_select_indices(torch.tensor([1]))
        alone = llava(**given(end + 1, end + 2, [1]), past_key_values=copied).logits
        together = llava(**given(end + 1, end + 2), past_key_values=cache).logits
    torch.testing.assert_close(alone[0], together[1], atol=1e-4, rtol=1e-4)
    cache.reset()
    assert [type(layer).__name__ for layer in cache.layers] == ["DynamicLayer"] * 6
    vtc.unwrap(llava)
    for layer in read.values():
        assert (layer >= 0).sum(1).tolist() == [27, 27]
        assert (layer >= turn).any()
    with hidden(llava, [(end, end + 1, read)], both, full), torch.no_grad():
        expected = llava(**full, use_cache=False).logits
    real = two["attention_mask"].bool()
    torch.testing.assert_close(prefill[real], expected[:, turn:end][real], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out[:, -1], expected[:, end], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["vtc-cls+tokenselect", "fastv+tokenselect"])
def test_behind_a_method_that_drops_it_chooses_from_what_is_left(llava, method):
    inputs = prompt(llava, (2, 0, 1))
    vtc.wrap(llava, method, 0.3)
    out, reads = answered(llava, inputs)
    trace = llava.vtc.trace
    vtc.unwrap(llava)
    alive = []
    for layer in range(trace.depth):
        pairs = zip(inputs["input_ids"], trace.alive(layer), strict=True)
        kept = [visual(ids).nonzero()[:, 0][index] for ids, index in pairs]
        alive.append(torch.nn.utils.rnn.pad_sequence(kept, batch_first=True, padding_value=-1))
    new = out.sequences[:, inputs["input_ids"].shape[1] :]
    end = inputs["input_ids"].shape[1]
    before = [(0, end, dict(enumerate(alive)))]
    torch.testing.assert_close(
        torch.stack(out.logits, 1), masked(llava, before + reads, inputs, new), atol=1e-4, rtol=1e-4
    )
    for _, _, read in reads:
        for layer, columns in read.items():
            for row, own in enumerate(columns.tolist()):
                assert {column for column in own if column >= 0} <= {*alive[layer][row].tolist()}


def test_what_it_cannot_do_it_says_before_the_work(llava):
    for name in WINDOWED:
        with pytest.raises(ValueError, match="has a sliding window and forgets by itself"):
            vtc.wrap(FAMILIES[name].model, "tokenselect", 0.5)
    with pytest.raises(ValueError, match="which the vision tower does not see"):
        vtc.wrap(llava, "tokenselect@sinks", 0.5)
    inputs = prompt(llava)
    vtc.wrap(llava, "tokenselect", 0.5)
    with pytest.raises(ValueError, match="assisted generation reads several at once"):
        llava.generate(**inputs, max_new_tokens=4, prompt_lookup_num_tokens=3)
    with pytest.raises(ValueError, match="assisted generation reads several at once"):
        llava.generate(**inputs, max_new_tokens=4, assistant_model=llava)
    with pytest.raises(ValueError, match="not this StaticLayer"):
        llava.generate(**inputs, max_new_tokens=4, cache_implementation="static")
    with pytest.raises(ValueError, match="this call has none: use_cache=True"):
        llava(**inputs, use_cache=False)
    with pytest.raises(ValueError, match="prompts can share what a method does before the decoder only"):
        vtc.prefix(llava, **inputs)
    vtc.wrap(llava, Weighed(), 0.5)
    with pytest.raises(ValueError, match="keys that count several times"):
        llava(**inputs)
