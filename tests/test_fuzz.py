"""A minute of `tests/fuzz.py`: readers fed with damaged files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
READERS = ("pypdfium2", "pillow_heif", "docx", "lxml", "chardet", "av", "datasets")


@pytest.mark.full
def test_a_minute_of_damaged_files(tmp_path):
    for module in READERS:
        pytest.importorskip(
            module, reason=f"{module} (the extras `files`, `data`) is not installed"
        )
    path = os.pathsep.join([str(ROOT), f"{ROOT}/kernels", f"{ROOT}/tests"])
    command = [
        sys.executable,
        "tests/fuzz.py",
        "--seconds",
        "60",
        "--seed",
        "0",
        "--keep",
        tmp_path,
    ]
    said = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert said.returncode == 0, said.stdout + said.stderr
    table = said.stdout.splitlines()
    cases = {
        line.split()[0]: int(line.split()[1])
        for line in table
        if line.split()[1:2] and line.split()[1].isdigit() and line.split()[0].isalpha()
    }
    assert cases.keys() == {"file", "pages", "rows", "checkpoint", "side", "index", "cli"}
    assert min(cases.values()) > 0 and sum(cases.values()) > 500
