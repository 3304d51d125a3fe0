"""PTX text becomes a list of instructions.

Only what Triton's NVIDIA backend emits is read: one kernel per module, registers declared as
ranges (`.reg .b32 %r<1087>;`), inline assembly of one statement per line or several behind each
other. Section numbers in this package are those of NVIDIA's "Parallel Thread Execution ISA" 9.0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

FLOATS: dict[str, np.dtype] = {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8")}


class Instruction(NamedTuple):
    """One instruction: `@!%p3 add.s32 %r1, %r2, 5;` has guard ("%p3", True), words ("add", "s32")
    and operands ("%r1", "%r2", "5")."""

    line: int  # of the PTX text
    source: str  # file:line of the Triton source, where the compiler tells it
    guard: tuple[str, bool] | None  # predicate register, and whether it is negated
    words: tuple[str, ...]  # the opcode and its modifiers
    operands: tuple[str, ...]

    def __str__(self) -> str:
        guard = f"@{'!' * self.guard[1]}{self.guard[0]} " if self.guard else ""
        operands = ", ".join(self.operands)
        if len(operands) > 100:
            operands = f"{operands[:97]}..."
        return f"line {self.line} ({self.source}): {guard}{'.'.join(self.words)} {operands}"


@dataclass
class Program:
    """A kernel: `params` are (type, name) in order, "map" for a tensor map; `registers` the bits
    and number by prefix."""

    name: str
    params: list[tuple[str, str]]
    threads: int
    registers: dict[str, tuple[int, int]] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)


def split_operands(text: str) -> tuple[str, ...]:
    """At the commas outside braces and brackets."""
    if "{" in text and "[" in text:  # one in the other, maybe
        depth, marked = 0, []
        for character in text:
            depth += (character in "{[") - (character in "}]")
            marked.append("\n" if character == "," and not depth else character)
        return tuple(part.strip() for part in "".join(marked).split("\n") if part.strip())
    return tuple(part.strip() for part in re.split(r",(?![^{\[]*[}\]])", text) if part.strip())


def dtype_of(kind: str) -> np.dtype:
    """numpy's type of a PTX type; bf16 and packed pairs are their bits."""
    if kind in FLOATS:
        return FLOATS[kind]
    if kind == "pred":
        return np.dtype(bool)
    bits = {"bf16": 16, "bf16x2": 32, "f16x2": 32}.get(kind) or int(kind.lstrip("bus"))
    if bits not in (8, 16, 32, 64):
        raise ValueError(f"ptx: .{kind} has {bits} bits, expected 8, 16, 32 or 64")
    return np.dtype(f"{'i' if kind[0] == 's' else 'u'}{bits // 8}")


def register_list(operand: str) -> list[str]:
    """`{%r1, %r2}` or `%r1`, as a list."""
    return [name.strip() for name in operand.strip("{} ").split(",")]


def parse(text: str) -> Program:
    """The one kernel of a PTX module.

    Raises:
        ValueError: no kernel, or a statement that is no instruction.
    """
    head = re.search(r"\.entry\s+([\w$]+)\((.*?)\)\s*(.*?)\n\{", text, re.DOTALL)
    if head is None:
        raise ValueError("ptx: text has no .entry, expected a kernel")
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", head[3])
    if threads is None:
        raise ValueError(f"ptx: {head[1]} does not say its number of threads")
    params = [
        ("map" if size else kind, name)
        for kind, name, size in re.findall(
            r"\.param\s+(?:\.align \d+ )?\.(\w+)[^,]*?([\w$]+)(\[128\])?\s*(?:,|$)", head[2].strip()
        )
    ]
    program = Program(head[1], params, int(threads[1]))
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"[^"]*?([^"/]+)"', text, re.MULTILINE))
    source = "?"
    first = text.count("\n", 0, head.end()) + 1
    skip = 0
    for number, line in enumerate(text[head.end() :].split("\n"), first):
        statements = line.split("//")[0].strip()
        if skip:
            skip -= 1
            continue
        if found := re.match(r"\.loc\s+(\d+)\s+(\d+)", statements):
            source = f"{files.get(found[1], '?')}:{found[2]}"
        elif found := re.match(r"\.reg\s+\.(\w+)\s+(%\w+?)<(\d+)>", statements):
            bits = 1 if found[1] == "pred" else int(found[1].strip("bfus"))
            program.registers[found[2]] = (bits, int(found[3]))
        elif found := re.match(r"([$\w]+):$", statements):
            program.labels[found[1]] = len(program.instructions)
        elif statements == "{":
            scope = text.split("\n")[number - 1 : number + 20]
            skip = next((i for i, x in enumerate(scope) if x.split("//")[0].strip() == "}"), 0)
            wait = _spin(scope[: skip + 1], number)
            program.instructions.append(_instruction(wait, number, source))
        elif statements == "}":
            break  # behind the kernel stands debug information
        elif statements.startswith(".") and not statements.startswith(".pragma"):
            raise ValueError(f"ptx: line {number} has {statements!r}, expected an instruction")
        elif not statements.startswith("."):
            for statement in statements.split(";"):
                if statement.strip():
                    program.instructions.append(_instruction(statement.strip(), number, source))
    return program


def _spin(lines: list[str], line: int) -> str:
    """The wait for a barrier in a loop of its own, which Triton writes in a scope."""
    expected = (
        r"\{ \.reg \.pred complete; waitLoop: (mbarrier\.try_wait[\w.:]* complete, [^;]*); "
        r"@!complete bra\.uni waitLoop; \}"
    )
    code = (x.split("//")[0].strip() for x in lines)
    text = " ".join(" ".join(x for x in code if not x.startswith(".loc")).split())
    found = re.fullmatch(expected, text)
    if found is None:
        raise ValueError(f"ptx: line {line} has {text!r}, expected a loop around a wait")
    return found[1]


def _instruction(statement: str, line: int, source: str) -> Instruction:
    found = re.match(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)$", statement, re.DOTALL)
    if found is None:
        raise ValueError(f"ptx: line {line} has {statement!r}, expected an instruction")
    guard = (found[2], found[1] == "!") if found[2] else None
    words = tuple(found[3].replace("::", "__").split("."))
    return Instruction(line, source, guard, words, split_operands(found[4]))
