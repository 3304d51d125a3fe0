"""What a study's figures depend on besides its options, as its files and its page say it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from bench.provenance import CODE, digest_of_code, machine, output_of, versions, versions_line

PACKAGES = ("torch", "transformers", "numpy", "scipy", "scikit-learn", "pillow")


@cache
def surroundings(*more: str, packages: tuple[str, ...] = PACKAGES) -> dict[str, Any]:
    """The code, commit, device and versions of a study's run; the commit is that of the code it
    runs.

    Args:
        more: files of that code besides the folders in `CODE`.
        packages: whose versions count.
    """
    paths, here = ("--", *CODE, *more), machine()
    device = f"CPU {here['cpu'] or ''}".strip() if here["device"] == "cpu" else here["device"]
    return {
        "code": digest_of_code(*more),
        "commit": (output_of("git", "log", "-1", "--format=%H", *paths) or "unknown")
        + (" with uncommitted changes" if output_of("git", "status", "-s", *paths) else ""),
        "device": f"{device}, {here['threads']} threads",
        "versions": versions(packages),
    }


def facts(settings: Mapping[str, Any], of_commit: str = "") -> str:
    """The result of `surroundings` as lines of a page."""
    of = f"- commit: {settings['commit']}{of_commit}\n- device: {settings['device']}\n"
    return of + versions_line(settings["versions"])


def facts_of(settings: Mapping[str, Any], command: str) -> str:
    """The head of a study's page."""
    of_commit = f"; sha256 of its sources {settings['code'][:16]}..."
    return f"- command: `{command} --page FOLDER`\n" + facts(settings, of_commit)
