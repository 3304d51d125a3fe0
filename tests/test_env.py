"""`python -m btok env`: what it says, with things missing, and what it keeps to itself."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.requirements import Requirement
from pretend_cuda import PretendCuda

import btok
from btok.kernels import CondensedLayout, condensed_attention, contrastive_loss, maxsim
from btok.label_loss import label_losses
from btok.tools import env
from btok.tools.cli import main
from btok_kernels import launch

ROOT = Path(__file__).resolve().parent.parent
GIT = shutil.which("git")


def said(capsys, *options):
    assert main(["env", *options]) == 0
    return capsys.readouterr().out


def program(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_the_command_loads_no_model_and_runs_anywhere(tmp_path):
    code = "import sys\nfrom btok.tools.cli import main\nassert main(['env', '--json']) == 0\n"
    code += "print(sorted({'transformers', 'triton', 'PIL', 'lance'} & set(sys.modules)))"
    paths = f"{ROOT}:{ROOT / 'kernels'}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PATH": str(tmp_path), "HOME": str(ROOT.parent), "PYTHONPATH": paths},
    )
    told, _, loaded = done.stdout.rpartition("}\n")
    assert loaded.strip() == "[]", done.stdout + done.stderr
    found = json.loads(told + "}")
    assert found["btok"]["version"] == btok.__version__
    assert found["btok"]["place"] == f"~/{ROOT.name}"  # of a home that is above it
    assert found["btok"]["commit"] is None and found["btok"]["why"]
    assert found["packages"]["versions"]["torch"] == torch.__version__
    assert found["cpu"]["cores"] >= found["cpu"]["usable_cores"] >= 1
    assert found["cuda"]["nvidia_smi"] == "nvidia-smi is not installed"


def test_it_reads_as_markdown_and_says_the_same_as_json(capsys):
    found, text = json.loads(said(capsys, "--json")), said(capsys)
    head, *lines = text.splitlines()
    titles = ("Implementations", "Extras", "Environment")
    assert head == "### btok env"
    assert not [x for x in lines if x and x not in titles and not x.startswith("- ")]
    assert f"- btok {btok.__version__}, commit {found['btok']['commit'] or 'unknown'}" in text
    for name, version in found["packages"]["versions"].items():
        assert f"{name} {version}" in text
    for name, has in found["extras"].items():
        (line,) = (x for x in lines if x.startswith(f"- {name}: "))
        assert ("missing" in line) == bool(has["missing"])


@pytest.mark.skipif(GIT is None, reason="git is not installed")
def test_a_commit_and_whether_files_differ_from_it(tmp_path, monkeypatch):
    def git(*words):
        who = ("-c", "user.name=n", "-c", "user.email=e")
        return subprocess.check_output([GIT, "-C", str(tmp_path), *who, *words], text=True).strip()

    git("init", "-q")
    assert "git: fatal" in env.commit(tmp_path)["why"]  # no commit yet
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "one")
    head = git("rev-parse", "HEAD")
    assert env.commit(tmp_path) == {"commit": head, "changed": False}
    (tmp_path / "file").write_text("2")
    assert env.commit(tmp_path) == {"commit": head, "changed": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert env.commit(tmp_path) == {"commit": None, "why": "git is not installed"}
    program(tmp_path, "git", "echo fatal: dubious ownership >&2; exit 128")
    assert env.commit(tmp_path)["why"] == "git: fatal: dubious ownership"


def test_the_commit_that_pip_installed_from(tmp_path, monkeypatch):
    told = '{"url": "x", "vcs_info": {"vcs": "git", "commit_id": "abc"}}'
    for text, commit in ((told, "abc"), ('{"url": "x", "dir_info": {}}', None), (None, None)):
        planted = SimpleNamespace(read_text=lambda name, text=text: text)
        monkeypatch.setattr(metadata, "distribution", lambda name, planted=planted: planted)
        assert env.commit(tmp_path)["commit"] == commit


def test_packages_and_extras_that_are_missing_or_too_old(monkeypatch):
    def version(name):
        if name in ("av", "torch"):
            raise metadata.PackageNotFoundError(name)
        return "0.1"

    monkeypatch.setattr(metadata, "version", version)
    wanted = env.requirements(ROOT)
    assert env.extra(wanted, "video") == {"versions": {}, "missing": ["av"]}
    assert "torch>=2.11" in env.extra(wanted, env.CORE)["missing"]
    assert "transformers>=5.17, has 0.1" in env.extra(wanted, env.CORE)["missing"]
    files = env.extra(wanted, "files")  # of which video is one
    assert "av" in files["missing"] and files["versions"]["pypdfium2"] == "0.1"
    elsewhere = {"x": [Requirement("a; sys_platform == 'nowhere'"), Requirement("b")]}
    assert env.extra(elsewhere, "x") == {"versions": {"b": "0.1"}, "missing": []}


def test_what_an_installed_package_needs_is_what_the_checkout_says(tmp_path, monkeypatch):
    def lines(wanted):
        return {n: {f"{r.name}{r.specifier}" for r in some} for n, some in wanted.items()}

    wanted = env.requirements(ROOT)
    told = [str(r) for r in wanted[env.CORE]]
    for name in wanted.keys() - {env.CORE}:
        for r in wanted[name]:
            marker = f"({r.marker}) and " if r.marker else ""
            r.marker = None
            told.append(f"{r}; {marker}extra == '{name}'")
    has = SimpleNamespace(get_all=lambda key: sorted(wanted.keys() - {env.CORE}))
    installed = SimpleNamespace(requires=told, metadata=has)
    monkeypatch.setattr(metadata, "distribution", lambda name: installed)
    assert lines(env.requirements(tmp_path)) == lines(env.requirements(ROOT))

    def nothing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", nothing)
    assert env.requirements(tmp_path) == {}
    assert env.extra({}, env.CORE) == {"versions": {}, "missing": []}


def test_auto_is_what_the_operations_take(monkeypatch, caplog):
    """The line that they log themselves."""
    monkeypatch.setattr(launch, "_announced", set())
    rows = torch.randn(3, 128)
    layout = CondensedLayout.from_lengths([1], [1], 1)
    with caplog.at_level(logging.INFO, "btok_kernels"):
        condensed_attention(rows[:, None], rows[:, None], rows[:, None], layout)
        contrastive_loss(rows, rows)
        maxsim(rows[None], rows[None])
        label_losses(torch.nn.Linear(128, 2), rows, torch.zeros(3, dtype=torch.int64))
    found = env.implementations()
    said = [line for line in caplog.messages if "impl 'auto' takes" in line]
    assert len(said) == len(found) == 4
    for name, taken in found.items():
        assert any(f"{name}: impl 'auto' takes '{taken['auto']}'" in line for line in said)
        if name != "the generative loss":
            assert "it needs CUDA" in taken["why_not"]["triton"] and "reference" in taken["also"]
    assert found["the generative loss"]["why_not"]["liger"]
    monkeypatch.setitem(launch.INSTALLED, "triton", False)
    found = env.implementations()["condensed_attention"]
    assert found["why_not"]["triton"] == "triton is not installed"


def test_a_gpu_that_torch_sees(tmp_path, monkeypatch, capsys):
    program(tmp_path, "nvidia-smi", "echo 'Some GPU, 580.1'")
    monkeypatch.setenv("PATH", str(tmp_path))
    with PretendCuda():
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        found, text = json.loads(said(capsys, "--json")), said(capsys)
    assert [gpu["capability"] for gpu in found["gpus"]] == ["sm_70"]
    assert found["cuda"]["driver"] == "580.1" and found["cuda"]["why"] is None
    attention = found["implementations"]["condensed_attention"]
    assert attention["device"] == "cuda" and attention["dtype"] == "bfloat16"
    assert attention["auto"] == "sdpa" and "sm_70 is too old" in attention["why_not"]["triton"]
    assert "- GPU 0: " in text and "CUDA 13.0, driver 580.1" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_a_gpu_that_torch_does_not_see(tmp_path, monkeypatch, capsys):
    program(tmp_path, "nvidia-smi", "echo 'Some GPU, 580.1'")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", None)
    line = "- GPU: none that torch sees (torch is built for the CPU alone); the driver lists Some"
    assert line in said(capsys)
    old = (
        "case $1 in *compute_cap*) echo 'not a valid field'; exit 2;; esac; echo 'Some GPU, 450.1'"
    )
    program(tmp_path, "nvidia-smi", old)  # a driver's that knows fewer fields
    found = env.cuda()
    assert (found["driver"], found["driver_lists"]) == ("450.1", ["Some GPU"])
    program(tmp_path, "nvidia-smi", "echo 'cannot talk to the driver'; exit 9")
    found = env.cuda()
    assert found["nvidia_smi"] == "nvidia-smi: cannot talk to the driver"
    assert found["driver"] is None and found["driver_lists"] == []
    monkeypatch.setattr(torch.version, "cuda", "13.0")  # and no device
    assert env.cuda()["why"]


def test_secrets_and_names_are_not_shown(tmp_path, monkeypatch, capsys):
    home = tmp_path / "ada.l"
    monkeypatch.setenv("HOME", str(home))
    for name, value in (
        ("HF_TOKEN", "hf_abc123"),
        ("BTOK_API_KEY", "abc123"),
        ("TORCH_PASSWORD", "abc123"),
        ("UNRELATED", "abc123"),
        ("HF_ENDPOINT", "https://me:abc123@hub/x"),
        ("HF_HOME", f"{home}/cache"),
        ("HF_HUB_CACHE", f"{home}2/cache"),
        ("TORCHINDUCTOR_CACHE_DIR", "cache/torchinductor_ada.l"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TRITON_X", "a\nb"),
        ("OMP_NUM_THREADS", "3"),
        ("CUBLAS_WORKSPACE_CONFIG", ":4096:8"),
        ("LOCAL_WORLD_SIZE", "2"),
    ):
        monkeypatch.setenv(name, value)
    text = said(capsys)
    assert "abc123" not in text and "UNRELATED" not in text
    for line in (
        "HF_TOKEN=(set, not shown)",
        "BTOK_API_KEY=(set, not shown)",
        "HF_ENDPOINT=https://hub/x",
        "HF_HOME=~/cache",
        f"HF_HUB_CACHE={home}2/cache",  # another's
        "TORCHINDUCTOR_CACHE_DIR=cache/torchinductor_(user)",
        "TOKENIZERS_PARALLELISM=false",
        "TRITON_X=a\\nb",
        "OMP_NUM_THREADS=3",
        "CUBLAS_WORKSPACE_CONFIG=:4096:8",
        "LOCAL_WORLD_SIZE=2",
    ):
        assert f"- {line}\n" in text
