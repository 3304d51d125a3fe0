"""What `make setup` shows of pip's lines, and that it fails where pip does."""

from __future__ import annotations

import re
import sys

import install
import pytest

WHEEL = "cp311-cp311-manylinux_2_27_x86_64.manylinux_2_28_x86_64.whl"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (f"  Downloading torch-2.13.0-{WHEEL} (199.6 MB)", "  torch-2.13.0, 199.6 MB"),
        (f"  Using cached a_b-1.0+cpu-{WHEEL} (1.2 GB)", "  a_b-1.0+cpu, 1.2 GB"),
        ("  Downloading https://a.b/c/d-2.0-py3-none-any.whl (3 MB)", "  d-2.0, 3 MB"),
        ("Downloading mmeb-2.0.1.tar.gz (1.1 MB)", "  mmeb-2.0.1, 1.1 MB"),
        (f"  Downloading torch-2.13.0-{WHEEL}.metadata (27 kB)", None),
        ("  Downloading packaging-26.4-py3-none-any.whl (140 kB)", None),
        ("Collecting packaging (from btok==0.1.0)", None),
        ("Installing collected packages: a, b-c, d", "  unpacking 3 packages"),
        ("Installing collected packages: triton", "  unpacking 1 package"),
        ("", None),
    ],
)
def test_what_is_large_is_shown(said, shown):
    assert install.line_of(f"{said}\n") == shown


@pytest.mark.parametrize("code", [0, 3])
def test_how_far_it_is_and_how_it_ended(capfd, monkeypatch, code):
    there = iter([5, *range(6, 100)])
    monkeypatch.setattr(install, "unpacked", lambda: next(there))
    work = """
import sys, time
print("Collecting a", flush=True)
time.sleep(0.5)
print("Installing collected packages: a, b", flush=True)
time.sleep(1)
print("ERROR: no b", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""
    assert install.install([sys.executable, "-c", work, str(code)], 0.1) == code
    said = capfd.readouterr()
    lines = re.sub(r"\d+ s", "N s", said.out).splitlines()
    told = [line for line in lines if "of" in line]
    assert told[:2] == ["  N s, 1 of 2", "  N s, 2 of 2"] and len({*told}) == 2
    others = [line for line in lines if line not in told]
    assert {*others} == {"  N s", "  unpacking 2 packages"} and lines[0] == "  N s"
    assert others.count("  unpacking 2 packages") == 1 and said.err == "ERROR: no b\n"
