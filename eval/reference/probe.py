"""Is a reference model good enough to measure pruning with? Accuracy at a few keep lists, and what the CLS token finds.

python -m vtc.eval.reference.probe FOLDER --split val [--benchmark pages]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from vtc.eval import benchmarks as known
from vtc.eval import scenes
from vtc.eval.reference import SHIPPED
from vtc.eval.reference.data import Pack, make_batch, pack, to_pixels
from vtc.eval.reference.model import PRESETS, Preset, shared_tokenizer
from vtc.eval.reference.network import cls_attention, gather, look, read

Choose = Callable[[list[Tensor]], Tensor]
"""Vision states to kept patches, (batch, kept)."""


@torch.inference_mode()
def probe(
    model: LlavaForConditionalGeneration,
    examples: Sequence[scenes.Example],
    batch: int = 64,
    seed: int = 0,
    benchmarks: tuple[str, ...] = ("scenes",),
) -> dict[str, dict[str, float]]:
    """Accuracy of a model of these benchmarks, over all and a task, with every visual token, none, and 11 % and 25 % at
    random or by CLS attention.

    Tokens leave before the decoder and the others keep their positions. An answer is right when its token comes first
    and the end of the sequence comes next, which is what greedy decoding gives.
    """
    patches, size = model.config.image_seq_length, model.config.vision_config.image_size
    generator = torch.Generator().manual_seed(seed)
    rules: dict[str, Choose] = {
        "full": lambda states: torch.arange(patches).expand(len(states[-1]), -1),
        "blind": lambda states: torch.zeros(len(states[-1]), 0, dtype=torch.long),
    }
    for part in (0.25, 0.11):
        kept = round(part * patches)
        rules[f"random {part}"] = lambda states, kept=kept: _top(
            torch.rand(len(states[-1]), patches, generator=generator), kept
        )
        rules[f"cls {part}"] = lambda states, kept=kept: _top(cls_attention(model, states), kept)
    right: dict[str, list[bool]] = {name: [] for name in rules}
    for some in _chunks(examples, batch):
        states = look(model, torch.stack([to_pixels(example.image, size) for example in some]))
        text = pack([[(example.question, example.answer)] for example in some], benchmarks)
        for name, rule in rules.items():
            right[name] += _right(model, states, rule(states), text)
    tasks = [example.task for example in examples]
    return {name: _by_task(marks, tasks) for name, marks in right.items()}


@torch.inference_mode()
def coverage(
    model: LlavaForConditionalGeneration, preset: Preset, part: float = 0.11, images: int = 128
) -> dict[str, float]:
    """Things that the kept patches touch, as a part of all: by CLS attention and at random."""
    batch = make_batch("val", 1, 0, images, preset)
    states = look(model, batch.pixels)
    patches = preset.grid**2
    kept = round(part * patches)
    chosen = {"cls": _top(cls_attention(model, states), kept)}
    chosen["random"] = _top(torch.rand(images, patches, generator=torch.Generator().manual_seed(0)), kept)
    result = {}
    for name, keep in chosen.items():
        touched = []
        for row, sample in zip(keep.tolist(), batch.samples, strict=True):
            touched += [not set(row).isdisjoint(sample.touched(thing, preset.grid)) for thing in sample.things]
        result[name] = sum(touched) / len(touched)
    return result


def _preset(model: LlavaForConditionalGeneration) -> Preset:
    """The preset that a model was trained by. Raises ValueError where none has its sizes and its vocabulary."""
    config = model.config
    for preset in PRESETS.values():
        words = -(-len(shared_tokenizer(preset.benchmarks)) // 8) * 8
        sizes = (preset.size, preset.patch, preset.vision[0], preset.text[0], words)
        vision, text = config.vision_config, config.text_config
        if sizes == (vision.image_size, vision.patch_size, vision.hidden_size, text.hidden_size, text.vocab_size):
            return preset
    raise ValueError(f"no preset of {', '.join(PRESETS)} has the sizes of this model")


def _top(scores: Tensor, kept: int) -> Tensor:
    return scores.topk(kept).indices.sort().values


def _right(model: LlavaForConditionalGeneration, states: list[Tensor], keep: Tensor, text: Pack) -> list[bool]:
    tokens = model.model.multi_modal_projector(gather(states[-1][:, 1:], keep))
    guess = model.lm_head(read(model, tokens, keep, text)).argmax(-1)
    return ((guess == text.target) | (text.target < 0)).all(1).tolist()


def _by_task(marks: list[bool], tasks: list[str]) -> dict[str, float]:
    groups = {"all": marks}
    for task in dict.fromkeys(tasks):
        groups[task] = [mark for mark, of in zip(marks, tasks, strict=True) if of == task]
    return {name: sum(group) / len(group) for name, group in groups.items() if group}


def _chunks(examples: Sequence[scenes.Example], size: int) -> Iterator[Sequence[scenes.Example]]:
    for start in range(0, len(examples), size):
        yield examples[start : start + size]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=SHIPPED["reference"])
    parser.add_argument("--split", default="val", choices=("val", "test"))
    parser.add_argument("--limit", type=int, default=1080)
    parser.add_argument("--benchmark", default="scenes", choices=("scenes", "pages"))
    options = parser.parse_args()
    model = LlavaForConditionalGeneration.from_pretrained(options.folder).eval()
    preset = _preset(model)
    examples = known.find(options.benchmark).load(options.split, options.limit)
    for name, parts in probe(model, examples, benchmarks=preset.benchmarks).items():
        print(f"{name:12}", " ".join(f"{task} {part:.3f}" for task, part in parts.items()))
    print("things touched by 11 %:", coverage(model, preset))


if __name__ == "__main__":
    main()
