"""What a new method, or new figures, change: `python tests/methods_table.py` writes vtc/methods/overview.json and the
tables of methods in docs/methods.md (all) and README.md (the best)."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import vtc
from vtc.cli import about
from vtc.methods import overview

ROOT = Path(__file__).parents[1]
PAGES = {ROOT / "README.md": 8, ROOT / "docs" / "methods.md": None}
"""How many methods each one shows."""
MARKED = re.compile(r"(<!-- methods: .* -->\n)(.*)(<!-- end of methods -->)", re.DOTALL)


def written() -> str:
    """What overview.json has to hold: the methods of vtc itself."""
    own = {name: kind for name, kind in vtc.list_methods().items() if kind.__module__.startswith("vtc.")}
    lines = [f"  {json.dumps(name)}: {json.dumps(asdict(overview.of(kind())))}" for name, kind in own.items()]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    overview.FILE.write_text(written())
    for page, best in PAGES.items():
        table = about.methods_table(best)
        page.write_text(MARKED.sub(lambda found, table=table: found[1] + table + found[3], page.read_text()))


if __name__ == "__main__":
    main()
