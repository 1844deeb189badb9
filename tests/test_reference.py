"""The reference model: its processor, what training shows it, that training resumes, and the shipped weights."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from accelerate import PartialState
from transformers import AutoModelForImageTextToText, AutoProcessor

from vtc.eval import pages, reference, scenes
from vtc.eval.reference.data import Batch, Pack, encode, head, make_batch, pack, to_pixels
from vtc.eval.reference.model import PRESETS, build_model, build_processor
from vtc.eval.reference.network import cls_attention, gather, look, read
from vtc.eval.reference.train import WHOLE, Trainer, subset, train

TINY = PRESETS["tiny"]
BOTH = replace(PRESETS["tiny"], size=120, muon=True, images=("pages", "pages", "scenes"))


@pytest.fixture(scope="module")
def processor():
    return build_processor(TINY)


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    return build_model(TINY, processor.tokenizer).eval()


def prompt(processor, question: str) -> str:
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def test_every_answer_is_one_token_and_nothing_is_unknown(processor):
    tokenizer = processor.tokenizer
    words = [*scenes.COLORS, *scenes.SHAPES, *scenes.WORDS, *scenes.DIGITS, *scenes.COUNTS.values()]
    words += ["yes", "no", "left", "right", "top", "bottom", "digit", "word", "dot", "nothing"]
    assert all(len(encode(f" {word}")) == 1 for word in words)
    text = "Ünïcode, 漢字 and a made-up wörd?"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_words_of_pages_are_one_token_each():
    names = [*pages.WORDS, *scenes.COLORS, *scenes.SHAPES, *scenes.DIGITS, *scenes.WORDS, *scenes.COUNTS.values()]
    names += ["one", "word", "digit", "bar", "place", "shape", "once", "left", "right", "top", "bottom", "nothing"]
    assert all(len(encode(f" {name}", BOTH.benchmarks)) == 1 for name in names)
    assert len({encode(f" {name}", BOTH.benchmarks) for name in names}) == len(set(names))
    asked = [example.question for example in pages.load("val", limit=36)]
    assert max(len(encode(question, BOTH.benchmarks)) for question in asked) <= 12


@pytest.mark.parametrize("benchmark", [pages, scenes])
def test_a_model_of_both_sees_in_training_what_its_processor_shows(benchmark):
    processor, example = build_processor(BOTH), benchmark.example("test", 0, 7)
    inputs = processor(images=[example.image], text=[prompt(processor, example.question)], return_tensors="pt")
    block = pack([[(example.question, example.answer)]], BOTH.benchmarks)
    asked = block.ids[0, : int((block.target[0] >= 0).nonzero()[0]) + 1].tolist()
    assert inputs["input_ids"][0].tolist() == [*block.head[0].tolist(), *[processor.image_token_id] * 225, *asked]
    seen = (to_pixels(example.image, BOTH.size) / 255 - 0.25) / 0.25
    torch.testing.assert_close(inputs["pixel_values"][0], seen)


def test_a_batch_of_both_takes_turns_and_names_what_stands_on_each_patch():
    batch = make_batch("train", 0, 5, 6, BOTH)
    assert [sample.benchmark for sample in batch.samples] == ["scenes", "pages", "pages"] * 2
    numbers = [BOTH.image(number) for number in range(9)]
    assert [number for name, number in numbers if name == "pages"] == [*range(6)]
    assert [number for name, number in numbers if name == "scenes"] == [*range(3)]
    for row, sample in enumerate(batch.samples):
        for thing in sample.things:
            left, top, right, bottom = (edge * 120 / sample.image.width for edge in thing.box)
            named = encode(f" {thing.name}", BOTH.benchmarks)[0]
            for patch in range(225):
                x, y = 8 * (patch % 15), 8 * (patch // 15)
                inside = left < x + 8 and x < right - 1e-6 and top < y + 8 and y < bottom - 1e-6
                words = batch.patch_words[row, patch].tolist()
                if inside and -1 in words and min(x + 8, right) - max(x, left) > 1.3 < min(y + 8, bottom) - max(y, top):
                    assert named in words
    assert batch.present.sum(1).min() > 1


def test_the_prompt_is_what_training_shows(processor):
    example = scenes.example("test", 0, 0)
    inputs = processor(images=[example.image], text=[prompt(processor, example.question)], return_tensors="pt")
    ids = inputs["input_ids"][0].tolist()
    image = processor.image_token_id
    block = pack([[(example.question, example.answer)]])
    asked = block.ids[0, : int((block.target[0] >= 0).nonzero()[0]) + 1].tolist()
    assert ids == [*head(), *[image] * 144, *asked]
    torch.testing.assert_close(inputs["pixel_values"][0], (to_pixels(example.image) / 255 - 0.25) / 0.25)


def test_any_image_is_squeezed_to_the_models_size(processor):
    wide = scenes.example("test", 0, 1).image.resize((200, 50))
    inputs = processor(images=[wide], text=[prompt(processor, "what digit is it?")], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 96, 96)


def test_reading_packed_questions_equals_asking_one_by_one(processor, model):
    """The training forward pass gives the logits that `forward` gives on a prompt."""
    example = scenes.example("test", 0, 3)
    questions = [("what color is the dot?", "red"), ("how many shapes are there?", "two")]
    with torch.no_grad():
        states = look(model, to_pixels(example.image)[None])
        keep = torch.arange(144)[None]
        text = pack([questions])
        tokens = model.model.multi_modal_projector(gather(states[-1][:, 1:], keep))
        packed = model.lm_head(read(model, tokens, keep, text))
        for index, (question, _) in enumerate(questions):
            inputs = processor(images=[example.image], text=[prompt(processor, question)], return_tensors="pt")
            alone = model(**inputs).logits[0, -1]
            first = ((text.block[0] == index + 1) & (text.target[0] >= 0)).nonzero()[0]
            torch.testing.assert_close(packed[0, first].squeeze(0), alone, atol=1e-4, rtol=1e-4)


def test_cls_attention_is_the_towers_own(model):
    pixels = to_pixels(scenes.example("test", 0, 0).image)[None]
    model.model.vision_tower.set_attn_implementation("eager")
    with torch.no_grad():
        seen = model.model.vision_tower((pixels / 255 - 0.25) / 0.25, output_attentions=True)
        row = cls_attention(model, look(model, pixels))
    torch.testing.assert_close(row, seen.attentions[-2].mean(1)[:, 0, 1:])


def test_subsets_are_sorted_and_of_every_size():
    features = torch.randn(6, 144, 8, generator=torch.Generator().manual_seed(0))
    counts = []
    for seed in range(60):
        keep = subset(features, 1 / 3, torch.Generator().manual_seed(seed))
        assert (keep.diff(dim=1) > 0).all()
        counts.append(keep.shape[1])
    assert 10 <= counts.count(144) <= 30
    assert min(counts) < 30


def test_patch_labels_say_what_is_there():
    batch = make_batch("train", 0, 0, 4, TINY)
    for row, things in enumerate([sample.things for sample in batch.samples]):
        for thing in things:
            words = [encode(f" {word}")[0] for word in thing.words]
            for patch in thing.patches(8, 12):
                assert set(words) <= set(batch.patch_words[row, patch].tolist())
        assert int((batch.patch_words[row, :, 0] == encode(" nothing")[0]).sum()) > 100


@pytest.mark.parametrize("muon", [False, True])
def test_training_resumes_where_it_was_killed(tmp_path, monkeypatch, muon):
    monkeypatch.setitem(PRESETS, "tiny", replace(TINY, muon=muon))
    whole = train(tmp_path / "whole", "tiny", report_every=100, workers=0, compiled=False)

    class Killed(Exception):
        pass

    advance = Trainer.advance

    def dies_at_three(self: Trainer, batch: Batch) -> float:
        if self.step == 3:
            raise Killed
        loss = advance(self, batch)
        self.save()
        return loss

    monkeypatch.setattr(Trainer, "advance", dies_at_three)
    with pytest.raises(Killed):
        train(tmp_path / "killed", "tiny", report_every=100, workers=0, compiled=False)
    monkeypatch.setattr(Trainer, "advance", advance)
    resumed = train(tmp_path / "killed", "tiny", report_every=100, workers=0, compiled=False)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, msg=name)

    AutoProcessor.from_pretrained(tmp_path / "killed" / "model")
    AutoModelForImageTextToText.from_pretrained(tmp_path / "killed" / "model")
    with pytest.raises(ValueError, match="another folder"):
        train(tmp_path / "killed", "tiny", read_steps=7, workers=0, compiled=False)


RESUMED = """
import sys
from accelerate import PartialState
from vtc.eval.reference.train import Trainer, train

class Stopped(Exception): ...

def stops_at_three(self, batch):
    if self.step == 3:
        raise Stopped
    loss = advance(self, batch)
    if self.processes.is_main_process:
        self.save()
    return loss

advance, Trainer.advance = Trainer.advance, stops_at_three
try:
    train(sys.argv[1], "tiny", workers=0, compiled=False)
except Stopped:
    PartialState().wait_for_everyone()
Trainer.advance = advance
train(sys.argv[1], "tiny", report_every=100, workers=0, compiled=False)
"""


def test_two_processes_average_their_gradients(tmp_path, monkeypatch):
    """Two processes on halves of the batches, stopped after 3 steps and resumed, learn what one does from the mean."""
    script = tmp_path / "script.py"
    script.write_text(RESUMED)
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    subprocess.run(
        (*torchrun, script, tmp_path / "two"), env={**os.environ, "ACCELERATE_USE_CPU": "true"}, check=True, timeout=300
    )

    def advance(self: Trainer, batch: Batch) -> float:
        phase = self._set_learning_rate()
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        for number in range(2):
            half, generator = batch.part(number, 2), torch.Generator().manual_seed(hash((self.seed, self.step)) % 2**63)
            with torch.autocast("cpu", torch.bfloat16):
                with torch.set_grad_enabled(phase != "rest"):
                    states = look(self.model, half.pixels)
                losses = [self._tower_loss(half, states)] if phase != "rest" else []
                if phase != "tower":
                    losses.append(self._read_loss(half, states, WHOLE[phase], generator))
                loss = sum(losses)
            (loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        return loss.item()

    monkeypatch.setattr(Trainer, "advance", advance)
    one = train(tmp_path / "one", "tiny", report_every=100, workers=0, compiled=False)
    two = AutoModelForImageTextToText.from_pretrained(tmp_path / "two" / "model")
    for name, value in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], value, msg=name)


def test_batches_that_processes_cannot_share_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(PartialState(cpu=True), "num_processes", 3)
    with pytest.raises(ValueError, match="3 processes cannot share batches of 4 and 4 images"):
        Trainer(tmp_path, TINY, seed=0)


def test_both_are_trained_together_and_reported_apart(tmp_path):
    trainer = Trainer(tmp_path, BOTH, seed=0)
    for step in range(BOTH.steps):
        before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
        trainer.advance(make_batch("train", 0, *BOTH.span(step), BOTH))
        learned = {name for name, weight in trainer.model.named_parameters() if not weight.equal(before[name])}
        phase = BOTH.phase(step)[0]
        assert any("vision_tower" in name for name in learned) == (phase != "rest"), phase
        assert any("language_model.layers" in name for name in learned) == (phase != "tower"), phase
    line = trainer.report(rows=24)
    assert set(re.findall(r"(\w+) [\d.n]+ \(", line)) == {"pages", "scenes"}
    assert set(re.findall(r"[( ](\w+) [\d.]+(?=[ )])", line)) >= {*pages.TASKS, *scenes.TASKS}


def test_a_model_of_both_is_under_40_megabytes():
    preset = PRESETS["both"]
    model = build_model(preset, build_processor(preset).tokenizer)
    assert 4 * sum(p.numel() for p in model.parameters()) < 40e6


def test_an_unknown_preset_is_refused(tmp_path):
    with pytest.raises(ValueError, match="small"):
        train(tmp_path, "huge")


def test_the_large_preset_takes_the_same_path():
    large = PRESETS["large"]
    batch = make_batch("train", 0, 0, 1, large)
    assert batch.pixels.shape == (1, 3, 336, 336)
    assert batch.patch_words.shape[:2] == (1, 576)
    big = build_model(large, build_processor(large).tokenizer)
    assert sum(p.numel() for p in big.parameters()) <= 20e6
    with torch.no_grad():
        states = look(big, batch.pixels)
        keep = torch.arange(0, 576, 9)[None]
        text: Pack = pack([[batch.samples[0].asked[0][1:]]])
        hidden = read(big, big.model.multi_modal_projector(gather(states[-1][:, 1:], keep)), keep, text)
    assert hidden.shape == (*text.ids.shape, large.text[0])


@pytest.mark.parametrize(
    ("name", "benchmark"), [("reference", scenes), ("reference-pages", scenes), ("reference-pages", pages)]
)
def test_the_shipped_weights_answer(name, benchmark):
    folder = reference.SHIPPED[name]
    processor = AutoProcessor.from_pretrained(folder)
    shipped = AutoModelForImageTextToText.from_pretrained(folder).eval()
    assert sum(file.stat().st_size for file in folder.rglob("*")) < 40e6
    examples = benchmark.load("test", limit=45)
    prompts = [prompt(processor, example.question) for example in examples]
    inputs = processor(images=[example.image for example in examples], text=prompts, return_tensors="pt", padding=True)
    output = shipped.generate(**inputs, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
    answers = [text.strip() for text in processor.batch_decode(output, skip_special_tokens=True)]
    right = sum(answer == example.answer for answer, example in zip(answers, examples, strict=True))
    assert right / len(examples) >= 0.75, answers
