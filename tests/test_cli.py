"""The command line, as real processes."""

import re

import pytest
import typer
from eval_fixtures import run_vtc, tiny  # noqa: F401 (a fixture)
from PIL import Image

from vtc.cli import parse_budget, parse_budgets


@pytest.mark.parametrize(
    ("text", "budget"),
    [("64", 64), ("0", 0), ("1", 1), ("1.0", 1.0), ("0.25", 0.25), ("25%", 0.25), (" 12.5% ", 0.125)],
)
def test_budgets(text, budget):
    parsed = parse_budget(text)
    assert parsed == budget
    assert type(parsed) is type(budget)


@pytest.mark.parametrize("text", ["", "abc", "-1", "1.5", "0.0", "0%", "101%", "nan", "inf", "%"])
def test_what_is_no_budget(text):
    with pytest.raises(typer.BadParameter):
        parse_budget(text)


def test_lists_of_budgets():
    assert parse_budgets("0.5, 11%,64,") == (0.5, 0.11, 64)
    with pytest.raises(typer.BadParameter):
        parse_budgets(" , ")


def test_help_teaches():
    done = run_vtc("--help")
    assert done.returncode == 0
    for word in ("eval", "ask", "methods", "env", "train"):
        assert re.search(rf"\b{word}\b", done.stdout)
    assert "vtc ask scene.png" in run_vtc("ask", "--help").stdout


def test_methods_lists_all_with_paper():
    done = run_vtc("methods")
    assert done.returncode == 0
    for word in ("vtc-cls", "fastv", "random", "uniform", "2412.05819", "2403.06764"):
        assert word in done.stdout


def test_env_prints_versions():
    done = run_vtc("env")
    assert done.returncode == 0
    for name in ("python", "vtc", "torch", "transformers"):
        assert re.search(rf"^{name}: \d+\.\d+", done.stdout, re.MULTILINE)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (80, 80), (200, 100, 50)).save(path)
    return path


def test_ask_compares_and_saves_an_overlay(tiny, picture, tmp_path):  # noqa: F811
    painted = tmp_path / "overlay.png"
    done = run_vtc(
        *("ask", picture, "what color is the", "--model", tiny, "--budget", "25%", "--compare"),
        *("--save-overlay", painted, "--max-new-tokens", 3),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 of 16" in done.stdout
    assert "16 of 16" in done.stdout
    with Image.open(painted) as image:
        cells = [image.getpixel((x * 20 + 10, y * 20 + 10)) for y in range(4) for x in range(4)]
    assert cells.count((200, 100, 50)) == 4
    assert cells.count((30, 15, 8)) == 12


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--budget", "lots"], 2, "is no budget"),
        (["--no-such-option"], 2, "No such option"),
        (["--method", "fast"], 1, "unknown method 'fast'; vtc knows atp, fastv"),
        (["--method", "fastv", "--budget", "1"], 1, "cannot reach 1 of 16 visual tokens"),
        (["--save-overlay", "overlay.abc"], 1, "overlay.abc: name an image file"),
        (["--model", "./nothing-here"], 1, "nothing-here is not a model folder"),
    ],
)
def test_errors_are_one_line(tiny, picture, options, code, message):  # noqa: F811
    done = run_vtc("ask", picture, "what color", "--model", tiny, *options)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    if code == 1:
        assert len(done.stderr.splitlines()) == 1


def test_a_file_that_is_no_image(tiny):  # noqa: F811
    done = run_vtc("ask", __file__, "what color", "--model", tiny)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "not an image" in done.stderr
