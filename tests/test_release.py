"""A version is said alike everywhere, and the workflows run what CI runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import btok

ROOT = Path(__file__).resolve().parent.parent
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted((GITHUB / "ISSUE_TEMPLATE").glob("[!c]*.yml"))


def loaded(path):
    return yaml.safe_load(path.read_text())


def test_the_changelog_begins_with_what_is_unreleased_and_this_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    heads = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert heads[0] == "[Unreleased]"
    dated = [re.fullmatch(r"\[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)", head) for head in heads[1:]]
    assert all(dated), heads
    versions = [tuple(map(int, found[1].split("."))) for found in dated]
    assert versions == sorted(set(versions), reverse=True)
    assert dated[0][1] == btok.__version__

    cited = loaded(ROOT / "CITATION.cff")
    assert cited["version"] == btok.__version__
    assert str(cited["date-released"]) == dated[0][2]
    assert cited["license"] == "Apache-2.0"


def steps(path):
    return [step for job in loaded(path)["jobs"].values() for step in job["steps"]]


def made(path):
    """Which `make` commands a workflow runs."""
    found = set()
    for job in loaded(path)["jobs"].values():
        targets = job.get("strategy", {}).get("matrix", {}).get("target", [None])
        for run in (step["run"] for step in job["steps"] if "run" in step):
            for target in targets:
                found.add(re.sub(r"\$\{\{ matrix\.target \}\}", str(target), run))
    return {run for run in found if run.startswith("make ")}


def test_the_workflows_run_what_ci_runs():
    ci = set(re.findall(r"^ *(make .+)", (ROOT / ".ci/run").read_text(), re.MULTILINE))
    assert len(ci) >= 5
    assert made(GITHUB / "workflows/tests.yml") >= ci
    assert any("make gpu " in run for run in made(GITHUB / "workflows/gpu.yml"))
    assert "make dist" in made(GITHUB / "workflows/release.yml")


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_calls_make_and_may_do_little(path):
    """What it does beside make is one line; targets are there; nothing is said to a shell."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {run.split()[1] for run in made(path)} <= targets
    for step in steps(path):
        assert step.get("run", "").count("\n") == 0
        assert not re.search(r"\$\{\{ *(inputs|github)\.", step.get("run", ""))
        if "uses" in step:
            assert re.fullmatch(r"[\w/-]+@(v\d+|release/v\d+)", step["uses"])
        if step.get("uses", "").startswith("actions/checkout"):
            assert step["with"] == {"persist-credentials": False}
    assert loaded(path)["permissions"] == {"contents": "read"}


def test_a_release_waits_for_somebody():
    job = loaded(GITHUB / "workflows/release.yml")["jobs"]["publish"]
    assert job["environment"] and job["needs"] == "build"
    assert job["permissions"] == {"id-token": "write"}


def test_a_bug_report_asks_for_the_machine():
    fields = {item.get("id"): item for item in loaded(GITHUB / "ISSUE_TEMPLATE/bug.yml")["body"]}
    assert "python -m btok env" in fields["env"]["attributes"]["label"]
    assert fields["env"]["validations"] == {"required": True}


@pytest.mark.parametrize(
    ("schema", "paths"),
    [
        ("github-workflows", WORKFLOWS),
        ("github-issue-forms", FORMS),
        ("github-issue-config", [GITHUB / "ISSUE_TEMPLATE/config.yml"]),
        ("citation-file-format", [ROOT / "CITATION.cff"]),
    ],
)
def test_files_are_what_their_schema_says(schema, paths, tmp_path):
    pytest.importorskip("check_jsonschema", reason="check-jsonschema (extra `dev`) is missing")
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    assert paths
    done = subprocess.run([*command, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    broken = tmp_path / paths[0].name
    broken.write_text("- of another kind\n")
    assert subprocess.run([*command, broken], capture_output=True).returncode == 1
