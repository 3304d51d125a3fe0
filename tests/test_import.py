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
