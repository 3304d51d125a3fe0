"""What the machine code of a kernel says about its speed: loops, products, waits, a model.

Pure functions of text: the disassembly of `nvdisasm -c` and the report of `ptxas -v`. Terms: a
product is one tensor-core instruction (HGMMA of a warpgroup, HMMA of a warp; FFMA in fp32), a copy
an asynchronous one to shared memory (LDGSTS). A group of products is what one wait counts: those up
to the one that carries `gsb0`.

The model is no measurement, and optimistic. `rate` tells its rules.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L_\w+|\$\w[\w$]*):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_REGISTER = re.compile(r"(?<![\w])R(\d+)(\.64)?\b")
_HGMMA = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)")
_PRODUCTS = {"HMMA.16816": 4096, "HMMA.1688": 2048, "FFMA": 64}  # FLOPs of one warp's
# with a register among their operands, and none of them written
_WRITES_NONE = re.compile(
    r"ST|RED|LDGSTS|BAR|BRA|BRX|CALL|RET|EXIT|WARP|DEPBAR|LDGDEPBAR|NOP|BS|BREAK|MEMBAR|FENCE"
    r"|ERRBAR|CCTL|NANOSLEEP|R2P|R2UR|PLOP3|\w*SETP|UTMA|SYNCS|U[A-Z]"
)


class Instruction(NamedTuple):
    """One line of SASS: its guard ("@!P0" or ""), opcode with modifiers, and operands."""

    guard: str
    opcode: str
    operands: tuple[str, ...]
    target: int | None  # of a branch, an index among the instructions

    def starts(self, *opcodes: str) -> bool:
        return self.opcode.startswith(opcodes)


class Loop(NamedTuple):
    """An innermost natural loop that holds products; counts are those of one warp's iteration."""

    header: int
    body: tuple[int, ...]  # in the order of addresses
    instructions: int
    products: int
    flops: int  # of 4 warps that share no product, a warpgroup
    drained: int  # products that are waited for, each on its own, before the next one
    exponentials: int
    beside: int  # exponentials that are issued while a product is in flight
    barriers: int
    waits: tuple[str, ...]  # in order: "copies 2" leaves two groups of copies in flight
    copies: int
    waits_for_all: bool  # of its copies before its first product, with copies issued behind it


class Report(NamedTuple):
    """What `ptxas -v` said of one kernel; bytes."""

    registers: int
    stack: int
    spills: int
    serialized: tuple[str, ...]  # the codes of its warnings that products are serialised


class Device(NamedTuple):
    """What the model knows of a GPU; FLOPs and bytes are those of one SM and cycle, in halves."""

    multiprocessors: int
    hertz: float
    flops: int
    shared: int  # bytes of an SM that blocks may take, of which a block costs 1,024 more
    mma_share: float  # of the tensor cores' rate that HMMA reaches


# H100 SXM and A100. HMMA reaches 0.63 of Hopper's rate: arXiv 2402.13499.
DEVICES = {
    90: Device(132, 1.755e9, 4096, 228 << 10, 0.63),
    80: Device(108, 1.41e9, 2048, 164 << 10, 1.0),
}
# Cycles from issue to use, of the publications named in `rate`.
ARITHMETIC, SPECIAL, SHARED, PRODUCT = 4, 23, 29, 32


def parse(text: str) -> list[Instruction]:
    """The instructions of a disassembly that holds one kernel."""
    labels: dict[str, int] = {}
    lines: list[tuple[str, str, str]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(lines)
        elif found := _LINE.search(line):
            lines.append((found[1] or "", found[2], found[3]))
    program = []
    for guard, opcode, rest in lines:
        target = _TARGET.search(rest) if opcode.startswith("BRA") else None
        operands = tuple(part.strip() for part in rest.split(",")) if rest.strip() else ()
        program.append(Instruction(guard, opcode, operands, labels[target[1]] if target else None))
    return program


def report(text: str) -> Report:
    """Of `ptxas -v`."""

    def figures(pattern: str) -> list[int]:
        return [int(figure) for figure in re.findall(pattern, text)]

    return Report(
        max(figures(r"Used (\d+) registers")),
        sum(figures(r"(\d+) bytes stack frame")),
        sum(figures(r"(\d+) bytes spill (?:stores|loads)")),
        tuple(sorted(set(re.findall(r"\((C75\d\d)\)", text)))),
    )


def successors(program: list[Instruction], at: int) -> list[int]:
    """Indices that may run next."""
    instruction = program[at]
    # `BRA.U !UP0` and `BRA P0` carry their condition among the operands
    conditional = instruction.guard not in ("", "@PT") or len(instruction.operands) > 1
    following = []
    if instruction.target is not None:
        following.append(instruction.target)
        if not conditional:
            return following
    elif instruction.starts("EXIT", "RET", "BRX", "JMP") and not conditional:
        return []
    return following + ([at + 1] if at + 1 < len(program) else [])


def natural_loops(program: list[Instruction]) -> dict[int, set[int]]:
    """Instructions of every natural loop, by its header; loops of one header are one."""
    before: dict[int, set[int]] = {at: set() for at in range(len(program))}
    for at in range(len(program)):
        for following in successors(program, at):
            before[following].add(at)
    # blocks, so that dominators are of some dozen nodes: they begin where not one edge comes in
    # from the instruction above alone, or where that has another way to go
    leaders = [
        at
        for at in range(len(program))
        if at == 0 or before[at] != {at - 1} or len(successors(program, at - 1)) != 1
    ]
    block_of, block = [0] * len(program), -1
    starts = set(leaders)
    for at in range(len(program)):
        block += at in starts
        block_of[at] = block
    into = [{block_of[at] for at in before[leader]} for leader in leaders]
    every = set(range(len(leaders)))
    dominators = [{0}] + [set(every) for _ in leaders[1:]]
    changed = True
    while changed:
        changed = False
        for node in range(1, len(leaders)):
            incoming = [dominators[source] for source in into[node]]
            new = {node} | (set.intersection(*incoming) if incoming else set())
            changed |= new != dominators[node]
            dominators[node] = new
    loops: dict[int, set[int]] = {}
    for head in every:
        for tail in into[head]:
            if head in dominators[tail]:
                body, stack = {head}, [tail]
                while stack:
                    node = stack.pop()
                    if node not in body:
                        body.add(node)
                        stack.extend(into[node])
                inside = {at for at in range(len(program)) if block_of[at] in body}
                loops[leaders[head]] = loops.get(leaders[head], set()) | inside
    return loops


def product_flops(instruction: Instruction) -> int:
    """FLOPs of one product by four warps, which make one HGMMA together; 0 for anything else."""
    if found := _HGMMA.match(instruction.opcode):
        m, n, k = map(int, found.groups())
        return 2 * m * n * k
    for opcode, flops in _PRODUCTS.items():
        if instruction.opcode.startswith(opcode):
            return 4 * flops
    return 0


def _is_product(instruction: Instruction, tensor_cores: bool) -> bool:
    return product_flops(instruction) > 0 and instruction.starts("FFMA") != tensor_cores


def _wait(instruction: Instruction) -> str:
    """The name of what it waits for; "" where it does not wait."""
    for opcode, counter, waited in (
        ("DEPBAR.LE", "SB0", "copies"),
        ("WARPGROUP.DEPBAR.LE", "gsb0", "products"),
    ):
        if instruction.starts(opcode) and instruction.operands[0] == counter:
            return f"{waited} {int(instruction.operands[1].split()[0], 16)}"
    return ""


def _drained(body: list[Instruction]) -> int:
    count, since = 0, 0  # since: products since the last wait for all
    waited = True
    for instruction in body:
        if instruction.starts("HGMMA"):
            since = since + 1 if not waited else 1
            waited = False
        elif _wait(instruction) == "products 0":
            count += since == 1 and not waited
            waited = True
    return count


def _beside(body: list[Instruction]) -> int:
    count, flying = 0, 0
    for turn in range(2):  # the second with what the first leaves in flight
        for instruction in body:
            if instruction.starts("HGMMA"):
                flying += "gsb0" in instruction.operands
            elif (waited := _wait(instruction)).startswith("products"):
                flying = min(flying, int(waited.split()[1]))
            elif instruction.starts("MUFU.EX2"):
                count += turn * (flying > 0)
    return count


def main_loops(program: list[Instruction]) -> list[Loop]:
    """Loops that multiply, inner ones only, in the order of their addresses.

    A kernel without tensor-core instructions multiplies by FFMA, which other arithmetic uses too: a
    loop of it is one where they are a quarter of all instructions.
    """
    tensor_cores = any(instruction.starts("HGMMA", "HMMA") for instruction in program)
    loops = natural_loops(program)
    found = []
    for header, inside in sorted(loops.items()):
        inner = set().union(*(body for other, body in loops.items() if other != header
                              and body < inside), set())  # fmt: skip
        own = [at for at in sorted(inside - inner)]
        multiplied = [at for at in own if _is_product(program[at], tensor_cores)]
        if not multiplied or (not tensor_cores and 4 * len(multiplied) < len(own)):
            continue
        body = [program[at] for at in own]
        waits = [(at, waited) for at in own if (waited := _wait(program[at]))]
        copies = [at for at in own if program[at].starts("LDGSTS")]
        all_waited = any(at < multiplied[0] and waited == "copies 0" for at, waited in waits)
        found.append(
            Loop(
                header,
                tuple(own),
                len(own),
                len(multiplied),
                sum(product_flops(program[at]) for at in multiplied),
                _drained(body),
                sum(instruction.starts("MUFU.EX2") for instruction in body),
                _beside(body),
                sum(instruction.starts("BAR") for instruction in body),
                tuple(waited for _, waited in waits),
                len(copies),
                all_waited and any(at > multiplied[0] for at in copies),
            )
        )
    # Triton has the warpgroups of a specialised kernel in a loop, each of them behind a branch
    return [loop for loop in found if not any(_around(loop, other) for other in found)]


def _around(loop: Loop, other: Loop) -> bool:
    return loop.body[0] < other.body[0] and other.body[-1] < loop.body[-1]


def _width(instruction: Instruction) -> int:
    """Registers of what it loads, stores or computes."""
    opcode = instruction.opcode
    if instruction.starts("LDSM", "STSM"):
        return int(opcode[-1]) if opcode[-1] in "24" else 1
    if instruction.starts("HMMA"):
        return 4
    if ".128" in opcode:
        return 4
    wide = ".64" in opcode or ".WIDE" in opcode or instruction.starts("D")
    return 2 if wide or (instruction.starts("CS2R") and ".32" not in opcode) else 1


def writes(instruction: Instruction) -> set[int]:
    """Registers it writes; of HGMMA the accumulators, which it writes later."""
    if found := _HGMMA.match(instruction.opcode):
        first = _REGISTER.match(instruction.operands[0])
        count = int(found[2]) // 2 // (1 if ".F32" in instruction.opcode else 2)
        return set(range(int(first[1]), int(first[1]) + count)) if first else set()
    if _WRITES_NONE.match(instruction.opcode):
        return set()
    for operand in instruction.operands:
        if found := _REGISTER.fullmatch(operand.replace(".reuse", "")):
            return set(range(int(found[1]), int(found[1]) + _width(instruction)))
        if not re.fullmatch(r"!?U?P[\dT]", operand):
            break
    return set()


def reads(instruction: Instruction) -> set[int]:
    """Registers it reads at issue; of HGMMA those of A, which it reads later, no accumulators."""
    if instruction.starts("HGMMA"):
        first = _REGISTER.match(instruction.operands[1])
        return set(range(int(first[1]), int(first[1]) + 4)) if first else set()
    operands = list(instruction.operands)
    if writes(instruction):
        while operands and not _REGISTER.match(operands[0]):
            operands.pop(0)
        operands = operands[1:]
    found = set()
    stores = instruction.starts("ST")
    for place, operand in enumerate(operands):
        for register in _REGISTER.finditer(operand):
            count = 2 if register[2] or ".64]" in operand else 1
            if stores and place == len(operands) - 1:
                count = _width(instruction)
            if instruction.starts("HMMA"):
                count = (4, 2, 4)[place]
            found |= set(range(int(register[1]), int(register[1]) + count))
    return found


class _InFlight(NamedTuple):
    """Registers of products that are not waited for: A's and the accumulators of each group."""

    a: frozenset[int]
    accumulators: frozenset[int]


_NONE = _InFlight(frozenset(), frozenset())


def _join(*groups: _InFlight) -> _InFlight:
    return _InFlight(
        frozenset().union(*(group.a for group in groups)),
        frozenset().union(*(group.accumulators for group in groups)),
    )


def hazards(program: list[Instruction]) -> list[str]:
    """Registers of HGMMA in flight that another instruction touches, on any path.

    A product in flight owns its accumulators, and A where that is in registers: nothing else may
    write them, or read the accumulators, until a wait that covers its group; `WARPGROUP.DEPBAR.LE
    gsb0, n` leaves the n youngest groups in flight. HGMMA run in the order they are issued in.
    """
    found = {}
    start: tuple[int, tuple[_InFlight, ...], _InFlight] = (0, (), _NONE)
    seen, stack = {start}, [start]
    touched = [(writes(instruction), reads(instruction)) for instruction in program]
    while stack:
        at, pending, open_group = stack.pop()
        instruction = program[at]
        written, read = touched[at]
        busy = _join(open_group, *pending)
        if instruction.starts("HGMMA"):
            if late := read & busy.accumulators:
                found[at] = f"A reads R{min(late)}"
            open_group = _join(open_group, _InFlight(frozenset(read), frozenset(written)))
            if "gsb0" in instruction.operands:
                pending, open_group = (*pending, open_group), _NONE
                if len(pending) > 8:  # no more are told apart
                    pending = (_join(*pending[:2]), *pending[2:])
        elif _wait(instruction).startswith("products"):
            left = int(instruction.operands[1], 16)
            pending = pending[len(pending) - left :] if left < len(pending) else pending
        elif late := written & (busy.a | busy.accumulators):
            found[at] = f"{instruction.opcode} writes R{min(late)}"
        elif late := read & busy.accumulators:
            found[at] = f"{instruction.opcode} reads R{min(late)}"
        for following in successors(program, at):
            state = (following, pending, open_group)
            if state not in seen:
                seen.add(state)
                stack.append(state)
    return [f"at {16 * at:#x} {text} of a product in flight" for at, text in sorted(found.items())]


def blocks_per_sm(arch: int, registers: int, shared: int, warps: int) -> int:
    """Resident blocks of an SM, by registers, shared memory and threads."""
    a_warp = -(-registers * 32 // 256) * 256
    return min(65536 // (a_warp * warps), DEVICES[arch].shared // (shared + 1024), 64 // warps, 32)


class _Step(NamedTuple):
    """What the model knows of an instruction."""

    kind: str
    writes: tuple[int, ...]
    reads: tuple[int, ...]
    cycles: float  # its pipe is taken, by four warps
    latency: int
    left: int  # groups a wait leaves in flight
    commits: bool


def _step(instruction: Instruction, device: Device) -> _Step:
    kind, cycles, latency, left = "issue", 1.0, ARITHMETIC, 0
    if instruction.starts("HGMMA"):
        kind, cycles, latency = "hgmma", product_flops(instruction) / device.flops, PRODUCT
    elif instruction.starts("HMMA"):
        kind, latency = "hmma", PRODUCT
        cycles = product_flops(instruction) / device.flops / device.mma_share
    elif instruction.starts("MUFU"):
        kind, cycles, latency = "special", 8.0, SPECIAL
    elif instruction.starts("SHFL"):
        kind, cycles, latency = "shared", 4.0, SPECIAL
    elif instruction.starts("LDS", "STS", "LDGSTS"):
        # 128 bytes a cycle; of four warps, each lane with 4 bytes a register
        kind, cycles, latency = "shared", 4.0 * _width(instruction), SHARED
    elif instruction.starts("BAR"):
        kind = "barrier"
    elif (waited := _wait(instruction)).startswith("products"):
        kind, left = "wait", int(waited.split()[1])
    return _Step(
        kind, tuple(writes(instruction)), tuple(reads(instruction)), cycles, latency, left,
        "gsb0" in instruction.operands,
    )  # fmt: skip


class _Group:
    """Four warps in step, one on each scheduler: a warpgroup."""

    def __init__(self, block: int, steps: list[_Step], clock: float) -> None:
        self.block, self.steps, self.clock = block, steps, clock
        self.at = 0
        self.ready: dict[int, float] = {}  # when a register can be read
        self.seen = 0.0  # when the youngest product is
        self.pending: list[float] = []  # when each group of products is
        self.marks: list[float] = []  # ends of iterations

    @property
    def step(self) -> _Step:
        return self.steps[self.at]

    def earliest(self) -> float:
        """When its next instruction can be issued, for all that it knows itself."""
        step = self.step
        begin = max([self.clock, *(self.ready.get(register, 0.0) for register in step.reads)])
        if step.kind == "wait" and len(self.pending) > step.left:
            begin = max(begin, self.pending[len(self.pending) - step.left - 1])
        return begin

    def issue(self, begin: float, free: dict[str, float]) -> None:
        """Its next instruction, at `begin`; `free` tells when each pipe is."""
        step = self.step
        free["issue"] = self.clock = begin + 1
        if step.kind == "hgmma":
            free["hgmma"] = max(begin, free["hgmma"]) + step.cycles
            self.seen = free["hgmma"] + step.latency
            if step.commits:
                self.pending.append(self.seen)
        else:
            if step.kind in free and step.kind != "issue":
                free[step.kind] = begin + step.cycles
            if step.kind == "wait":
                del self.pending[: len(self.pending) - step.left]
            self.ready.update(dict.fromkeys(step.writes, begin + step.latency))
        self.at = (self.at + 1) % len(self.steps)
        if self.at == 0:
            self.marks.append(self.clock)


def cycles(program: list[Instruction], loop: Loop, arch: int, warps: int, blocks: int) -> float:
    """Modelled cycles of an SM for one iteration of `loop` by each of its `blocks`; see `rate`."""
    rounds, members = 12, max(1, warps // 4)
    steps = [_step(program[at], DEVICES[arch]) for at in loop.body]
    groups = [_Group(number // members, steps, float(number)) for number in range(blocks * members)]
    running = list(groups)
    met: dict[int, list[_Group]] = {block: [] for block in range(blocks)}
    free = dict.fromkeys(("issue", "hgmma", "hmma", "special", "shared"), 0.0)
    earliest = {group: group.earliest() for group in groups}

    def stalled(kind: str) -> float:
        return free[kind] if kind in ("hmma", "special", "shared") else 0.0

    while running:
        # a warp stalls at a pipe that is taken; products of a warpgroup queue up
        begins = [max(earliest[one], free["issue"], stalled(one.step.kind)) for one in running]
        begin = min(begins)
        group = running[begins.index(begin)]
        kind = group.step.kind
        group.issue(begin, free)
        earliest[group] = group.earliest()
        if kind == "barrier":
            met[group.block].append(group)
            running.remove(group)
            if len(met[group.block]) == members:
                clock = max(member.clock for member in met[group.block])
                for member in met[group.block]:
                    member.clock = clock
                    earliest[member] = member.earliest()
                running += met[group.block]
                met[group.block] = []
        if len(group.marks) == rounds and group.at == 0 and group in running:
            running.remove(group)
    half = rounds // 2
    spent = max((group.marks[-1] - group.marks[-1 - half]) / half for group in groups)
    # the last iterations of the last group run alone
    tensor = sum(step.cycles for step in steps if step.kind in ("hgmma", "hmma"))
    return max(spent, tensor * len(groups))


def rate(
    program: list[Instruction], loop: Loop, arch: int, warps: int, blocks: int, useful: int
) -> float:
    """Modelled TFLOP/s of a GPU that runs `loop` with `useful` FLOPs an iteration and block.

    A model: an SM's warps walk the loop's instructions in order, in steady state. Each of
    the four schedulers issues one instruction a cycle; an instruction waits for the registers it
    reads (4 cycles behind arithmetic, 23 behind MUFU and SHFL, 29 behind shared memory, 32 behind
    HMMA); MUFU takes 4 lanes a cycle of each scheduler, loads and stores of shared memory 128 bytes
    a cycle of an SM, tensor cores work at the rate of `DEVICES`. HGMMA go on beside their warpgroup
    until its wait, and are seen 32 cycles after their last FLOP. Warpgroups of a block meet at
    barriers, blocks are independent; as many run as registers, shared memory and threads let.
    TFLOP/s = SMs x clock x blocks x useful FLOPs of an iteration / its cycles. Waits for copies,
    operands that HGMMA read from shared memory, caches, launches and masked blocks cost nothing:
    it is optimistic, good to compare launches and no forecast of a rate.
    Latencies are rounded, of the order in Luo et al., arXiv 2402.13499 (Hopper), and Jia et al.,
    arXiv 1804.06826 (arithmetic).
    """
    device = DEVICES[arch]
    spent = cycles(program, loop, arch, warps, blocks)
    return device.multiprocessors * device.hertz * blocks * useful / spent / 1e12
