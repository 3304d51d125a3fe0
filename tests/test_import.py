"""What an import costs, and which way imports go."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("module", ["btok", "btok.kernels", "btok.data.pocket", "btok_kernels"])
def test_an_import_is_light(module):
    code = (
        f"import sys, {module}; heavy = "
        "{'triton', 'transformers', 'PIL', 'sklearn', 'matplotlib'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert said.stdout.strip() == "[]", said.stdout + said.stderr


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("kernels/btok_kernels", {"btok", "train", "bench", "tests", "transformers"}),
        ("btok", {"train", "bench", "tests"}),
        ("train", {"bench", "tests"}),
    ],
)
def test_imports_go_one_way(folder, forbidden):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & forbidden, file


DOORS = {"btok/__main__.py", "train/main.py"}  # the command line, and a run's pictures


def imports_at_once(tree):
    """Modules that importing a file imports, and maybe names in them; not what functions import."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports_at_once(node)


def test_tools_are_imported_by_who_uses_them():
    """One needs an extra, and all may import the whole of btok."""
    found = set()
    for folder in ("btok", "kernels", "train", "bench"):
        for file in (ROOT / folder).rglob("*.py"):
            name = file.relative_to(ROOT).as_posix()
            names = imports_at_once(ast.parse(file.read_text()))
            if any(f"{n}.".startswith("btok.tools.") for n in names) and "/tools/" not in name:
                found.add(name)
    assert found == DOORS
