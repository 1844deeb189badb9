"""A method and a family of another package: that of docs/write-your-own.md, built, installed and used as it stands."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "write-your-own.md"
TINY = f"""
import sys
sys.path.append({str(Path(__file__).parent)!r})
import models, oracle, torch, transformers as hf
import vtc

torch.manual_seed(0)
config = hf.DeepseekVLConfig(
    vision_config=hf.SiglipVisionConfig(**models.TOWER, image_size=48, patch_size=8),
    text_config=hf.LlamaConfig(**models.TEXT),
    image_token_id=models.IMAGE,
)
model = models.finished(hf.DeepseekVLForConditionalGeneration(config))
ids = torch.tensor([[1, 5, *[99] * 36, 6, 7, 8], [1, 9, *[99] * 36, 3, 2, 4]])
inputs = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(2, 3, 48, 48))
"""
"""A model of a family that vtc itself does not know, and a prompt."""

MASKED = """
@torch.no_grad()
def same_as_masked(method, budget):
    full = model(**inputs).logits[:, -3:]
    vtc.wrap(model, method, budget=budget)
    found, trace = model(**inputs).logits[:, -3:], model.vtc.trace
    vtc.unwrap(model)
    with oracle.masked_layers(model, oracle.visible_keys(model, trace, inputs)):
        masked = model(**inputs, use_cache=False).logits[:, -3:]
    assert (found - masked).abs().max() < 1e-4
    assert (found - full).abs().max() > 1e-2
    return trace.average_tokens.tolist()
"""
"""Dropping is masking, by the same oracle as for vtc's own families."""


def files() -> dict[str, str]:
    """The package on the page: each block that comes after a line with its file's name."""
    text = PAGE.read_text()
    found = dict(re.findall(r"`([\w/.]+\.(?:py|toml))`[^`\n]*:\n\n```\w+\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    return found | {"my_tokens/__init__.py": ""}


def process(home: Path, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A new Python that has the installed package on its path, when it has ended."""
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=cwd or home,
        capture_output=True,
        text=True,
        timeout=600,
    )


def python(home: Path, *arguments: str, cwd: Path | None = None) -> str:
    """What it prints; it has to end well."""
    done = process(home, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with the package as pip has installed it."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name, text in files().items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--target", str(target))
    python(source, "-m", "pip", "install", "-q", *options, str(source))
    return target


def test_the_page_shows_the_whole_package():
    assert {"pyproject.toml", "my_tokens/question.py", "my_tokens/length.py", "my_tokens/deepseek_vl.py"} < {*files()}


NAMES = ("question", "my_tokens.question:Question", "my_tokens.length:Length")
PROGRAMS = {
    "family": f"{TINY}{MASKED}assert same_as_masked('vtc-cls', 9) == same_as_masked('uniform', 9) == [9, 9]",
    "methods": f"{TINY}{MASKED}for name in {NAMES}:\n"
    "    assert all(abs(tokens - 18) < 1 for tokens in same_as_masked(name, 0.5)), name",
    "page": re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)[-1],
}
"""What a user of the package runs."""
EACH = """
import json, sys, traceback
errors = {}
for name, program in json.loads(sys.argv[1]).items():
    try:
        exec(program, {"__name__": "__main__"})
    except Exception:
        errors[name] = traceback.format_exc()
print(json.dumps(errors))
"""
"""One after the other in one Python, which takes seconds to load torch and transformers."""


@pytest.fixture(scope="module")
def errors(home):
    """By program: how those ended that failed."""
    return json.loads(python(home, "-c", EACH, json.dumps(PROGRAMS)).splitlines()[-1])


def test_a_family_of_another_package_by_its_entry_point(errors):
    assert "family" not in errors, errors["family"]


def test_methods_of_another_package_on_its_family(errors):
    """By entry point and by class; within a token of the budget, as layers are few."""
    assert "methods" not in errors, errors["methods"]


def test_without_the_package_neither_is_known(tmp_path):
    script = TINY + (
        "for model, method in ((model, 'random'), (None, 'question'), (None, 'my_tokens.question:Question')):\n"
        "    try:\n"
        "        vtc.wrap(model, method) if model is not None else vtc.find_method(method)\n"
        "    except (TypeError, ValueError) as error:\n"
        "        print(error)\n"
    )
    family, name, path = python(tmp_path, "-c", script).splitlines()[-3:]
    assert "no adapter for DeepseekVLForConditionalGeneration" in family
    assert "unknown method 'question'" in name
    assert "No module named 'my_tokens'" in path


def test_the_last_program_of_the_page_runs(errors):
    assert "page" not in errors, errors["page"]


def test_the_command_of_the_page_runs_and_refuses_answers_of_other_code(home, tmp_path):
    """The code of a method is part of what a run's answers depend on, wherever it lives."""
    (command,) = re.findall(r"^```\nvtc (.*)\n```$", PAGE.read_text(), re.MULTILINE)
    arguments = ("-m", "vtc", *command.split())
    python(home, *arguments, cwd=tmp_path)
    rows = json.loads((tmp_path / "out" / "mine" / "summary.json").read_text())
    read = {row["method"]: row["tokens"] for row in rows}
    for method in ("question", "my_tokens.length:Length"):
        assert read[method] == pytest.approx(read["full"] / 2, abs=1)
    file = home / "my_tokens" / "length.py"
    file.write_text(file.read_text().replace(".norm(dim=-1)", ".abs().amax(dim=-1)"))
    done = process(home, *arguments, cwd=tmp_path)
    assert done.returncode == 1
    assert "holds another run" in done.stderr
