"""The house: arrows that point one way, rooms of a size, and names that a type checker finds."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vtc
from vtc.eval import folder

LIBRARY = Path(vtc.__file__).parent
MODULES = {
    ".".join(("vtc", *path.relative_to(LIBRARY).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in LIBRARY.rglob("*.py")
}
BUILT_ON_IT = ("vtc.methods.", "vtc.cli", "vtc.serve", "vtc.__main__")
LIBRARY_ALONE = [name for name in MODULES if not name.startswith(BUILT_ON_IT)]


def imported(name: str) -> set[str]:
    """The modules of the library that one imports: anywhere in it, for type checkers alone too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports relatively"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys() - {name}


def test_imports_make_no_circle():
    arrows = {name: imported(name) for name in MODULES}

    def reached(name: str) -> set[str]:
        seen, todo = set(), [name]
        while todo:
            new = arrows[todo.pop()] - seen
            seen |= new
            todo += new
        return seen

    assert [name for name in MODULES if name in reached(name)] == []


def test_arrows_point_one_way():
    """The library imports nothing of what is built on it, and no model family."""
    for name in LIBRARY_ALONE:
        for node in ast.walk(ast.parse(MODULES[name].read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                assert not module.startswith(("vtc.eval", "vtc.demo", "gradio", "lmms_eval", "transformers.models"))


def test_rooms_have_a_size():
    lines = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: count for name, count in lines.items() if count > 250} == {}

    def total(room: str) -> int:
        return sum(count for name, count in lines.items() if name.startswith(room))

    assert total("vtc.core.") <= 2000
    assert total("vtc.cache.") <= 1000
    assert sum(lines[name] for name in LIBRARY_ALONE) <= 5200


def test_answers_are_bound_to_all_of_the_library():
    """What is kept of an earlier run is kept for the same code only, and that is all but command and server."""
    files = {*folder.sources()}
    assert {MODULES[name] for name in MODULES if not name.startswith(("vtc.cli", "vtc.serve"))} <= files
    assert all(file.is_file() for file in files)
    assert any(file.name == "qwen_vl.py" for file in files)
    assert {"marking.py", "memory.py", "album.py", "images.py", "video.py"} <= {file.name for file in files}


@pytest.mark.parametrize("name", MODULES)
def test_no_class_has_more_than_twelve_fields(name):
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ClassDef):
            fields = [
                x for x in node.body if isinstance(x, ast.AnnAssign) and "ClassVar" not in ast.unparse(x.annotation)
            ]
            assert len(fields) <= 12, node.name


def test_one_room_touches_the_cache():
    """Nothing outside `vtc/cache` reads or writes a layer of a cache object."""
    for name in LIBRARY_ALONE:
        if not name.startswith("vtc.cache."):
            text = MODULES[name].read_text()
            assert not any(word in text for word in ("cache.layers", ".keys.", ".values =", "get_mask_sizes")), name


def test_a_public_name_is_no_module():
    assert not {name.split(".")[1] for name in MODULES if name.count(".") == 1} & {*vtc.__all__}


def test_every_public_name_has_a_type(tmp_path):
    """A script outside the repository that imports all of them, as users write it, held to all of --strict."""
    script, config = tmp_path / "user.py", tmp_path / "mypy.ini"
    script.write_text(
        f"from vtc import {', '.join(vtc.__all__)}\n"
        "from torch import nn\n"
        "def compress(model: nn.Linear) -> nn.Linear:\n"
        "    return unwrap(wrap(model, FastV(layer=2), budget=0.25))\n"
        "class Mine(Method):\n"
        "    name = 'mine'\n"
        "    def stages(self, shape: Shape) -> tuple[Stage, ...]:\n"
        "        return (Stage(0, lambda seen: seen.valid.float()),)\n"
        "reveal_type(list_methods)\n"
    )
    table = tomllib.loads((LIBRARY.parent / "pyproject.toml").read_text())["tool"]["mypy"]
    ours = {key: value for key, value in table.items() if isinstance(value, bool)}  # for torch: else its cache is stale
    strict = {key: True for key, value in ours.items() if not value}
    sections = {"mypy": ours, "mypy-user": strict}
    config.write_text(
        "\n".join(f"[{name}]\n" + "\n".join(f"{k} = {v}" for k, v in keys.items()) for name, keys in sections.items())
    )
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir", str(LIBRARY.parent / ".mypy_cache"),
         str(script)],
        capture_output=True, text=True, cwd=tmp_path, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert "dict[str, type[vtc.stage.Method]]" in done.stdout
