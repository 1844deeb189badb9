"""TokenButler: what its predictor says and what it is taught, each against loops written from the formula."""

import json
import math
from dataclasses import replace

import pytest
import torch
from eval_fixtures import run_vtc, save_tiny
from models import FAMILIES, IMAGE, llava, prompt
from oracle import top
from safetensors.torch import load_file, save_file
from table import BUTLER
from torch import nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import vtc
from vtc.eval import scenes, tokenbutler
from vtc.eval.reader import load
from vtc.methods.predictor import Predictor
from vtc.methods.tokenbutler import TokenButler

SEEDS = range(5)
LAYERS, HEADS, WIDTH = 6, 2, 32


@pytest.fixture(scope="module")
def model():
    return llava()


def drawn(seed, narrow=32):
    """A method with two heads of attention in its predictor, and weights large enough to tell tokens apart."""
    torch.manual_seed(seed)
    predictor = Predictor(WIDTH, narrow, 24, (LAYERS - 1) * HEADS)
    for weight in predictor.parameters():
        nn.init.normal_(weight, std=0.3)
    return TokenButler(modules=nn.ModuleList([predictor]).eval().requires_grad_(False))


def questions_and_images(inputs):
    """(row, columns of the question, columns of the image) of each image of the first family's prompts."""
    for row, (ids, real) in enumerate(
        zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True)
    ):
        places = [place for place, token in enumerate(ids) if token == IMAGE]
        for first in range(0, len(places), 36):
            image = places[first : first + 36]
            after = range(image[-1] + 1, len(ids))
            yield row, [place for place in after if real[place] and ids[place] != IMAGE], image


# -- the formula, one number at a time ----------------------------------------------------------------------------


def linear(x, layer, weights):
    weight, bias = (weights[f"0.{layer}.{part}"].tolist() for part in ("weight", "bias"))
    return [b + sum(w * v for w, v in zip(row, x, strict=True)) for row, b in zip(weight, bias, strict=True)]


def silu(x):
    return [v / (1 + math.exp(-v)) for v in x]


def mlp(x, name, weights):
    return linear(silu(linear(x, f"{name}.0", weights)), f"{name}.2", weights)


def turned(x, place):
    """Rotary embedding of 16 channels: channel i with i + 8, at the rate 10000^(-i / 8)."""
    result = list(x)
    for i in range(8):
        angle = place * 10000 ** (-i / 8)
        result[i] = x[i] * math.cos(angle) - x[i + 8] * math.sin(angle)
        result[i + 8] = x[i + 8] * math.cos(angle) + x[i] * math.sin(angle)
    return result


def softmax(x):
    parts = [math.exp(v - max(x)) for v in x]
    return [part / sum(parts) for part in parts]


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / 4


def predicted(states, weights):
    """[channel][query][key] over a row without padding: importance logits, from its normed states."""
    inner = [linear(x, "narrow", weights) for x in states]
    qkv, narrow = [linear(x, "qkv", weights) for x in inner], len(inner[0])
    grown = []
    heads = range(0, narrow, 16)
    turned_keys = {
        head: [turned(x[narrow + head : narrow + head + 16], s) for s, x in enumerate(qkv)] for head in heads
    }
    for t in range(len(states)):
        mixed = []
        for head in heads:
            query = turned(qkv[t][head : head + 16], t)
            paid = softmax([dot(query, key) for key in turned_keys[head][: t + 1]])
            values = [qkv[s][2 * narrow + head : 2 * narrow + head + 16] for s in range(t + 1)]
            mixed += [sum(p * value[i] for p, value in zip(paid, values, strict=True)) for i in range(16)]
        x = [a + b for a, b in zip(inner[t], mixed, strict=True)]
        mean = sum(x) / narrow
        scale = math.sqrt(sum((v - mean) ** 2 for v in x) / narrow + 1e-5)
        gain, shift = weights["0.norm.weight"].tolist(), weights["0.norm.bias"].tolist()
        x = [(v - mean) / scale * g + b for v, g, b in zip(x, gain, shift, strict=True)]
        grown.append([a + b for a, b in zip(states[t], mlp(x, "feed", weights), strict=True)])
    queries, keys = ([mlp(x, name, weights) for x in grown] for name in ("query", "key"))
    logits = []
    for c in range(0, len(queries[0]), 16):
        q, k = ([turned(x[c : c + 16], place) for place, x in enumerate(given)] for given in (queries, keys))
        logits.append([[dot(query, key) for key in k] for query in q])
    return logits


def normed(model, inputs):
    """What the untouched decoder layer 1 reads after its norm: (batch, length, width)."""
    seen = []
    norm = model.base_model.language_model.layers[1].input_layernorm
    handle = norm.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("pad", ["left", "right"])
def test_the_scores_are_those_of_loops(model, seed, pad):
    inputs, method = prompt(model, (1, 0, 2) if seed else (1,), pad=pad, seed=seed), drawn(seed)
    states, weights = normed(model, inputs), method.modules.state_dict()
    with vtc.compressed(model, method, 0.4) as trace, torch.no_grad():
        model(**inputs)
    found = [scores for row in trace.scores() for scores in row.split(36) if len(scores)]
    kept, logits = [[] for _ in states], {}
    for (row, question, image), ours in zip(questions_and_images(inputs), found, strict=True):
        real = inputs["attention_mask"][row].nonzero()[:, 0].tolist()
        if row not in logits:
            logits[row] = predicted(states[row, real].tolist(), weights)
        score = [0.0] * 36
        for channel in logits[row]:
            for query in question:
                paid = softmax([channel[real.index(query)][real.index(place)] for place in image])
                score = [a + b / len(logits[row]) / len(question) for a, b in zip(score, paid, strict=True)]
        torch.testing.assert_close(ours, torch.tensor(score), atol=1e-6, rtol=1e-4)
        kept[row] += [index + len(kept[row]) // 10 * 36 for index in top(score, 10)]
    assert [own.tolist() for own in trace.kept()] == kept


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_taught_are_the_logits_of_the_untouched_model(model, seed):
    """Error and variance, layer by layer: logits from transformers' own rotary embedding."""
    inputs, method, seen = prompt(model, (1, 0, 2), pad="left", seed=seed), drawn(seed), {}
    language, handles = model.base_model.language_model, []
    for number, layer in enumerate(language.layers):
        for name in ("q_proj", "k_proj"):
            keep = lambda module, args, out, key=(number, name): seen.update({key: out})  # noqa: E731
            handles.append(getattr(layer.self_attn, name).register_forward_hook(keep))
    handles.append(language.rotary_emb.register_forward_hook(lambda module, args, out: seen.update(rotary=out)))
    states = normed(model, inputs)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        found = tokenbutler.missed(type("Reader", (), {"model": model}), method, inputs)
    assert found.shape == (2, LAYERS - 1, 3)
    for image, (row, question, places) in enumerate(questions_and_images(inputs)):
        real = inputs["attention_mask"][row].nonzero()[:, 0].tolist()
        guess = predicted(states[row, real].tolist(), method.modules.state_dict())
        for layer in range(1, LAYERS):
            both = seen[layer, "q_proj"][row], seen[layer, "k_proj"][row]
            query, key = (x.unflatten(-1, (-1, 8)).transpose(0, 1) for x in both)
            cos, sin = (table[row if len(table) > 1 else 0] for table in seen["rotary"])
            query, key = (x[0] for x in apply_rotary_pos_emb(query[None], key[None], cos[None], sin[None]))
            error = variance = 0.0
            for head in range(HEADS):
                share = len(query) // HEADS
                mean = query[share * head : share * (head + 1)].mean(0)
                for asks in question:
                    true = [float(mean[asks] @ key[head, place]) / math.sqrt(8) for place in places]
                    ours = guess[(layer - 1) * HEADS + head][real.index(asks)]
                    error += sum((ours[real.index(p)] - x) ** 2 for p, x in zip(places, true, strict=True))
                    variance += sum((x - sum(true) / 36) ** 2 for x in true)
            total = HEADS * len(question) * 36
            assert found[0, layer - 1, image].item() == pytest.approx(error / total, rel=1e-3)
            assert found[1, layer - 1, image].item() == pytest.approx(variance / total, rel=1e-3)


def test_what_comes_later_is_not_seen():
    """Changing a state changes queries and keys of the prompt from its place on; changing filling changes none."""
    predictor = drawn(0).modules[0]
    states, place, every = torch.randn(1, 9, WIDTH), torch.tensor([[-1, -1, *range(2, 9)]]), torch.arange(9)[None]
    changed = states.clone()
    changed[0, 6] += 1
    for before, after in zip(predictor(states, place, every), predictor(changed, place, every), strict=True):
        moved = (before != after).any(-1).any(1)[0, 2:].tolist()
        assert moved == [False] * 4 + [True] * 3
    changed = states.clone()
    changed[0, :2] += 1
    for before, after in zip(predictor(states, place, every), predictor(changed, place, every), strict=True):
        assert torch.equal(before[:, :, 2:], after[:, :, 2:])


# -- modules that fit and modules that do not ----------------------------------------------------------------------


def test_modules_of_another_model_are_refused():
    other = llava(layers=5)
    with pytest.raises(ValueError, match="read states of 32 channels and know 10 key heads in all layers"):
        vtc.wrap(other, BUTLER, 0.5)
    assert "vtc" not in vars(other)
    wide = TokenButler().untrained(vtc.Shape(5, 4, key_heads=2), 48)
    with pytest.raises(ValueError, match="48 channels and know 8 key heads in all layers, and here are 32 and 8"):
        vtc.wrap(other, wide, 0.5)


@pytest.fixture
def folder(tmp_path):
    BUTLER.save_pretrained(tmp_path / "tokenbutler")
    return tmp_path / "tokenbutler"


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda x: x | {"0.norm.bias": torch.full((16,), math.nan)}, "not finite"),
        (lambda x: x | {"0.key.2.bias": torch.zeros(3)}, "does not hold 1 modules of tokenbutler"),
        (lambda x: {}, "does not hold 1 modules of tokenbutler"),
        (lambda x: {name: x[name][:0] for name in x}, "does not hold 1 modules of tokenbutler"),
        (lambda x: x | {"0.narrow.weight": torch.zeros(16)}, "does not hold 1 modules of tokenbutler"),
        (lambda x: x | {"1.more": torch.zeros(1)}, "does not hold 1 modules of tokenbutler"),
    ],
)
def test_a_damaged_file_is_named(folder, damage, match):
    file = folder / "model.safetensors"
    save_file({name: x.contiguous() for name, x in damage(load_file(file)).items()}, file)
    with pytest.raises(ValueError, match=rf"model\.safetensors .*{match}|model\.safetensors {match}"):
        TokenButler.from_pretrained(folder)


def test_one_folder_does_for_every_budget_and_a_model_from_nowhere_has_none(folder, monkeypatch):
    model = llava()
    for home in ("", str(folder)):
        monkeypatch.setattr(model.config, "_name_or_path", home)
        with pytest.raises(ValueError, match=r"for one model, and .* has modules for none, .*`vtc train tokenbutler "):
            vtc.wrap(model, "tokenbutler", 0.5)
    vtc.wrap(model, "tokenbutler", 1.0)  # nothing leaves, and nobody is asked
    monkeypatch.setattr(model.config, "_name_or_path", str(folder.parent))
    monkeypatch.chdir(folder.parent)
    for budget in (0.3, 0.5, 20):
        found = vtc.wrap(model, "tokenbutler", budget).vtc.method
        assert torch.equal(found.modules[0].norm.weight, BUTLER.modules[0].norm.weight)
    with pytest.raises(vtc.BudgetError, match="its first drop is before layer 1"):
        vtc.wrap(model, "tokenbutler", 0.1)


def test_new_modules_fit_every_family():
    for name, family in FAMILIES.items():
        adapter = vtc.adapter.find(family.model)
        method = TokenButler().untrained(adapter.shape(), adapter.decoder.config.hidden_size)
        with vtc.compressed(family.model, method, 0.6) as trace, torch.no_grad():
            family.model(**prompt(family.model, (2, 1)))
        assert sum(trace.average_tokens) / sum(trace.sizes) == pytest.approx(0.6, abs=0.05), name


# -- training ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    save_tiny(tmp_path / "model")
    return tmp_path / "model"


def test_training_teaches_and_wrap_finds_it(checkpoint, tmp_path, monkeypatch):
    """The loss falls, a torn run goes on as if it had never stopped, only scenes for training are read."""
    errors, missed, split = [], tokenbutler.missed, []

    def watched(*args):
        found = missed(*args)
        errors.append(found[0].mean().item())
        if len(errors) == 51 and split.count("torn"):
            raise KeyboardInterrupt
        return found

    example = scenes.example
    monkeypatch.setattr(tokenbutler, "missed", watched)
    monkeypatch.setattr(scenes, "example", lambda *args: (split.append(args[0]), example(*args))[1])
    recipe = tokenbutler.Recipe(str(checkpoint), steps=60, batch_size=4, learning_rate=1e-2)
    trained = tokenbutler.train(recipe)
    assert sum(errors[50:60]) < 0.7 * sum(errors[:10])
    assert set(split[: 60 * 4]) == {"train"}
    assert set(split) == {"train", "val"}
    home = checkpoint / "tokenbutler"
    assert {file.name for file in home.iterdir()} == {"config.json", "model.safetensors", "report.json"}
    report = json.loads((home / "report.json").read_text())
    assert report["explained"]["questions"] == 256
    assert len(report["explained"]["layers"]) == 7
    found = vtc.wrap(load(str(checkpoint), "cpu").model, "tokenbutler", 0.5).vtc.method
    assert all(map(torch.equal, found.modules.parameters(), trained.modules.parameters()))
    errors.clear()
    split.append("torn")
    with pytest.raises(KeyboardInterrupt):
        tokenbutler.train(recipe, tmp_path / "torn")
    with pytest.raises(ValueError, match="another recipe"):
        tokenbutler.train(replace(recipe, steps=61), tmp_path / "torn")
    again = tokenbutler.train(recipe, tmp_path / "torn")
    assert all(map(torch.equal, again.modules.parameters(), trained.modules.parameters()))


def test_the_command(checkpoint, tmp_path):
    out = tmp_path / "out"
    done = run_vtc("train", "tokenbutler", "--model", checkpoint, "--steps", "1", "--batch-size", "2", "--out", out)
    assert done.returncode == 0, done.stderr
    assert (out / "model.safetensors").stat().st_size < 1 << 20
