"""What an import costs, and which way imports go."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from graphlib import CycleError
from pathlib import Path

import pytest

import btok
from tests.imports import check, import_graph, imports_at_once, listed

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("module", ["btok", "btok.kernels", "train.pocket.data", "btok_kernels"])
def test_an_import_is_light(module):
    code = (
        f"import sys, {module}; heavy = "
        "{'triton', 'transformers', 'PIL', 'sklearn', 'matplotlib'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert said.stdout.strip() == "[]", said.stdout + said.stderr


def test_the_version_is_said_once():
    """Where the build reads it."""
    text = (ROOT / "pyproject.toml").read_text()
    asked = tomllib.loads(text)
    assert asked["project"]["dynamic"] == ["version"] and btok.__version__ not in text
    said = (ROOT / asked["tool"]["hatch"]["version"]["path"]).read_text()
    assert said.count(f'__version__ = "{btok.__version__}"\n') == 1


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        # its own name too: it travels under others
        (
            "kernels/btok_kernels",
            {"btok", "btok_kernels", "train", "bench", "tests", "transformers"},
        ),
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


ALONE = """
import importlib, sys
from importlib.util import find_spec
from graphlib import TopologicalSorter
from pathlib import Path

sys.modules["btok_kernels"] = None  # an import of it fails
import torch
import elsewhere

triton = find_spec("triton") is not None
for file in sorted(Path(elsewhere.__file__).parent.glob("*.py")):
    if triton or not (file.stem.endswith("_triton") or file.stem == "start"):
        importlib.import_module(f"elsewhere.{file.stem}")
        print(file.stem)

from elsewhere.condensed_attention import condensed_attention
from elsewhere.layout import CondensedLayout

layout = CondensedLayout.from_lengths([5, 0], [4, 3], 2)
q, k, v = (torch.randn(layout.num_rows, heads, 16) for heads in (4, 2, 2))
truth = condensed_attention(q, k, v, layout, impl="reference")
for impl in ("auto", "triton") if triton else ("auto",):
    torch.testing.assert_close(condensed_attention(q, k, v, layout, impl=impl), truth)
"""


def test_the_kernels_travel_alone(tmp_path):
    """Under another name, in a process of their own."""
    source = ROOT / "kernels" / "btok_kernels"
    shutil.copytree(source, tmp_path / "elsewhere", ignore=shutil.ignore_patterns("__pycache__"))
    said = subprocess.run(
        [sys.executable, "-c", ALONE],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )
    assert said.returncode == 0, said.stdout + said.stderr
    found = set(said.stdout.split())
    assert {"condensed_attention", "contrastive_loss", "launch", "layout", "ranks"} <= found


def test_two_copies_of_the_kernels_keep_their_operators(tmp_path):
    source = ROOT / "kernels" / "btok_kernels"
    shutil.copytree(source, tmp_path / "other", ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import torch, {}.condensed_attention_triton as a, other.condensed_attention_triton as b\n"
    )
    code += "assert a._op is not b._op and torch.ops.btok and torch.ops.other\n"
    code += "print(a._op._qualname, b._op._qualname)"
    said = subprocess.run(
        [sys.executable, "-c", code.format("btok_kernels")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT / "kernels")},
    )
    names = "btok::condensed_attention other::condensed_attention"
    assert said.stdout.strip() == names, said.stderr


# command lines, and a run's pictures
DOORS = {"btok/__main__.py", "train/main.py", "train/pocket/evaluation.py"}


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


def test_the_core_calls_a_tool_under_names_of_users_alone():
    """What it does itself needs none, so that a tool may change without it."""
    found = set()
    for file in sorted((ROOT / "btok").rglob("*.py")):
        nodes = ast.walk(ast.parse(file.read_text())) if "tools" not in file.parts else ()
        for function in (node for node in nodes if isinstance(node, ast.FunctionDef)):
            if any(f"{n}.".startswith("btok.tools.") for n in imports_at_once(function)):
                found.add((file.relative_to(ROOT / "btok").as_posix(), function.name))
    assert found == {
        ("__init__.py", "load_sentence_transformer"),
        ("encoder.py", "encode_to"),
        ("evaluation/mteb.py", "__getattr__"),  # a path of before, and the next one
        ("cli.py", "__getattr__"),
        ("sentence.py", "__getattr__"),
    }


def test_no_file_imports_itself_by_way_of_others_or_one_of_a_layer_above():
    """Whichever is read first, all that it names is there."""
    graph = import_graph()
    assert len(graph["btok.model"]) > 5 and len(graph["btok_kernels.ranks"]) == 0
    assert "train.step" in graph["bench.bench_training_step"]
    check(graph)
    graph["btok.files"].add("btok.model")
    with pytest.raises(CycleError, match=r"btok\.files.*btok\.model|btok\.model.*btok\.files"):
        check(graph)
    graph["btok.files"].remove("btok.model")
    graph["btok.files"].add("train.pocket.digits")
    with pytest.raises(ValueError, match=r"up .*: btok\.files imports train\.pocket\.digits$"):
        check(graph)


def test_the_picture_of_imports_is_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib (the extra `demo`) is not installed")
    command = [sys.executable, ROOT / "tests/imports.py", tmp_path / "imports.png"]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr
    assert (tmp_path / "imports.png").stat().st_size > 100_000
    from PIL import Image

    assert Image.open(tmp_path / "imports.png").text["Description"] == listed(import_graph())


def test_the_picture_of_imports_is_of_these_files():
    from PIL import Image

    kept = Image.open(ROOT / "docs/imports.png").text["Description"]
    assert kept == listed(import_graph()), "run make graph"
