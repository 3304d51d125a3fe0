"""The documentation as a site: `make docs`.

The source is the repository itself, so that a link between pages is the same relative path in a
repository browser and in the site: no page is copied, and no link is rewritten. What a page links
to beside pages, as a script, is put beside the site as a file. Nothing is fetched while the site is
built or read.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

project, copyright = "btok", "the authors of btok, Apache-2.0"
root_doc = "README"
NAV = {
    "Start": ("docs/first-hour", "docs/how-it-works", "docs/results", "docs/speed"),
    "Use": (
        "docs/search",
        "docs/web",
        "docs/serving",
        "docs/budgets",
        "docs/evaluate",
        "docs/files",
    ),
    "Train": ("docs/train", "docs/many-gpus", "docs/objectives", "docs/mining"),
    "Kernels": ("docs/kernels", "docs/condensed-attention", "docs/contrastive-loss", "docs/hopper"),
    "Know and change": (
        *("docs/reference", "docs/families", "docs/testing", "docs/versions"),
        *("CONTRIBUTING", "CHANGELOG", "SECURITY"),
    ),
    "Studies": ("examples/smollm2/README", "bench/results/*"),
}
include_patterns = [
    "README.md",
    "C*.md",
    "SECURITY.md",
    "docs/*.md",
    "bench/results/*.md",
    "examples/**/*.md",
]
# whole folders are passed over unread
exclude_patterns = [".*", "runs", "build", "dist", "btok", "kernels", "train", "tests"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
default_role = "code"
autodoc_typehints = "none"  # docstrings say what an argument is, its shape included
html_theme, html_title = "furo", "btok"
html_copy_source = html_show_sourcelink = False
html_theme_options: dict[str, Any] = {"footer_icons": []}


def add_contents(app: Any, docname: str, source: list[str]) -> None:
    """Hidden from who reads the README elsewhere: which pages the site has, in which order."""
    if docname != root_doc:
        return
    for caption, pages in NAV.items():
        entries = "\n".join(f"/{page}" for page in pages)
        options = f":hidden:\n:caption: {caption}\n:glob:\n:titlesonly:"
        source[0] += f"\n```{{toctree}}\n{options}\n\n{entries}\n```\n"


def add_front_page(app: Any, error: Exception | None) -> None:
    """A folder's index.html is what browsers and servers open."""
    if error is None:
        page = f'<!doctype html><meta http-equiv="refresh" content="0; url={root_doc}.html">\n'
        Path(app.outdir, "index.html").write_text(page)


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("source-read", add_contents)
    app.connect("build-finished", add_front_page)
