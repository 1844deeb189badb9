"""What the texts tell a reader to type: Python blocks run, commands parse, links lead somewhere, all methods and
families are named, and nothing installs the stranger's package `vtc`."""

import importlib.util
import re
import shlex
import subprocess
from pathlib import Path

import methods_table
import pytest
import typer
from models import FAMILIES

import vtc
from vtc import cli, install
from vtc.cli import about
from vtc.eval import scenes
from vtc.eval.reference import SHIPPED
from vtc.methods import described

ROOT = Path(__file__).parents[1]
OURS = ("vtc", "eval", "demo", "integrations", "tests", "docs")
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "demo/README.md",
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")),
)
RUNNABLE = [page for page in PAGES if page != "docs/write-your-own.md"]
"""But for the page that test_outside.py runs, once its package is installed."""


def blocks(page: str, language: str = "") -> list[str]:
    """The fenced blocks of a page; without a language those of commands."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


SERVED = "127.0.0.1:8000"  # tests/test_serve_process.py runs what is said to `vtc serve`
WITH_A_SERVER = "demo/README.md"  # tests/test_demo_take.py runs that program, beside a server


@pytest.mark.parametrize(
    "page", [page for page in RUNNABLE if "```python" in (ROOT / page).read_text() and page != WITH_A_SERVER]
)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """In order, as one program, on the shipped model in the place of public checkpoints, beside a scene.png."""
    scenes.example("test", 0, 0).image.save(tmp_path / "scene.png")
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, block in enumerate(blocks(page, "python")):
        if SERVED in block:
            continue
        local = re.sub(r'"[\w.-]+-hf/[\w.-]+"', repr(str(SHIPPED["reference"])), block)
        exec(compile(local, f"{page}, Python block {number}", "exec"), names)


def test_the_readme_is_short_and_has_a_program():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    assert "vtc.wrap(" in "".join(blocks("README.md", "python"))


# -- commands -------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """The arguments of each call of `vtc` in lines of shell: alone, behind `-m`, or within `$( )`."""
    text = re.sub(r"\\\n", " ", text)
    text = re.sub(r"\$\((.*?)\)", r"X\n\1\n", text)  # what is called within a line gets a line of its own
    calls = []
    for part in re.split(r"\n|&&|;", text):
        words = shlex.split(part, comments=True)
        if words[:1] == ["vtc"]:
            calls.append(words[1:])
        elif "-m" in words and words[words.index("-m") + 1] == "vtc":
            calls.append(words[words.index("-m") + 2 :])
    return calls


VTC = typer.main.get_command(cli.app)


def refuse_unknown(arguments: list[str], whole: bool) -> None:
    """Raises for a command or an option that does not exist; of a `whole` call also for what is missing or too much."""
    command, name = VTC, "vtc"
    while arguments and arguments[0] in getattr(command, "commands", ()):
        command, name = command.commands[arguments[0]], arguments[0]
        arguments = arguments[1:]
    known = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    unknown = [word for word in arguments if word.startswith("--") and word.split("=")[0] not in known]
    assert not unknown, f"vtc {name} has no {unknown}"
    assert not hasattr(command, "commands") or {*arguments} <= known, f"vtc has no {arguments}"
    if whole and not hasattr(command, "commands"):
        command.make_context(name, list(arguments))


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])  # that one also says what was
def test_commands_parse(page):
    for block in blocks(page):
        for call in commands(block):
            refuse_unknown(call, whole=True)
    for span in re.findall(r"`(vtc [^`]*)`", (ROOT / page).read_text()):
        refuse_unknown(*commands(span), whole=False)


@pytest.mark.parametrize("page", PAGES)
def test_what_is_to_be_run_is_there(page):
    """Modules behind `-m`, and files of this repository behind `python` and `bash`."""
    text = (ROOT / page).read_text()
    for module in re.findall(r"-m (vtc[\w.]*)", text):
        assert importlib.util.find_spec(module), module
    for file in re.findall(r"(?:python|bash) ((?:tests|eval)/[\w./]+)", text):
        assert (ROOT / file).is_file(), file


def test_the_pages_show_commands():
    shown = [call for page in PAGES for block in blocks(page) for call in commands(block)]
    assert {"ask", "bench", "demo", "eval", "scene", "tune", "train"} <= {call[0] for call in shown}


@pytest.mark.parametrize(
    ("arguments", "whole"),
    [(["eval", "--method", "random"], False), (["evaluate"], False), (["scene"], True), (["ask", "a", "b", "c"], True)],
)
def test_what_does_not_parse_is_found(arguments, whole):
    with pytest.raises(Exception, match=r"has no|Missing|unexpected"):
        refuse_unknown(arguments, whole)


def test_calls_are_found_wherever_they_stand():
    text = "a=1 torchrun -m vtc eval --out x # vtc no\nb $(vtc tasks) \\\n  c && vtc demo; pip install vtc-cls\n"
    assert commands(text) == [["eval", "--out", "x"], ["tasks"], ["demo"]]


# -- what is named --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", (ROOT / page).read_text()):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


def test_the_pages_name_all_methods_and_all_families():
    named = re.findall(r"^\| `([\w-]+)`", (ROOT / "docs" / "methods.md").read_text(), re.MULTILINE)
    assert sorted(named) == sorted(described())
    best = re.findall(r"^\| `([\w-]+)`", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert 8 <= len(best) == len({*best} & {*named})
    assert "`smaller-image`" in (ROOT / "README.md").read_text()
    table = (ROOT / "docs" / "families.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [*FAMILIES]


@pytest.mark.parametrize("page", methods_table.PAGES)
def test_the_tables_of_methods_are_what_the_command_prints(page):
    """`python tests/methods_table.py` writes them, after a method or a figure has changed."""
    best = methods_table.PAGES[page]
    assert methods_table.MARKED.search(page.read_text())[2] == about.methods_table(best)


def test_contributing_names_all_rooms():
    library = Path(vtc.__file__).parent
    own = [path for path in library.iterdir() if not path.is_symlink()]
    rooms = {path.stem for path in own if path.suffix == ".py" or (path / "__init__.py").is_file()}
    table = re.findall(r"^\| (`.*?) \|", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert {name for row in table for name in re.findall(r"`(\w+)/?`", row)} == rooms - {"__init__", "__main__"}


@pytest.mark.parametrize("folder", ["core", "cache"])
def test_contributing_names_what_is_in_a_folder(folder):
    (row,) = re.findall(rf"^\| `{folder}/` \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    rooms = {path.stem for path in (Path(vtc.__file__).parent / folder).glob("*.py")} - {"__init__"}
    assert {*re.findall(r"`(\w+)`", row)} == rooms


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
