"""`pip install` into the environment of this Python, with a line for what is large or takes long.

    .venv/bin/python tests/install.py torch==2.13.0

pip by itself says a line for each of some hundred packages, or, asked to be quiet, nothing for
minutes. Plain lines look alike on a terminal and in a log.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event, Thread

BETWEEN = 10.0  # seconds between lines that say how far it is
LARGE = re.compile(
    r"\s*(?:Downloading|Using cached) (?:\S*/)?([\w.]+-\d[^-\s]*?)(?:-\S+|\.tar\.gz) \((.* [MG]B)\)"
)
UNPACKS = "Installing collected packages: "
PIP = ["-m", "pip", "install", "--progress-bar", "off", "--disable-pip-version-check"]


def line_of(said: str) -> str | None:
    """What is shown of a line of pip's: a package of a megabyte or more, how many are unpacked."""
    if found := LARGE.match(said):
        return f"  {found[1]}, {found[2]}"
    if said.startswith(UNPACKS):
        return f"  unpacking {(number := count(said))} package{'s' * (number > 1)}"
    return None


def count(said: str) -> int:
    """Of the packages that pip unpacks."""
    return len(said.removeprefix(UNPACKS).split(","))


def unpacked() -> int:
    """How many packages the environment has."""
    return len([*Path(sysconfig.get_path("purelib")).glob("*.dist-info")])


def install(command: Sequence[str], between: float = BETWEEN) -> int:
    """Run a command that is pip's, and show of its lines what `line_of` does, and how far it is.

    Returns:
        Its exit status.
    """
    began, done, before, packages = time.monotonic(), Event(), 0, 0

    def tell() -> None:
        while not done.wait(between):
            now = min(max(unpacked() - before, 0), packages) if packages else 0
            so_far = f", {now} of {packages}" if packages else ""
            print(f"  {time.monotonic() - began:.0f} s{so_far}", flush=True)

    teller = Thread(target=tell, daemon=True)
    teller.start()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as pip:
        for said in pip.stdout or ():
            if said.startswith(UNPACKS):
                before, packages = unpacked(), count(said)
            if shown := line_of(said):
                print(shown, flush=True)
    done.set()
    teller.join()
    return pip.returncode


if __name__ == "__main__":
    try:
        sys.exit(install([sys.executable, *PIP, *sys.argv[1:]]))
    except KeyboardInterrupt:  # which pip has had too
        sys.exit(130)
