"""Every refusal keeps its words: those in the code are those in `refusals.txt`.

    python tests/test_refusals.py

writes that file anew: a review then sees which words changed. A line is what one `raise` says, with
`{}` where a value goes and `(a | b)` where it says either; the file it is in does not matter. Words
that come from elsewhere (a caller's name, a library's reason) are values here.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "tests/refusals.txt"
COMMAND = "python tests/test_refusals.py"
Scopes = list[dict[str, list[ast.AST | None]]]  # per function around: what is assigned to a name


def assigned(body: ast.AST) -> dict[str, list[ast.AST | None]]:
    """All that a function, or a module outside of functions, assigns to each name."""
    found: dict[str, list[ast.AST | None]] = {}

    def look(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                alone = isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr)
                found.setdefault(child.id, []).append(node.value if alone else None)
            elif isinstance(child, ast.arg):
                found.setdefault(child.arg, []).append(None)
            if not isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
                look(child)

    look(body)
    return found


def words(node: ast.AST | None, scopes: Scopes) -> str | None:
    """What an expression says, if it is a text."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(words(part, scopes) or "" for part in parts)
        case ast.FormattedValue(value=value, conversion=conversion, format_spec=spec):
            inner = words(value, scopes) if conversion == -1 and spec is None else None
            said = f"!{chr(conversion)}" if conversion != -1 else ""
            said += f":{words(spec, scopes)}" if spec else ""
            return f"{{{said}}}" if inner is None else inner
        case ast.BinOp(op=ast.Add(), left=left, right=right):
            both = words(left, scopes), words(right, scopes)
            return None if both == (None, None) else "".join(text or "{}" for text in both)
        case ast.IfExp(body=body, orelse=orelse):
            either = words(body, scopes), words(orelse, scopes)
            return None if None in either else f"({either[0]} | {either[1]})"
        case ast.Call(func=ast.Attribute(attr="format", value=value)):
            return words(value, scopes)
        case ast.Name(id=name):
            for i, scope in enumerate(scopes):
                if name in scope:  # one that is assigned twice may say either
                    (first, *more) = scope[name]
                    return None if more else words(first, scopes[i:])
    return None


def refusals(tree: ast.AST, scopes: Scopes) -> Iterator[tuple[int, str]]:
    """The line of each `raise`, and what it says after the name of its error."""
    for node in ast.iter_child_nodes(tree):
        for call in ast.walk(node) if isinstance(node, ast.Raise) else ():
            match call:
                case ast.Call(func=ast.Name(id=error), args=[message, *_]):
                    if said := words(message, scopes):
                        yield node.lineno, f"{error}: {' '.join(said.split())}"
                        break
        inner = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from refusals(node, [assigned(node), *scopes] if inner else scopes)


def in_the_code() -> list[tuple[str, str]]:
    """All refusals as (words, file:line), sorted."""
    found = []
    for folder in ("btok", "kernels", "train"):
        for file in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(file.read_text())
            where = file.relative_to(ROOT).as_posix()
            for line, said in refusals(tree, [assigned(tree)]):
                found.append((said, f"{where}:{line}"))
    return sorted(found)


def differences(old: list[str], new: list[tuple[str, str]]) -> list[str]:
    """What went, came or changed; a change is what went and is much like what came."""
    left, came, told = list(old), [], []
    for said, where in new:
        if said in left:
            left.remove(said)
        else:
            came.append((said, where))
    for said, where in came:
        if close := difflib.get_close_matches(said, left, 1, cutoff=0.6):
            left.remove(close[0])
            told.append(f"changed, {where}\n  was: {close[0]}\n  is:  {said}")
        else:
            told.append(f"came, {where}\n  {said}")
    return told + [f"went\n  {said}" for said in left]


def test_refusals_keep_their_words():
    old = [line for line in LIST.read_text().splitlines() if not line.startswith("#")]
    told = "\n".join(differences(old, in_the_code()))
    assert not told, f"{told}\nif that is meant: {COMMAND}"


CODE = """
FROM = "a folder of {}"
def outer(name, n):
    where = f"data set {name}"
    had = "x" if n else "y"
    twice = "once"
    twice = str(n)
    def inner(where2):
        raise ValueError(f"{where}: {n!r:.60} is {had}, "
                         "expected " + FROM.format(n))
    try:
        raise other or TypeError(f"{twice}: {where2} {n:.2e}")
    except OSError as error:
        raise kind(FROM) from error
    raise
    raise SystemExit(0)
"""


def test_what_a_raise_says():
    tree = ast.parse(CODE)
    assert list(refusals(tree, [assigned(tree)])) == [
        (9, "ValueError: data set {}: {!r:.60} is (x | y), expected a folder of {}"),
        (12, "TypeError: {}: {} {:.2e}"),
        (14, "kind: a folder of {}"),
    ]


def test_differences_are_named():
    old = ["ValueError: top is {}, expected at least 1", "TypeError: gone", "a: b", "a: b"]
    new = [("ValueError: top is {}, expected 1 or more", "cli.py:3"), ("a: b", "x.py:1")]
    new.append(("ImportError: video needs PyAV", "inputs.py:9"))
    assert differences(old, new) == [
        f"changed, cli.py:3\n  was: {old[0]}\n  is:  {new[0][0]}",
        "came, inputs.py:9\n  ImportError: video needs PyAV",
        "went\n  TypeError: gone",
        "went\n  a: b",
    ]
    assert differences(["a: b"], [("a: b", "elsewhere.py:7")]) == []


if __name__ == "__main__":
    head = f"# What every `raise` under btok/, kernels/ and train/ says; written by `{COMMAND}`."
    LIST.write_text("\n".join([head, *(said for said, _ in in_the_code())]) + "\n")
