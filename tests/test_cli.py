"""The command line, as real processes."""

import ast
import inspect
import json
import re
import runpy
import socket
import subprocess
import sys

import pytest
import torch
import typer
from eval_fixtures import run_vtc, start_vtc, tiny  # noqa: F401 (a fixture)
from PIL import Image, ImageChops
from typer.testing import CliRunner

import vtc
from vtc import cli
from vtc.cli import pictures, terminal, training
from vtc.cli.arguments import check_address, parse_budget, parse_budgets
from vtc.eval import scenes
from vtc.eval.ask import Answer
from vtc.methods import described


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


def test_what_methods_prints_is_what_the_methods_say():
    known = {
        name: (method.__doc__.strip().splitlines()[0], method.paper) for name, method in vtc.list_methods().items()
    }
    assert described() == known


def test_version():
    assert run_vtc("--version").stdout == f"{vtc.__version__}\n"


LIGHT = """
import sys
from vtc import cli
try:
    cli.main()
except SystemExit as end:
    code = end.code or 0
else:
    code = 0
print(code, *sorted({"torch", "transformers", "numpy", "sklearn"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("--help", 0),
        ("--version", 0),
        ("methods", 0),
        ("eval --help", 0),
        ("eval --budgets lots", 2),
        ("eval --methods fast", 1),
        ("bench --dtype int3", 2),
        ("bench --methods fast", 1),
        ("peers --dtype int3", 2),
        ("throughput --budget 64", 2),
        ("faithfulness --methods fast", 1),
        ("tune --method fast", 1),
        ("ask scene.png", 2),
        ("ask scene.png ?  --budget 2.5", 2),
        ("ask nothing.png what", 1),
        ("ask PICTURE what --method fast", 1),
        ("ask PICTURE what --model ./nothing", 1),
        ("ask PICTURE what --model nobody/nothing", 1),
        ("ask PICTURE what --save-overlay kept.abc", 1),
        ("scene --out scene.abc", 1),
        ("demo --model ./nothing", 1),
    ],
)
def test_neither_help_nor_errors_wait_for_torch(picture, monkeypatch, arguments, code):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    words = [str(picture) if word == "PICTURE" else word for word in arguments.split()]
    done = subprocess.run([sys.executable, "-c", LIGHT, *words], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == str(code)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["demo", "serve"])
def test_an_address_in_use_is_told_before_a_model_is_loaded(command):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = [command, "--port", str(taken.getsockname()[1])]
        done = subprocess.run([sys.executable, "-c", LIGHT, *words], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "1"
    assert re.fullmatch(r"error: Address already in use .*: choose another --port or --host\n", done.stderr)


@pytest.mark.parametrize("host", ["127.0.0.1", "[127.0.0.1]"])  # as IPv6 is written, which not every machine has
def test_a_host_may_stand_in_brackets(host):
    assert check_address(host, 0) == "127.0.0.1"


@pytest.mark.parametrize("command", [*cli.COMMANDS.values(), training.reference, training.atp, training.tokenbutler])
def test_every_option_is_read(command):
    (function,) = ast.parse(inspect.getsource(command)).body
    names = (node for line in function.body for node in ast.walk(line) if isinstance(node, ast.Name))
    read = {name.id for name in names if isinstance(name.ctx, ast.Load)}
    assert {argument.arg for argument in function.args.args} - {"context"} <= read


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("eval --tasks pope --suffix .", "--suffix: for vtc's own benchmarks, not for --tasks"),
        ("eval --tasks pope --max-new-tokens 8 --by-task", "--max-new-tokens, --by-task: for vtc's own benchmarks"),
        ("eval --gen-kwargs max_new_tokens=8", "--gen-kwargs: for --tasks, not for vtc's own benchmarks"),
        ("eval --include-path .", "--include-path: for --tasks, not for vtc's own benchmarks"),
        ("eval --tasks pope --include-path nowhere", "'nowhere' does not exist"),
        ("eval --dry-run --by-task", "--by-task: a dry run counts nothing"),
        ("eval --faithfulness", "No such option: --faithfulness"),
        ("faithfulness --budgets 0.5", "No such option: --budgets"),
        ("tune --questions why.txt", "--questions: scenes bring their own"),
        ("fit --images pages --questions why.txt", "--questions: pages bring their own"),
        ("layers --benchmark captions", "answers of captions are long, and not right or wrong"),
        ("bench --peers", "No such option: --peers"),
        ("peers --methods fastv", "No such option: --methods"),
        ("peers --new-tokens 2", "No such option: --new-tokens"),
        ("serve --method none --budget 0.5 --adapt 0.5", "--budget, --adapt: --method none reads all visual tokens"),
        ("serve --adapt 0.5,0.25 --budget 0.25", "--budget: --adapt names the budgets"),
        ("throughput --budget 64", "use a fraction up to 0.5"),
        ("throughput --budget 51%", "use a fraction up to 0.5"),
        ("load --clients a", "'a' is no count: use whole numbers from 1 on"),
        ("load --clients 4,0", "'0' is no count: use whole numbers from 1 on"),
        ("load --rates 0", "'0' are no rates: use numbers above 0"),
        ("load --rates 1,x", "'1,x' are no rates: use numbers above 0"),
        ("load --rates inf", "'inf' are no rates: use numbers above 0"),
        ("load --rates nan", "'nan' are no rates: use numbers above 0"),
        ("eval --seed -1", "Invalid value for '--seed': Input should be greater than or equal to 0"),
        ("compare . vtc-cls --seed -1", "Invalid value for '--seed': Input should be greater than or equal to 0"),
        ("table --seed -1", "Invalid value for '--seed': Input should be greater than or equal to 0"),
        ("tune --seed -1", "Invalid value for '--seed': Input should be greater than or equal to 0"),
        ("layers --seed -1", "Invalid value for '--seed': Input should be greater than or equal to 0"),
    ],
)
def test_what_a_command_would_not_read_is_refused(words, message):
    done = CliRunner().invoke(cli.app, words.split(), env={"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"})
    assert done.exit_code == 2
    assert message in done.output


@pytest.mark.parametrize(
    ("command", "out", "message"),
    [
        ("layers", "file", "file is a file where a folder is to be: choose another --out"),
        ("faithfulness", "file/in/it", "file is a file where a folder is to be: choose another --out"),
        ("tune", ".", " is a folder: name a file in it with --out"),
        ("fit", "file/fitted.json", "file is a file where a folder is to be: choose another --out"),
    ],
)
def test_where_nothing_can_be_written_is_told_before_the_work(tmp_path, monkeypatch, command, out, message):
    (tmp_path / "file").touch()
    monkeypatch.setattr("vtc.eval.reader.load", lambda *_, **__: pytest.fail("a model was loaded"))
    done = run_vtc(command, "--out", tmp_path / out)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_one_device_for_several_processes_is_refused():
    words = ("eval", "--tasks", "pope", "--device", "cuda:1")
    done = CliRunner().invoke(cli.app, words, env={"WORLD_SIZE": "2", "COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == 2
    assert "--device: each of several processes takes a device of its own" in done.output


def test_import_is_light_and_no_submodule_hides_a_function():
    """Submodules and public names stay apart, in whatever order they are loaded."""
    code = (
        "import sys, vtc; assert 'torch' not in sys.modules\n"
        "from vtc.methods.fastv import FastV\n"
        "import pkgutil, importlib\n"
        "modules = {module.name for module in pkgutil.iter_modules(vtc.__path__)} - {'__main__'}\n"
        "assert not modules & set(vtc.__all__)\n"
        "[importlib.import_module('vtc.' + name) for name in modules]\n"
        "assert vtc.list_methods()['fastv'] is FastV is vtc.FastV\n"
        "assert vtc.adapter.find and set(vtc.__all__) <= set(dir(vtc)) and not hasattr(vtc, 'nothing')\n"
        "from vtc import *\n"
        "assert wrap is vtc.wrap and prefix is vtc.prefix"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


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
    assert (done.returncode, done.stderr) == (0, f"{painted}: written, dropped patches are dark\n")
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
        (["--method", "fast"], 1, "unknown method 'fast'; vtc knows atp, bits"),
        (["--method", "fastv", "--budget", "1"], 1, "cannot reach 1 of 16 visual tokens"),
        (["--save-overlay", "overlay.abc"], 1, "overlay.abc: name an image file"),
        (["--model", "./nothing-here"], 1, "nothing-here is not a model folder"),
        (
            ["--model", "nobody/nothing"],
            1,
            "no such folder, those that ship are reference, reference-pages, and",
        ),
    ],
)
def test_errors_are_one_line(tiny, picture, options, code, message):  # noqa: F811
    done = run_vtc("ask", picture, "what color", "--model", tiny, *options)
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    if code == 1:
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # runpy's, of a module that others have imported
@pytest.mark.parametrize("name", ["promise", "pareto"])
def test_errors_of_the_modules_that_are_run_are_one_line_too(tmp_path, monkeypatch, capsys, name):
    (tmp_path / "config.json").write_text("{")
    words = {"promise": [tmp_path], "pareto": ["--model", tmp_path / "none", "--out", tmp_path / "out"]}[name]
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"vtc.eval.{name}", run_name="__main__")
    said = capsys.readouterr().err
    assert end.value.code == 1
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1


def test_a_file_that_is_no_image(tiny):  # noqa: F811
    done = run_vtc("ask", __file__, "what color", "--model", tiny)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "not an image" in done.stderr


@pytest.mark.parametrize(
    ("question", "code", "message"),
    [(" ", 2, "the question is empty"), ("what is <image> there", 1, "<image>, which stands for an image")],
)
def test_questions_that_are_refused(tiny, picture, question, code, message):  # noqa: F811
    done = run_vtc("ask", picture, question, "--model", tiny)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr


def test_stdout_is_the_answer_and_stderr_all_else(tiny, tmp_path):  # noqa: F811
    """A palette with transparency in bytes makes Pillow warn; one token and too many tokens are said."""
    path = tmp_path / "palette.png"
    Image.new("P", (80, 80), 1).save(path, transparency=bytes([0, 128]))
    for run, budget, kept, note in (
        (start_vtc, 1, 1, "note: a budget of 1 is one visual token; 1.0 and 100% are all of them"),
        (run_vtc, 99, 16, "note: a budget of 99 is above the image's 16 visual tokens: none are dropped"),
    ):
        done = run("ask", path, "what color", "--model", tiny, "--budget", budget, "--max-new-tokens", 2)
        assert len(done.stdout.splitlines()) == 1
        measured, said = done.stderr.splitlines()
        assert re.fullmatch(rf"{kept} of 16 visual tokens, \d+\.\d+ s", measured)
        assert said == note


def test_an_empty_answer_is_said(capsys):
    pictures._print_answers({"vtc-cls, 4": Answer("", 16, 4.0, torch.arange(4), 0.1)})
    assert capsys.readouterr().out == "(no answer)\n"


def test_a_scene_and_the_shipped_model(tmp_path):
    out = tmp_path / "scene.png"
    done = run_vtc("scene", "--out", out, "--number", 6)
    expected = scenes.example("test", 0, 6)
    assert done.stdout == f"{out}: written\nquestion: {expected.question}\nanswer: {expected.answer}\n"
    with Image.open(out) as image:
        assert not ImageChops.difference(image, expected.image).getbbox()
    first = scenes.example("test", 0, 0)
    asked = run_vtc("ask", "scene", first.question)
    assert asked.stdout == f"{first.answer}\n"
    assert "knows only" not in asked.stderr


def test_the_shipped_model_says_that_it_does_not_know_photos(picture):
    done = run_vtc("ask", picture, "what is this?")
    assert done.returncode == 0
    assert "knows only its own pictures" in done.stderr
    assert "vtc ask scene" in done.stderr


def test_bench_tells_how_far_it_is_when_piped(tiny):  # noqa: F811
    done = run_vtc("bench", "--model", tiny, "--budgets", "0.5,4,99", "--rounds", 1, "--new-tokens", 1)
    assert done.returncode == 0
    assert "round 1" not in done.stdout
    one, *steps, above = done.stderr.splitlines()
    assert one == "note: one round has no range, so nothing tells a gain from chance"
    assert above == "note: a budget of 99 is above the image's 16 visual tokens: none are dropped"
    assert steps[:2] == ["preparing the prompts", "warming up, 1 of 7"]
    assert re.fullmatch(r"round 1 of 1, 7 of 7, about \d+ s left", steps[-1])


def test_the_bar_of_eval_stays_out_of_its_table(tiny, tmp_path):  # noqa: F811
    out = tmp_path / "run"
    done = run_vtc("eval", "--model", tiny, "--methods", "random", "--budgets", "4", "--limit", 1, "--out", out)
    assert done.returncode == 0
    assert "random" in done.stdout
    assert "questions ━" not in done.stdout
    assert "questions ━" in done.stderr


def test_peers_and_throughput_are_measured_and_written(tiny, tmp_path):  # noqa: F811
    few = ("--model", tiny, "--rounds", 1, "--out", tmp_path)
    done = run_vtc("peers", "--budgets", "0.5", *few)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("output_attentions") == 2
    found = json.loads((tmp_path / "peers.json").read_text())
    assert list(found) == ["model", "dtype", "attention", "device", "case", "rows"]
    assert [(row["method"], row["budget"], row["run again"]["agreement"]) for row in found["rows"]] == [
        ("vtc-cls", 0.5, 1.0),
        ("fastv", 0.5, 1.0),
    ]
    done = run_vtc("throughput", "--budget", "25%", "--count", 2, "--new-tokens", 1, *few)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "throughput.json").read_text())
    assert list(found) == ["model", "budget", "dtype", "device", "rounds", "seconds"]
    assert (found["budget"], found["device"]) == (0.25, "cpu")
    assert all(title in done.stdout for title in found["seconds"])
    assert [len(case) for case in found["seconds"].values()] == [3, 3]


def test_a_device_that_is_full_is_told_in_one_line(capsys):
    with pytest.raises(SystemExit) as end, terminal.errors_in_a_line():
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 20 GiB")
    assert end.value.code == 1
    assert capsys.readouterr().err == (
        "error: CUDA out of memory. Tried to allocate 20 GiB: a smaller batch needs less\n"
    )
    with pytest.raises(RuntimeError, match="a defect of ours"), terminal.errors_in_a_line():
        raise RuntimeError("a defect of ours")
