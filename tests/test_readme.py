"""What the texts tell a reader to type: every Python block runs, and nothing installs the stranger's package `vtc`."""

import re
import subprocess
from pathlib import Path

import pytest

import vtc
from vtc import install
from vtc.eval import scenes
from vtc.eval.reference import PATH

ROOT = Path(__file__).parents[1]
OURS = ("vtc", "eval", "demo", "integrations", "tests")


def python_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_python_blocks_of_the_readme_run(tmp_path, monkeypatch):
    """In order, as one program, on the shipped model in the place of public checkpoints, beside a scene.png."""
    blocks = python_blocks((ROOT / "README.md").read_text())
    assert len(blocks) >= 2
    scenes.example("test", 0, 0).image.save(tmp_path / "scene.png")
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, block in enumerate(blocks):
        local = re.sub(r'"[\w.-]+-hf/[\w.-]+"', repr(str(PATH)), block)
        exec(compile(local, f"README.md, Python block {number}", "exec"), names)


# -- the name to install by -----------------------------------------------------------------------------------------

STRANGER = re.compile(r"""install[^\n&;|]*?[\s'"]vtc(?![\w./-])|\bvtc\[[a-z]|\bvtc @ |\bvtc-\d|version\("vtc"\)""")
"""Ways to name the distribution `vtc`, which on PyPI is another project."""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("pip install vtc", True),
        ("pip install 'vtc[eval]'", True),
        ("pip install -c constraints.txt vtc", True),
        ("vtc[demo] @ https://example.org/x.whl", True),
        ("vtc-0.1.0-py3-none-any.whl", True),
        ('version("vtc")', True),
        ("pip install 'visual-token-compression[demo]' && vtc demo", False),
        ("pip install . && vtc --help", False),
        ("vtc-cls", False),
    ],
)
def test_the_strangers_name_is_recognised(text, found):
    assert bool(STRANGER.search(text)) is found


def test_no_text_of_ours_names_the_strangers_package():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    files = [ROOT / name for name in tracked if name] or [file for part in OURS for file in (ROOT / part).rglob("*")]
    texts = [
        file for file in files if file.suffix in (".py", ".md", ".toml", ".txt", ".sh", ".yaml", "") and file.is_file()
    ]
    assert ROOT / "README.md" in texts or ROOT / "vtc/cli.py" in texts
    for file in texts:
        if file != Path(__file__):
            lines = file.read_text(encoding="utf-8").splitlines()
            assert [line for line in lines if STRANGER.search(line)] == [], file


def test_the_hint_is_what_is_to_be_typed(monkeypatch):
    assert install.install_line("eval") == "pip install 'visual-token-compression[eval]'"
    monkeypatch.setattr(install, "DISTRIBUTION", "visual-token-compression-not-installed")
    assert install.install_line("eval") == f"pip install '{Path(vtc.__file__).parents[1]}[eval]'"


def test_the_distribution_has_the_version_of_the_package():
    from importlib.metadata import version

    assert version(install.DISTRIBUTION) == vtc.__version__
