"""What figures depend on besides the options they were made with: code, machine, packages."""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from btok.files import sha256

ROOT = Path(__file__).resolve().parent.parent
CODE = ("btok", "kernels", "train")


def output_of(*command: str) -> str:
    """The output of a program; "" where there is none, or where it fails."""
    try:
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return said.stdout.strip()


def machine() -> dict[str, Any]:
    """The machine's device, CPU, cores and so on; nothing in it names its user or host."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    cpu = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), None)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those of the packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


@cache
def digest_of_code(*more: str) -> str:
    """The digest of the sources in the folders of `CODE`, and of more files or folders of them."""
    total = hashlib.sha256()
    places = [ROOT / name for name in (*CODE, *more)]
    files = {
        path for place in places for path in ([place] if place.is_file() else place.rglob("*.py"))
    }
    for path in sorted(files):
        total.update(f"{path.relative_to(ROOT)} {sha256(path)}\n".encode())
    return total.hexdigest()


def versions_line(found: Mapping[str, str]) -> str:
    return "- versions: " + ", ".join(f"{name} {number}" for name, number in found.items())
