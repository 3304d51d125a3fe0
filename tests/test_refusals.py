"""Every refusal keeps its words: those in the code are those in `refusals.txt`.

    python tests/test_refusals.py

writes that file anew: a review then sees which words changed. A line is what one `raise` says, with
`{}` where a value goes and `(a | b)` where it says either; the file it is in does not matter. Words
that a caller hands over have lines of their own, `function(argument): words`; those that come from
elsewhere (what a function returns, a library's reason) are values here.
"""

from __future__ import annotations

import ast
import difflib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

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
                if isinstance(node, ast.AugAssign) and (before := found[child.id][:-1]):
                    both = before[-1] and ast.BinOp(before[-1], node.op, node.value)
                    found[child.id] = [*before[:-1], both]
            elif isinstance(child, ast.arg):
                found.setdefault(child.arg, []).append(None)
            if not isinstance(child, ast.FunctionDef | ast.Lambda | ast.ClassDef):
                look(child)

    look(body)
    return found


def value_of(name: str, scopes: Scopes) -> tuple[ast.AST | None, Scopes]:
    """What a name is, if it is assigned once, and where that stands."""
    for i, scope in enumerate(scopes):
        if name in scope:  # one that is assigned twice may be either
            return (scope[name][0] if len(scope[name]) == 1 else None), scopes[i:]
    return None, scopes


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
            return words(*value_of(name, scopes))
        case (
            ast.Subscript(value=ast.Name(id=name))
            | ast.Call(func=ast.Attribute(attr="get", value=ast.Name(id=name)))
        ):
            table, where = value_of(name, scopes)
            if isinstance(table, ast.Dict):
                either = [words(value, where) for value in table.values]
                if isinstance(node, ast.Call):
                    either += [words(value, scopes) for value in node.args[1:]]
                return None if None in either else f"({' | '.join(map(str, either))})"
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


class Function(NamedTuple):
    """One that is defined: its arguments, and those that are in what it, or who it calls, says."""

    node: ast.AST
    scopes: Scopes
    name: str
    arguments: list[str]
    said: set[str]


def functions(tree: ast.AST, scopes: Scopes, owner: str = "") -> Iterator[Function]:
    """All of a file, and the file itself, which has no name; a class is its `__init__`."""
    if isinstance(tree, ast.Module):
        yield Function(tree, scopes, "", [], set())
    for node in ast.iter_child_nodes(tree):
        inner, name = scopes, owner
        if isinstance(node, ast.FunctionDef):
            inner, name = [assigned(node), *scopes], ""
            every = [a.arg for a in (*node.args.posonlyargs, *node.args.args)]
            every = every[1:] if every[:1] in (["self"], ["cls"]) else every
            every += [a.arg for a in node.args.kwonlyargs]
            called = owner if node.name == "__init__" else node.name
            yield Function(node, inner, called, every, set())
        elif isinstance(node, ast.ClassDef):
            name = node.name
        yield from functions(node, inner, name)


def names_in(node: ast.AST, scopes: Scopes, seen: frozenset[str] = frozenset()) -> set[str]:
    """The names that an expression is made of, and those that they are made of."""
    found = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} - seen
    for name in found:
        value, where = value_of(name, scopes)
        if value is not None:
            found = found | names_in(value, where, seen | found)
    return found


def own(node: ast.AST) -> Iterator[ast.AST]:
    """What is in a function or a file, less what is in functions in it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef):
            yield child
            yield from own(child)


def imported(tree: ast.AST) -> set[str]:
    """What a file has from ours."""
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        if node.level or str(node.module).split(".")[0] in ("btok", "btok_kernels", "train")
        for alias in node.names
    }


def handed_over(trees: Mapping[str, ast.AST]) -> list[tuple[str, str]]:
    """Words in calls of functions that say them in a refusal, as (words, file:line)."""
    every = [(w, f) for w, tree in trees.items() for f in functions(tree, [assigned(tree)])]
    by_name: dict[str, list[tuple[str, Function]]] = defaultdict(list)
    ours = {where: imported(tree) for where, tree in trees.items()}
    for where, function in every:
        by_name[function.name].append((where, function))
        for node in own(function.node):
            if isinstance(node, ast.Raise) and node.exc is not None:
                function.said.update(names_in(node.exc, function.scopes) & {*function.arguments})

    def handed(where: str, function: Function) -> Iterator[tuple[int, str, str, ast.AST]]:
        """Line, name of the called, its argument and what it is, of all that is said in the end."""
        if isinstance(function.node, ast.FunctionDef) and function.said:
            arguments = function.node.args
            plain = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
            given = [*zip(reversed(plain), reversed(arguments.defaults), strict=False)]
            given += zip((a.arg for a in arguments.kwonlyargs), arguments.kw_defaults, strict=True)
            for name, value in given:
                if name in function.said and value is not None:
                    yield value.lineno, function.name, name, value
        for call in (node for node in own(function.node) if isinstance(node, ast.Call)):
            match call.func:
                case ast.Name(id=called) | ast.Attribute(attr=called, value=ast.Name(id="self")):
                    from_there = called in ours[where]
                case ast.Attribute(attr=called, value=ast.Name(id=owner)) if owner in ours[where]:
                    from_there = True
                case _:
                    continue
            for there, target in by_name.get(called, ()):
                if from_there == (there == where):  # one of this file hides another's
                    continue
                given = [*zip(target.arguments, call.args, strict=False)]
                given += [(k.arg, k.value) for k in call.keywords]
                for name, value in given:
                    if name in target.said:
                        yield call.lineno, called, name, value

    while True:  # who hands an argument of its own over says it too
        before = sum(len(function.said) for _, function in every)
        for where, function in every:
            for *_, value in handed(where, function):
                function.said.update(names_in(value, function.scopes) & {*function.arguments})
        if before == sum(len(function.said) for _, function in every):
            break
    found = set()
    for where, function in every:
        for line, called, name, value in handed(where, function):
            if said := words(value, function.scopes):
                found.add((f"{called}({name}): {' '.join(said.split())}", f"{where}:{line}"))
    return [*{said: (said, where) for said, where in sorted(found)}.values()]


def in_the_code() -> list[tuple[str, str]]:
    """All refusals as (words, file:line), sorted."""
    trees = {
        file.relative_to(ROOT).as_posix(): ast.parse(file.read_text())
        for folder in ("btok", "kernels", "train")
        for file in (ROOT / folder).rglob("*.py")
    }
    found = [
        (said, f"{where}:{line}")
        for where, tree in trees.items()
        for line, said in refusals(tree, [assigned(tree)])
    ]
    return sorted(found + handed_over(trees))


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


CALLS = {
    "families/family.py": """
def special_token(tokenizer, token, whose="a family's", *, quiet="no words"):
    why = f"expected {whose}"
    raise ValueError(f"the tokenizer has no {token}, {why}")
""",
    "families/some.py": """
from btok.families.family import special_token
import re
WINDOW = "a window"
WINDOW += " that moves"
UNFIT = {"gemma": WINDOW, "other": "it is not causal"}
class Images:
    def __init__(self, tokenizer, name, mine):
        self.start = special_token(tokenizer, f"<|{name}|>", whose=mine, quiet="said to nobody")
        re.search("not ours", name)
        self.refuse(kind="a picture")
        raise ValueError(UNFIT[name] + UNFIT.get(name, "; it is unknown"))
    def refuse(self, kind):
        raise TypeError(kind + " is none")
def of(tokenizer):
    return Images(tokenizer, "image_pad", "Qwen's")
def search(query):
    raise ValueError(query)
""",
}


def test_what_a_call_hands_over():
    """By position, by name, by default and from argument to argument; to nobody else's function."""
    trees = {where: ast.parse(code) for where, code in CALLS.items()}
    assert handed_over(trees) == [
        ("Images(mine): Qwen's", "families/some.py:16"),
        ("Images(name): image_pad", "families/some.py:16"),
        ("refuse(kind): a picture", "families/some.py:11"),
        ("special_token(token): <|{}|>", "families/some.py:9"),
        ("special_token(whose): a family's", "families/family.py:2"),
    ]
    tree = trees["families/some.py"]
    (_, said), _ = refusals(tree, [assigned(tree)])
    window = "(a window that moves | it is not causal"
    assert said == f"ValueError: {window}){window} | ; it is unknown)"


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
    head = "# What every `raise` under btok/, kernels/ and train/ says, its callers' words too; "
    head += f"written by `{COMMAND}`."
    LIST.write_text("\n".join([head, *(said for said, _ in in_the_code())]) + "\n")
