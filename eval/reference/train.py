"""Train the reference model from nothing.

1. *tower*: the vision tower, on labels of patches and of the CLS token.
2. *read*: projector and decoder as well, on captions and packed questions. The tower goes on with its labels, but the
   questions do not reach it: asked about images with tokens missing, it would learn to repeat each thing far away.
3. *rest*: projector and decoder alone, and whole images more often. Where an answer takes two looks (which item costs
what is asked), the second is learned late, and from images that lack nothing.

A decoder trained on whole images alone breaks when the composition of its visual tokens changes, and then any pruning
looks bad for a reason of its own. Hence many batches of phases 2 and 3 see only some of the visual tokens, at their
original positions, chosen in ways that favour no pruning method, and some rows see none.

Several processes, as torchrun starts them, share each batch and average their gradients: on two cores two of one thread
are faster than one of two.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from accelerate.utils import reduce
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from vtc.eval import benchmarks as known
from vtc.eval import progress, scenes
from vtc.eval.reference.data import QUESTIONS, Batch, Pack, batches, encode, labels, make_batch, pack
from vtc.eval.reference.model import PRESETS, Preset, build_model, build_processor, shared_tokenizer
from vtc.eval.reference.network import FLOAT32, Labels, gather, look, read

BLIND = 0.05
"""Part of the rows that see no visual token, so that a blind answer is an honest guess."""
WHOLE = {"read": 1 / 3, "rest": 1 / 2}
"""Part of a phase's batches that see every visual token; the others see 5 to 100 %."""
SAVE_SECONDS = 180


class Trainer:
    """The network, its optimiser and the step it is at; `run` goes on from there."""

    def __init__(self, out: Path, preset: Preset, seed: int):
        self.out, self.preset, self.seed, self.step = out, preset, seed, 0
        self.processes = PartialState(cpu=not torch.cuda.is_available())
        if any(images % self.processes.num_processes for images in (preset.tower_batch, preset.read_batch)):
            raise ValueError(
                f"{self.processes.num_processes} processes cannot share batches of {preset.tower_batch} and "
                f"{preset.read_batch} images evenly"
            )
        self.device = self.processes.device
        torch.manual_seed(seed)
        self.model = build_model(preset, shared_tokenizer(preset.benchmarks)).to(self.device)
        if self.device.type == "cpu":
            self.model.set_attn_implementation(FLOAT32)
        names = labels(preset.benchmarks)
        self.labels = Labels(preset.vision[0], preset.text[0], preset.grid, len(names)).to(self.device)
        self.weights = [*self.model.parameters(), *self.labels.parameters()]
        self.optimizers = self._optimizers()
        self.nothing = encode(" nothing", preset.benchmarks)[0]
        self.load()

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon (github.com/KellerJordan/Muon) for the matrices of the layers where the preset says so, else AdamW.

        Raises ValueError where torch, before 2.9, has no Muon.
        """
        if self.preset.muon and not hasattr(torch.optim, "Muon"):
            raise ValueError(
                f"this preset is trained with torch.optim.Muon: torch {torch.__version__} is older than 2.9"
            )
        named = self.model.named_parameters()
        matrices = [weight for name, weight in named if self.preset.muon and ".layers." in name and weight.ndim == 2]
        rest = [weight for weight in self.weights if all(weight is not one for one in matrices)]
        found: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.02)]
        if matrices:
            found.append(torch.optim.Muon(matrices, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"))
        return found

    # ------------------------------------------------------------ what survives an interruption

    @property
    def checkpoint(self) -> Path:
        return self.out / "checkpoint.pt"

    def load(self) -> None:
        """Take up the checkpoint in `out`, if there is one."""
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        if (state["preset"], state["seed"]) != (_plain(self.preset), self.seed):
            raise ValueError(f"{self.checkpoint} is of another preset, seed or number of steps; choose another folder")
        self.model.load_state_dict(state["model"])
        self.labels.load_state_dict(state["labels"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step = state["step"]

    def save(self) -> None:
        """Write the checkpoint whole or not at all."""
        state = {"preset": _plain(self.preset), "seed": self.seed, "step": self.step}
        state |= {"model": self.model.state_dict(), "labels": self.labels.state_dict()}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        self.out.mkdir(parents=True, exist_ok=True)
        part = self.checkpoint.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, self.checkpoint)

    def export(self) -> None:
        """The model and its processor, as `from_pretrained` takes them, into `out`/model."""
        self.model.save_pretrained(self.out / "model")
        build_processor(self.preset).save_pretrained(self.out / "model")

    # ------------------------------------------------------------ steps

    def run(self, report_every: int, workers: int, compiled: bool) -> None:
        """Train to the end; the first process has a progress bar, reports and checkpoints, and exports."""
        preset, saved, first = self.preset, time.monotonic(), self.processes.is_main_process
        total = preset.steps
        self.model.train()
        if compiled:  # a narrow model spends most of its time between matrix products
            for layer in (*self.model.model.vision_tower.encoder.layers, *self.model.model.language_model.layers):
                layer.compile(dynamic=True)
        with progress.bar("steps", total, self.step, shown=first) as tick:
            for batch in batches(preset, self.seed, self.step, total, workers):
                loss = self.advance(batch)
                tick(say=f"steps, loss {loss:.3f}")
                if not first:
                    continue
                if self.step % report_every == 0 or self.step in (preset.tower_steps, total):
                    print(f"step {self.step}: {self.report()}", flush=True)
                if time.monotonic() - saved > SAVE_SECONDS:
                    self.save()
                    saved = time.monotonic()
        if first:
            self.save()
            self.export()

    def advance(self, batch: Batch) -> float:
        """One optimiser step; returns its loss, of this process's part of the batch."""
        batch = batch.part(self.processes.process_index, self.processes.num_processes)
        phase = self._set_learning_rate()
        # a step draws the same, interrupted before or not; and in all processes, so that they read equally many tokens
        generator = torch.Generator().manual_seed(hash((self.seed, self.step)) % 2**63)
        with torch.autocast(self.device.type, torch.bfloat16):
            with torch.set_grad_enabled(phase != "rest"):
                states = look(self.model, batch.pixels.to(self.device))
            loss = torch.zeros((), device=self.device)
            if phase != "rest":
                loss = loss + self._tower_loss(batch, states)
            if phase != "tower":
                loss = loss + self._read_loss(batch, states, WHOLE[phase], generator)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        self._average()
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        return loss.item()

    def _average(self) -> None:
        """The gradients of all processes."""
        if self.processes.num_processes == 1:
            return
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        mean = reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, part in zip(gradients, mean.split([one.numel() for one in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def _set_learning_rate(self) -> str:
        """Warm-up and a cosine to a twentieth, a phase; the phase's name."""
        phase, step, steps = self.preset.phase(self.step)
        rate = min(1.0, (step + 1) / min(200, 1 + steps // 10))
        rate *= self.preset.learning_rate * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)
        for optimizer in self.optimizers:
            optimizer.param_groups[0]["lr"] = rate
        return phase

    def _tower_loss(self, batch: Batch, states: list[Tensor]) -> Tensor:
        """Every patch and the CLS token, by their labels."""
        keep = torch.arange(self.preset.grid**2, device=self.device).expand(len(batch.samples), -1)
        words, embedding = batch.patch_words.to(self.device), self.model.get_input_embeddings().weight
        patches = self.labels.patch_loss(self._project(states[-1], keep), keep, words, embedding, self.nothing)
        return patches + self.labels.cls_loss(states, batch.present.to(self.device))

    def _read_loss(self, batch: Batch, states: list[Tensor], whole: float, generator: torch.Generator) -> Tensor:
        """Answers and captions, from a subset of the visual tokens; no gradient to the tower."""
        features = states[-1].detach()
        keep = subset(features[:, 1:].float().cpu(), whole, generator)
        blind = torch.rand(len(keep), generator=generator) < BLIND
        text = self._pack(batch, keep, generator)
        keep = keep.to(self.device)
        hidden = read(self.model, self._project(features, keep), keep, text, blind.to(self.device))
        wanted = text.target >= 0
        each = F.cross_entropy(self.model.lm_head(hidden[wanted]).float(), text.target[wanted], reduction="none")
        caption = text.caption[wanted]
        return each[~caption].mean() + 0.5 * each[caption].mean()

    def _project(self, features: Tensor, keep: Tensor) -> Tensor:
        return self.model.model.multi_modal_projector(gather(features[:, 1:], keep))

    def _pack(self, batch: Batch, keep: Tensor, generator: torch.Generator) -> Pack:
        """A caption of the things that the kept patches touch, and questions of every task."""
        rows = []
        for sample, kept in zip(batch.samples, keep.tolist(), strict=True):
            chosen = torch.randperm(len(sample.asked), generator=generator)[:QUESTIONS].tolist()
            caption = sample.caption(set(kept), self.preset.grid)
            rows.append([(scenes.CAPTION, caption), *(sample.asked[i][1:] for i in chosen)])
        text = pack(rows, self.preset.benchmarks)
        return Pack(**{name: value.to(self.device) for name, value in vars(text).items()})

    # ------------------------------------------------------------ how it is doing

    @torch.no_grad()
    def report(self, rows: int = 128) -> str:
        """Validation: words named right in phase 1, answers right on whole images in phase 2."""
        self.model.eval()
        batch = make_batch("val", self.seed, 0, rows, self.preset)
        with torch.autocast(self.device.type, torch.bfloat16), torch.compiler.set_stance("force_eager"):
            states = look(self.model, batch.pixels.to(self.device))
            keep = torch.arange(self.preset.grid**2, device=self.device).expand(rows, -1)
            tokens = self._project(states[-1], keep)
            if self.step <= self.preset.tower_steps:
                scores = tokens.float() @ self.model.get_input_embeddings().weight.float().T
                line = _named(scores.cpu(), batch.patch_words)
            else:
                line = self._answered(batch, tokens, keep)
        self.model.train()
        return line

    def _answered(self, batch: Batch, tokens: Tensor, keep: Tensor) -> str:
        text = pack([[qa[1:] for qa in sample.asked] for sample in batch.samples], self.preset.benchmarks)
        text = Pack(**{name: value.to(self.device) for name, value in vars(text).items()})
        scores = self.model.lm_head(read(self.model, tokens, keep, text))
        first = (text.target >= 0) & (text.target != shared_tokenizer(self.preset.benchmarks).eos_token_id)
        right = (scores.argmax(-1) == text.target)[first].float().cpu()
        tasks = [(sample.benchmark, task) for sample in batch.samples for task, _, _ in sample.asked]
        lines = []
        for name in self.preset.benchmarks:
            every = known.find(name).TASKS
            parts = {task: right[[t == (name, task) for t in tasks]].mean().item() for task in every}
            each = " ".join(f"{task} {part:.2f}" for task, part in parts.items())
            lines.append(f"{name} {sum(parts.values()) / len(parts):.3f} ({each})")
        return "val answers, " + "; ".join(lines)


def subset(features: Tensor, whole: float, generator: torch.Generator) -> Tensor:
    """Which visual tokens a batch sees: sorted indices (batch, kept).

    With probability `whole` all of them, else 5 to 100 %: half of the rows at random, half along a random direction in
    feature space plus noise. No pruning method is used here, so that none is favoured afterwards.
    """
    rows, patches, width = features.shape
    if torch.rand((), generator=generator) < whole:
        return torch.arange(patches).expand(rows, -1)
    kept = max(1, round(patches * (0.05 + 0.95 * torch.rand((), generator=generator).item())))
    noise = torch.randn(rows, patches, generator=generator)
    direction = torch.randn(rows, width, 1, generator=generator)
    along = ((features - features.mean(1, keepdim=True)) @ direction).squeeze(-1)
    along = along / along.std(1, keepdim=True).clamp(min=1e-6) + 0.5 * noise
    score = torch.where(torch.rand(rows, 1, generator=generator) < 0.5, noise, along)
    return score.topk(kept).indices.sort().values


def _named(scores: Tensor, words: Tensor) -> str:
    """How often the best-scoring words of a patch are those that describe it, for patches that something touches."""
    busy = words[..., 1] >= 0
    scores, words = scores[busy], words[busy]
    count = (words >= 0).sum(-1)
    found = [
        len(set(row.topk(n).indices.tolist()) & set(given.tolist())) / n
        for row, given, n in zip(scores, words, count.tolist(), strict=True)
    ]
    return f"val words named {sum(found) / len(found):.3f}"


def _plain(preset: Preset) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(preset).items()}


def train(
    out: Path,
    preset: str = "small",
    tower_steps: int | None = None,
    read_steps: int | None = None,
    seed: int = 0,
    report_every: int = 250,
    workers: int = 1,
    compiled: bool | None = None,
) -> LlavaForConditionalGeneration:
    """Train a reference model; go on from `out`/checkpoint.pt if it is there; leave model and processor in `out`/model.

    `preset` is one of PRESETS; the numbers of steps default to the preset's. `workers` processes draw scenes.
    The layers are compiled where there is a C++ compiler, unless `compiled` says otherwise. Raises ValueError for
    an unknown preset, where `out` holds a checkpoint of other settings, where processes cannot share its batches
    evenly, and where torch is too old for its optimiser.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose from {', '.join(PRESETS)}")
    chosen = PRESETS[preset]
    chosen = replace(
        chosen,
        tower_steps=chosen.tower_steps if tower_steps is None else tower_steps,
        read_steps=chosen.read_steps if read_steps is None else read_steps,
    )
    trainer = Trainer(Path(out), chosen, seed)
    trainer.run(report_every, workers, shutil.which("g++") is not None if compiled is None else compiled)
    return trainer.model.eval()
