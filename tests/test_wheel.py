"""What is released: the sdist and the wheel made of it, what is in them, and that the wheel works
where nothing else of ours is.

`BTOK_DIST=folder` takes what was built into that folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import btok

ROOT = Path(__file__).resolve().parent.parent
STEM = f"btok-{btok.__version__}"
MOST = 1_500_000  # bytes of the wheel's files on a disk
DATA = {
    "btok/data/mixture.toml",
    "btok/evaluation/mmeb_v2.toml",
    "btok/evaluation/mmeb_v2_published.json",
    "btok/py.typed",
    "btok_kernels/py.typed",
}


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """A folder with both, the wheel made of the sdist."""
    if given := os.environ.get("BTOK_DIST"):
        return Path(given)
    for name in ("build", "hatchling", "pip"):
        pytest.importorskip(name, reason=f"{name} (the extra `dev`) is not installed")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def sdist(dist):
    """Names of its files, from its own folder."""
    with tarfile.open(dist / f"{STEM}.tar.gz") as archive:
        names = [member.name for member in archive.getmembers() if member.isfile()]
    assert all(name.startswith(f"{STEM}/") for name in names)
    return {name.removeprefix(f"{STEM}/") for name in names}


@pytest.fixture(scope="module")
def wheel(dist):
    return zipfile.ZipFile(dist / f"{STEM}-py3-none-any.whl")


def test_the_sdist_has_what_builds_and_tests_and_nothing_that_was_made(sdist):
    had = {name.split("/")[0] for name in sdist}
    assert {"pyproject.toml", "Makefile", "LICENSE", "constraints-cpu.txt", ".ci"} <= had
    assert {"btok", "kernels", "train", "bench", "tests", "examples", "docs"} <= had
    assert not had & {".venv", ".git", "runs", "dist", "build", "site", ".pytest_cache"}
    assert not [name for name in sdist if "__pycache__" in name or name.endswith(".pyc")]
    if shutil.which("git") and (ROOT / ".git").exists() and "BTOK_DIST" not in os.environ:
        git = ["git", "-C", str(ROOT), "ls-files", "-z"]
        tracked = subprocess.check_output(git, text=True).split("\0")[:-1]
        assert {name for name in tracked if (ROOT / name).exists()} <= sdist


def test_the_wheel_has_the_two_packages_whole_and_nothing_else(wheel, sdist):
    info = {f"{STEM}.dist-info/{name}" for name in ("METADATA", "RECORD", "WHEEL")}
    info |= {f"{STEM}.dist-info/{name}" for name in ("entry_points.txt", "licenses/LICENSE")}
    own = {name for name in sdist if name.startswith("btok/")}
    own |= {n.removeprefix("kernels/") for n in sdist if n.startswith("kernels/btok_kernels/")}
    assert set(wheel.namelist()) == own | info
    assert own >= DATA
    assert wheel.read(f"{STEM}.dist-info/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_the_wheel_is_small(wheel):
    assert sum(file.file_size for file in wheel.infolist()) <= MOST


def test_what_the_wheel_says_of_itself(wheel):
    told = Parser().parsestr(wheel.read(f"{STEM}.dist-info/METADATA").decode())
    assert told["Name"] == "btok" and told["Version"] == btok.__version__
    assert told["License-Expression"] == "Apache-2.0" and told["Requires-Python"] == ">=3.11"
    core = [x for x in told.get_all("Requires-Dist") if "extra ==" not in x]
    names = {x.split(";")[0].split(">")[0].split("<")[0].strip() for x in core}
    assert names == {
        *("torch", "triton", "transformers", "safetensors", "numpy", "packaging", "pillow"),
        *("tyro", "tqdm"),
    }
    assert {"demo", "peft", "lance", "files", "dev"} <= set(told.get_all("Provides-Extra"))
    entry = wheel.read(f"{STEM}.dist-info/entry_points.txt").decode()
    assert "btok = btok.tools.vllm_plugin:register" in entry


@pytest.fixture(scope="module")
def python(dist, tmp_path_factory):
    """Of an environment that has the wheel, and of this one its packages but none of ours."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    wheel = dist / f"{STEM}-py3-none-any.whl"
    offline = ["--no-index", "--disable-pip-version-check", wheel]
    done = subprocess.run([*pip, *offline], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (site,) = folder.glob("lib/python*/site-packages")
    # read in full, and no .pth file in it, so that an editable btok stays out
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def run(python, folder, *arguments):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "BTOK_"))}
    done = subprocess.run(
        [python, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=kept | {"OMP_NUM_THREADS": "1", "HOME": str(python.parent.parent)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_of_an_installed_wheel(python, tmp_path):
    said = run(python, tmp_path, "-m", "btok", "--help")
    for command in ("encode", "search", "export", "eval", "env"):
        assert command in said
    found = json.loads(run(python, tmp_path, "-m", "btok", "env", "--json"))
    version = sysconfig.get_python_version()
    assert found["btok"]["place"] == f"~/lib/python{version}/site-packages"
    assert found["btok"]["version"] == btok.__version__
    assert found["btok"]["why"] == "no checkout"
    assert found["packages"]["versions"]["torch"] and found["packages"]["missing"] == []
    assert found["extras"]["dev"]["versions"]["pytest"] == pytest.__version__


USE = """
import sys, torch, btok_kernels
before = set(sys.modules)
import btok
print(btok.__file__, btok_kernels.__file__)
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
from btok.kernels import CondensedLayout, condensed_attention, contrastive_loss

layout = CondensedLayout.from_lengths([3, 5], [4, 0], 2)
q, k, v = (torch.randn(layout.num_rows, heads, 16, requires_grad=True) for heads in (4, 2, 2))
outs = [condensed_attention(q, k, v, layout, impl=impl) for impl in ("auto", "reference")]
torch.testing.assert_close(*outs)
loss = contrastive_loss(outs[0].flatten(1), outs[1].flatten(1).detach())
loss.backward()
assert q.grad.abs().sum() > 0
"""


def test_the_wheel_imports_and_computes_and_imports_little(python, tmp_path):
    """Beside what torch imports itself: counted, as seconds depend on who else is at work."""
    where, loaded = run(python, tmp_path, "-c", USE).splitlines()
    assert all(Path(file).is_relative_to(python.parent.parent) for file in where.split())
    assert set(loaded.split()) <= {
        "btok",
        "btok_kernels",
        "safetensors",
        "packaging",
        "numpy",
        "tqdm",
    }
