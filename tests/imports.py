"""Who imports whom, as a picture in which every arrow goes down; it fails where one does not.

    python tests/imports.py docs/imports.png

Counted is what importing a file imports, not what its functions import. Arrows that others imply
are left out, and so are files without any.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ["bench", "train", "btok.tools", "btok", "btok_kernels"]  # from above
WIDEST = 4  # files in a row


def imports_at_once(tree: ast.AST, importer: str = "") -> Iterator[str]:
    """Modules that importing a file imports, and maybe names in them; not what functions import."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = importer.rsplit(".", node.level)[0] + "." if node.level else ""
            module = f"{node.module}." if node.module else ""
            yield from (f"{above}{module}{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports_at_once(node, importer)


def import_graph() -> dict[str, set[str]]:
    """Per file of ours, as a module, those of ours that importing it imports."""
    graph: dict[str, set[str]] = {}
    for package in (ROOT / name for name in ("bench", "train", "btok", "kernels/btok_kernels")):
        for file in package.rglob("*.py"):
            name = ".".join(file.relative_to(package.parent).with_suffix("").parts)
            name = name.removesuffix(".__init__")
            graph[name] = set(imports_at_once(ast.parse(file.read_text()), name))
    for name, imported in graph.items():
        found = {i if i in graph else i.rpartition(".")[0] for i in imported}
        graph[name] = found & graph.keys() - {name}
    return graph


def layer(module: str) -> int:
    """Which of `LAYERS` a module belongs to: the longest name that fits."""
    name = module.replace("btok.__main__", "btok.tools.") + "."
    return LAYERS.index(max((i for i in LAYERS if name.startswith(f"{i}.")), key=len))


def check(graph: dict[str, set[str]]) -> None:
    """ValueError that names an import in a circle, or all imports that go to a layer above."""
    list(TopologicalSorter(graph).static_order())  # CycleError is a ValueError
    arrows = [(a, b) for a, imported in graph.items() for b in sorted(imported)]
    if up := [f"{a} imports {b}" for a, b in arrows if layer(a) > layer(b)]:
        raise ValueError(f"up from layer to layer: {', '.join(up)}")


def listed(graph: dict[str, set[str]]) -> str:
    """A line per file: what it imports. The picture keeps it, so that an old one is noticed."""
    return "\n".join(f"{name}: {' '.join(sorted(graph[name]))}" for name in sorted(graph))


def draw(graph: dict[str, set[str]], path: Path) -> None:
    """Write the picture: a band per layer, in it rows of files, each above all that it imports."""
    import matplotlib.pyplot as plt
    import networkx as nx  # torch needs it too

    arrows = nx.transitive_reduction(nx.DiGraph([(a, b) for a in graph for b in graph[a]]))
    rows: list[list[str]] = []
    tops = [0]
    for band in reversed(range(len(LAYERS))):
        inside = arrows.subgraph([name for name in arrows if layer(name) == band])
        for row in map(sorted, nx.topological_generations(inside.reverse())):
            parts = -(-len(row) // WIDEST)
            rows += [row[i::parts] for i in range(parts)]
        tops.insert(0, len(rows))
    at: dict[str, tuple[float, int]] = {}
    for sweep in range(100):  # to the middle of what a file is tied to: few arrows cross
        for y, row in enumerate(rows):
            if sweep:
                row.sort(key=lambda name: mean(at[i][0] for i in nx.all_neighbors(arrows, name)))
            shift = 0.7 + y % 3 * 0.3  # or arrows hide behind files right below each other
            at |= {name: ((i + shift) / (len(row) + 1), y) for i, name in enumerate(row)}
    _, axes = plt.subplots(figsize=(12, 0.62 * len(rows)), dpi=100)
    for a, b in arrows.edges:
        style = {"arrowstyle": "-|>", "color": f"C{layer(a)}", "alpha": 0.5, "shrinkB": 9}
        axes.annotate("", at[b], at[a], arrowprops=style)
    for name, place in at.items():
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": f"C{layer(name)}"}
        label = name.removeprefix(f"{LAYERS[layer(name)]}.")
        axes.text(*place, label, ha="center", va="center", fontsize=8, bbox=box)
    for band, name in enumerate(LAYERS):
        axes.axhspan(tops[band + 1] - 0.5, tops[band] - 0.5, color=f"C{band}", alpha=0.07)
        if tops[band] > tops[band + 1]:
            axes.text(-0.1, tops[band] - 0.7, name, weight="bold", va="top", color=f"C{band}")
    axes.set(xlim=(-0.11, 1), ylim=(-0.5, len(rows) - 0.5))
    axes.axis("off")
    plt.savefig(path, bbox_inches="tight", metadata={"Description": listed(graph)})


if __name__ == "__main__":
    try:
        check(graph := import_graph())
    except ValueError as error:
        sys.exit(f"error: {error}")
    draw(graph, Path(sys.argv[1]))
