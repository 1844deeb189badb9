"""What is seen before the decoder and of its keys, against the untouched model, for every family."""

from dataclasses import dataclass
from typing import Any, ClassVar

import oracle
import pytest
import torch
from models import FAMILIES, batch, llava, prompt, rows, visual

import vtc
from vtc.observe import Keys, PatchKeys, PatchStates, QuestionCosine, TextRow, TokenStates
from vtc.stage import Method, Stage


@dataclass(frozen=True)
class Looks(Method):
    """Scores by the length of what one need shows, and keeps what it has seen."""

    need: Any
    site: int = 0

    name: ClassVar[str] = "looks"
    seen: ClassVar[list] = []

    def stages(self, shape):
        def score(seen):
            self.seen.append(seen[self.need])
            return seen[self.need].norm(dim=1)

        return (Stage(self.site, score, (self.need,)),)


def looked(model, need, inputs, site=0, **kwargs):
    """What the need showed: (images, channels, tokens)."""
    Looks.seen.clear()
    with vtc.compressed(model, Looks(need, site), 0.5), torch.no_grad():
        out = model(**inputs, **kwargs)
    return Looks.seen[0], out


def of_images(model, inputs, x):
    """The entries of x (batch, channels, length) at each image's placeholders, image by image."""
    with vtc.compressed(model, "random", 0.5) as trace, torch.no_grad():
        model(**inputs)
    result, used = [], [0] * len(x)
    for row, size in zip(trace.rows, trace.sizes, strict=True):
        places = visual(inputs["input_ids"][row]).nonzero()[:, 0][used[row] : used[row] + size]
        result.append((row, places, x[row][:, places]))
        used[row] += size
    return result


@pytest.fixture(params=[name for name in FAMILIES if name != "paligemma2"])
def eager(request):
    return FAMILIES[request.param].build(attn="eager")


def test_before_the_decoder(eager):
    """The first layer's attention of the text, the features that it reads, and their likeness to the text."""
    inputs = prompt(eager, (2, 0, 1), pad="left")
    entering = []
    handle = oracle.layers(eager)[0].register_forward_pre_hook(lambda m, args: entering.append(args[0]))
    with torch.no_grad():
        attention = eager(**inputs, output_attentions=True).attentions[0].mean(1)
    handle.remove()
    found = {
        need: looked(eager, need, inputs)[0]
        for need in (TextRow(0), TokenStates(0), QuestionCosine(0), QuestionCosine(0, over="max"))
    }
    for image, (row, places, states) in enumerate(of_images(eager, inputs, entering[0].transpose(1, 2))):
        ids, real = inputs["input_ids"][row], inputs["attention_mask"][row].bool()
        text = [p for p in range(int(places[-1]) + 1, len(ids)) if real[p] and not visual(ids[p])]
        probe = sum(attention[row, p, places] for p in text) / len(text)
        size, unit = len(places), torch.nn.functional.normalize(entering[0][row], dim=1)
        torch.testing.assert_close(found[TextRow(0)][image, 0, :size], probe, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[TokenStates(0)][image, :, :size], states)
        cosines = torch.stack([torch.stack([unit[place] @ unit[p] for p in text]) for place in places])
        torch.testing.assert_close(found[QuestionCosine(0)][image, 0, :size], cosines.mean(1), atol=1e-5, rtol=1e-4)
        highest = found[QuestionCosine(0, over="max")][image, 0, :size]
        torch.testing.assert_close(highest, cosines.amax(1), atol=1e-5, rtol=1e-4)


def test_keys_are_those_of_the_cache(eager):
    inputs = prompt(eager, (2, 0, 1), pad="left")
    with torch.no_grad():
        cache = eager(**inputs).past_key_values
    if oracle.windows(eager)[1] is not None:
        pytest.skip("the cache of a layer with a window does not hold all keys")
    found, _ = looked(eager, Keys(1), inputs, site=2)
    keys = cache.layers[1].keys.transpose(2, 3).flatten(1, 2)
    for image, (_, places, expected) in enumerate(of_images(eager, inputs, keys)):
        torch.testing.assert_close(found[image, :, : len(places)], expected, atol=1e-4, rtol=1e-4)


def test_no_text_after_an_image_is_like_nothing():
    model = FAMILIES["llava"].model
    (part,) = rows(model, (1,))
    part.ids = part.ids[: max(place for place, token in enumerate(part.ids) if token == 99) + 1]
    for over in ("mean", "max"):
        found, _ = looked(model, QuestionCosine(0, over=over), batch(model, [part]))
        assert found.eq(0).all()


def test_patch_keys_and_states():
    """Of the untouched tower: what its key projection returns, and what its blocks do."""
    model, inputs, keys = llava(), prompt(FAMILIES["llava"].model, (1, 2)), []
    block = model.base_model.vision_tower.encoder.layers[2]
    handle = block.self_attn.k_proj.register_forward_hook(lambda m, args, out: keys.append(out))
    with torch.no_grad():
        states = model.base_model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[3]
    handle.remove()
    torch.testing.assert_close(looked(model, PatchKeys(2), inputs)[0], keys[0][:, 1:].transpose(1, 2))
    torch.testing.assert_close(looked(model, PatchStates(2), inputs)[0], states[:, 1:].transpose(1, 2))


def test_a_second_turn_asks_about_its_own_image():
    """The probe's softmax runs over the cached keys too, at the positions that the tokens have."""
    model, eager = FAMILIES["llava"].model, llava(attn="eager")
    first, second = prompt(model, (0,), seed=1), prompt(model, (1,), seed=2)
    mask = torch.cat((first["attention_mask"], second["attention_mask"]), dim=1)
    ids = torch.cat((first["input_ids"], second["input_ids"]), dim=1)
    with torch.no_grad():
        cache = model(**first).past_key_values
        found, _ = looked(model, TextRow(0), {**second, "attention_mask": mask}, past_key_values=cache)
    whole = {"input_ids": ids, "attention_mask": mask, "pixel_values": second["pixel_values"]}
    _, decoder = oracle.attentions(eager, whole)
    places = (ids[0] == 99).nonzero()[:, 0]
    expected = decoder[0][0].mean(0)[int(places[-1]) + 1 :][:, places].mean(0)
    torch.testing.assert_close(found[0, 0], expected, atol=1e-5, rtol=1e-4)
