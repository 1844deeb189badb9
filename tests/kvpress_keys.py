"""What kvpress keeps and what vtc keeps, of the same random tensors.

Not of the suite: kvpress wants another transformers than vtc. `python tests/kvpress_keys.py PYTHON`, where PYTHON is
that of an environment with kvpress in it, makes a tiny LLaVA with random weights and a prompt, lets that environment
score the keys of its text model over the same embeddings, and compares scores and the visual tokens that heads keep.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

PRESSES = {  # SnapKV without pooling: theirs is along the text, ours on the image's grid
    "snapkv, last 8 queries": ("SnapKVPress", {"window_size": 8, "kernel_size": 1}),
    "tova": ("TOVAPress", {}),
    "observed attention": ("ObservedAttentionPress", {}),
}
BUDGETS = (8, 36, 72)


class Recorder:
    """A score function of kvpress that keeps what it returned."""

    def __init__(self, score):
        self.score, self.scores = score, []

    def __call__(self, *args, **kwargs):
        self.scores.append(self.score(*args, **kwargs))
        return self.scores[-1]


def theirs(folder: Path) -> None:
    """In kvpress's environment: the scores of each press, (layers, key_heads, length)."""
    import kvpress
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    tensors = load_file(folder / "tensors.safetensors")
    embeds = tensors.pop("inputs_embeds")
    config = LlamaConfig(**json.loads((folder / "config.json").read_text()), attn_implementation="eager")
    model = LlamaForCausalLM(config).eval()
    missing = model.load_state_dict(tensors, strict=False)
    assert not missing.unexpected_keys, missing
    found = {}
    for name, (press_name, settings) in PRESSES.items():
        press = getattr(kvpress, press_name)(compression_ratio=0.5, **settings)
        press.score = Recorder(press.score)
        with press(model), torch.no_grad():
            model(inputs_embeds=embeds, past_key_values=DynamicCache(), output_attentions=True)
        found[name] = torch.cat(press.score.scores).contiguous()
    save_file(found, folder / "scores.safetensors")


def compare(python: str) -> None:
    import torch
    from models import TEXT, llava, prompt, visual
    from safetensors.torch import load_file, save_file

    import vtc
    from vtc.methods.h2o import H2O
    from vtc.methods.snapkv import SnapKV
    from vtc.methods.tova import TOVA

    ours = {"snapkv, last 8 queries": SnapKV(window=8, kernel=1), "tova": TOVA(), "observed attention": H2O()}
    model = llava(grid=12)
    inputs, taken = prompt(model, (1,), length=20), []
    language = model.base_model.language_model
    handle = language.register_forward_pre_hook(
        lambda module, args, kwargs: taken.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    places = visual(inputs["input_ids"])[0]
    with tempfile.TemporaryDirectory() as folder:
        weights = {f"model.{name}": weight.contiguous() for name, weight in language.state_dict().items()}
        save_file({**weights, "inputs_embeds": taken[0]}, Path(folder) / "tensors.safetensors")
        (Path(folder) / "config.json").write_text(json.dumps(TEXT))
        subprocess.run([python, __file__, "--theirs", folder], check=True)
        scored = load_file(Path(folder) / "scores.safetensors")
    for name, method in ours.items():
        same, total, off = 0, 0, 0.0
        for budget in BUDGETS:
            with vtc.compressed(model, method, budget) as trace, torch.no_grad():
                model(**inputs)
            for layer, scores in enumerate(scored[name][..., places]):
                kept = trace.held(layer)[0].expand(len(scores), -1)
                for head, best in enumerate(scores.topk(budget).indices.tolist()):
                    same += len({*best} & {*kept[head].tolist()})
                    total += budget
                shares = (trace.scores(layer)[0].expand_as(scores), scores)
                one, other = (x / x.sum(-1, keepdim=True) for x in shares)
                off = max(off, float(((one - other).abs() / other).max()))
        print(f"{name}: {same} of {total} keys that are kept are the same; scores differ by {off:.1e} of themselves")


if __name__ == "__main__":
    theirs(Path(sys.argv[2])) if sys.argv[1] == "--theirs" else compare(sys.argv[1])
