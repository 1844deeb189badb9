"""A mask that hides visual tokens, and prompts that share a row."""

import oracle
import pytest
import torch
from bare import SHORT, logits
from models import FAMILIES, batch, family, prompt, rows, visual
from table import EACH_KIND, HARD, METHODS, merges

import vtc
from vtc.methods.vtc_cls import VtcCls


def hide(inputs: dict, what: str) -> dict:
    """The prompt with some of its visual tokens hidden by the attention mask."""
    mask, images = inputs["attention_mask"].clone(), visual(inputs["input_ids"])
    generator = torch.Generator().manual_seed(0)
    if what == "first image":
        for row in range(len(mask)):
            places = images[row].nonzero()[:, 0].tolist()
            run = [place for number, place in enumerate(places) if place == places[0] + number]
            mask[row, run] = 0
    elif what == "holes":
        mask[images & (torch.rand(mask.shape, generator=generator) < 0.4)] = 0
    elif what == "edges":  # the first tokens of each row's images and the last
        for row in range(len(mask)):
            places = images[row].nonzero()[:, 0].tolist()
            mask[row, places[:7] + places[-9:]] = 0
    elif what == "holes everywhere":
        mask[torch.rand(mask.shape, generator=generator) < 0.2] = 0
        mask[:, -1] = inputs["attention_mask"][:, -1]
    elif what == "all images":
        mask[images] = 0
    else:
        mask[0] = 0
    return {**inputs, "attention_mask": mask}


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
@pytest.mark.parametrize("setting", ["vtc-cls", "fastv-early"])
def test_prompts_that_share_a_row_are_refused(name, setting):
    """Without mask and cache transformers tells them apart by their positions, as padding-free collators give them."""
    model, (first, second) = FAMILIES[name].model, rows(FAMILIES[name].model, (1, 0))

    def packed(*parts):
        inputs = batch(model, [sum(parts[1:], start=parts[0])]) | {"use_cache": False}
        del inputs["attention_mask"]
        positions = torch.cat([torch.arange(len(part.ids)) for part in parts])[None]
        return inputs | {"position_ids": positions if name == "llava" else positions.expand(4, 1, -1)}

    inputs, start = packed(first, second), len(first.ids)
    other = inputs | {"input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, start - 2] = 5
    bare = logits(model, inputs)
    assert torch.equal(logits(model, other)[:, start:], bare[:, start:])
    with vtc.compressed(model, *METHODS[setting]):
        with pytest.raises(ValueError, match="pack several prompts into one row"):
            logits(model, inputs)
        assert logits(model, packed(first)).isfinite().all()
    with vtc.compressed(model, METHODS[setting][0], 1.0):
        assert torch.equal(logits(model, inputs), bare)


def placed(model, inputs: dict) -> dict:
    """With positions along the line, as generate() gives them; also in three axes, where transformers cannot number
    a prompt whose images are hidden."""
    mask, first = inputs["attention_mask"], family(model).first_position
    positions = (mask.cumsum(1) - 1 + (first or 0)).masked_fill(mask == 0, first or 0)
    return {**inputs, "position_ids": positions if first is not None else positions.expand(3, -1, -1)}


HIDDEN = ["first image", "holes", "edges", "holes everywhere", "all images", "row"]


def hidden_prompt(model, what: str, pad: str) -> dict:
    return hide(prompt(model, (2, 1), pad=pad), what)


CELLS = [("llava", setting, what) for setting in HARD for what in HIDDEN]
"""Every method with every mask on the first family; on the others each of one and of the other, not each of both."""
CELLS += [
    (name, setting, HIDDEN[(first + number) % len(HIDDEN)])
    for first, name in enumerate(FAMILIES)
    if name != "llava"
    for number, setting in enumerate(EACH_KIND)
]


@pytest.mark.parametrize(("name", "setting", "what"), CELLS)
def test_hidden_tokens_are_none(name, setting, what):
    """They are not listed, not counted and not in the cache; what stays answers as under the masking oracle."""
    model, method = FAMILIES[name].model, METHODS[setting]
    inputs = placed(model, hidden_prompt(model, what, "left" if HIDDEN.index(what) % 2 else "right"))
    shown = visual(inputs["input_ids"]) & inputs["attention_mask"].bool()
    text = (inputs["attention_mask"].bool() & ~visual(inputs["input_ids"])).sum(1)
    vtc.wrap(model, *method)
    with torch.no_grad():
        out = model(**inputs)
    trace = model.vtc.trace
    vtc.unwrap(model)
    for layer in range(trace.depth):
        for row, alive in enumerate(trace.alive(layer)):
            places = visual(inputs["input_ids"][row]).nonzero()[:, 0]
            assert shown[row, places[alive]].all()
            if layer == 0 and trace.stages[0].site:
                assert len(alive) == shown[row].sum()
        held = (text + trace.tokens_per_layer[:, layer]).max()
        assert out.past_key_values.layers[layer].get_seq_length() in (held, inputs["input_ids"].shape[1])
    if merges(setting):
        return
    expected = oracle.masked_logits(model, trace, inputs, inputs["input_ids"][:, :0])
    stays = oracle.visible_keys(model, trace, inputs)[-1]
    torch.testing.assert_close(out.logits[stays], expected[stays], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "setting", "what"), CELLS[::4])
def test_hidden_tokens_in_generation(name, setting, what):
    model, method = FAMILIES[name].model, METHODS[setting]
    if family(model).first_position is None:
        pytest.skip("transformers itself cannot number such a prompt")
    inputs = hidden_prompt(model, what, "left")
    vtc.wrap(model, *method)
    out = model.generate(**inputs, **SHORT, return_dict_in_generate=True, output_logits=True)
    trace, length = model.vtc.trace, inputs["input_ids"].shape[1]
    vtc.unwrap(model)
    new = out.sequences[:, length:]
    if merges(setting):
        return
    expected = oracle.masked_logits(model, trace, inputs, new[:, :-1])[:, length - 1 :]
    real = inputs["attention_mask"].any(1)  # of a row of nothing, nothing is promised
    torch.testing.assert_close(torch.stack(out.logits, dim=1)[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["random", "uniform", "vtc-cls", "vflowopt"])
def test_a_budget_is_of_the_tokens_that_can_be_seen(llava, name):
    inputs = hide(prompt(llava, (2, 1)), "holes")
    shown = visual(inputs["input_ids"]) & inputs["attention_mask"].bool()
    vtc.wrap(llava, name, 0.5)
    logits(llava, inputs)
    for row, average in enumerate(llava.vtc.trace.average_tokens.tolist()):
        images = 2 - row
        assert average == pytest.approx(float(shown[row].sum()) / 2, abs=0.5 * images + 1e-3)


def test_an_even_choice_of_tiles_leaves_hidden_tokens_out():
    model = FAMILIES["llava_next"].model
    inputs = hide(prompt(model, (1, 1)), "holes")
    shown = visual(inputs["input_ids"]) & inputs["attention_mask"].bool()
    with vtc.compressed(model, VtcCls(tiles="even"), 0.9) as trace:
        logits(model, inputs)
    for row, kept in enumerate(trace.kept()):
        places = visual(inputs["input_ids"][row]).nonzero()[:, 0]
        assert shown[row, places[kept]].all()
        assert len(kept) == round(0.9 * int(shown[row].sum()))
