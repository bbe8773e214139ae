"""A lower bound of the time of a program compiled for a TPU, from what its compiler knows.

The compiler counts the cycles of every fusion and matrix multiply. Of what it does not count (kernels, gathers,
scatters, sorts) the bound takes the time that its bytes need at the bandwidth of the memory, or its FLOPs at the peak,
whichever is more. A kernel declares its own. Nothing is run: a real step is slower.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

GIB = 2.0**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Public figures of one TPU chip.

    Attributes:
      clock: cycles per second.
      flops: of bfloat16, per second.
      bandwidth: bytes per second between the chip and its memory.
      memory: usable bytes.
    """

    clock: float
    flops: float
    bandwidth: float
    memory: float


CHIPS = {
    "v4": Chip(clock=1.05e9, flops=275e12, bandwidth=1228e9, memory=32 * GIB),
    "v5e": Chip(clock=1.5e9, flops=197e12, bandwidth=819e9, memory=15.75 * GIB),
    "v5p": Chip(clock=1.75e9, flops=459e12, bandwidth=2765e9, memory=95 * GIB),
    "v6e": Chip(clock=1.75e9, flops=918e12, bandwidth=1640e9, memory=31.25 * GIB),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """A lower bound of the time of a program, in seconds.

    Attributes:
      compiler: of what the compiler counted in cycles.
      kernels: of Pallas kernels, from what they declare.
      others: of gathers, scatters and sorts, from their bytes.
      uncounted: how many operations of which kind have no figure at all, loops of unknown length above all.
    """

    compiler: float
    kernels: float
    others: float
    uncounted: Mapping[str, int]

    @property
    def seconds(self) -> float:
        """The sum: nothing is taken to overlap."""
        return self.compiler + self.kernels + self.others


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of a compiled program."""

    name: str
    shape: str  # of the result, such as "bf16[8,128]{1,0}", or a tuple of those
    opcode: str
    operands: tuple[str, ...]
    line: str


BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
BYTES |= {"s64": 8, "u64": 8, "f64": 8}
MOVED = ("gather", "scatter", "sort")
UNKNOWN_CYCLES = 10**12  # what the compiler writes where it does not know
_ARRAY = re.compile(r"\b(" + "|".join(BYTES) + r")\[([\d,]*)\]")
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")


def bound(hlo: str, chip: Chip) -> Bound:
    """Reads the bound off an optimised program, the text of `jax.stages.Compiled.as_text()`."""
    program = parse(hlo)
    seconds = {"compiler": 0.0, "kernels": 0.0, "others": 0.0}
    uncounted: dict[str, int] = {}
    for operation, times in executed(program):
        cycles = re.search(r'"estimated_cycles":"(\d+)"', operation.line)
        kind = _kind(operation, program)
        if operation.opcode == "while":  # of unknown length, or it would not be here
            uncounted["while"] = uncounted.get("while", 0) + 1
        elif operation.opcode == "custom-call":
            if cost := re.search(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"', operation.line):
                seconds["kernels"] += times * max(int(cost[1]) / chip.flops, int(cost[2]) / chip.bandwidth)
            elif "tpu_custom_call" in operation.line:
                uncounted["kernel"] = uncounted.get("kernel", 0) + 1
        elif cycles and int(cycles[1]) < UNKNOWN_CYCLES:
            seconds["compiler"] += times * int(cycles[1]) / chip.clock
        elif kind:
            seconds["others"] += times * _moved_bytes(operation, kind, program) / chip.bandwidth
    return Bound(**seconds, uncounted=uncounted)


def array_elements(hlo: str) -> set[int]:
    """How many elements the arrays anywhere in a program have, fusions included."""
    return {_product(axes) for _, axes in _ARRAY.findall(hlo)}


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a program, by name, each a mapping of operations by name."""

    entry: str
    computations: Mapping[str, Mapping[str, Operation]]


def parse(hlo: str) -> Program:
    """Reads the text of a compiled program."""
    computations: dict[str, dict[str, Operation]] = {}
    entry = current = ""
    for line in hlo.splitlines():
        if head := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            current = head[2]
            computations[current] = {}
            entry = current if head[1] else entry
        elif current and (found := _OPERATION.match(line)):
            name, shape, opcode, rest = found.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", rest[: _end_of_operands(rest)]))
            computations[current][name] = Operation(name, shape, opcode, operands, line)
    return Program(entry, computations)


def executed(program: Program, computation: str | None = None, times: int = 1) -> Iterator[tuple[Operation, int]]:
    """Yields every operation that runs and how often; loops of unknown length once, after a `while` that says so."""
    for operation in program.computations[computation or program.entry].values():
        if operation.opcode == "while":
            count = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', operation.line)
            if not count:
                yield operation, times
            yield from executed(program, _called(operation, "body"), times * (int(count[1]) if count else 1))
        elif operation.opcode == "call":
            yield from executed(program, _called(operation, "to_apply"), times)
        else:
            yield operation, times


def size(shape: str) -> int:
    """Bytes of a shape, or of all in a tuple."""
    return sum(BYTES[dtype] * _product(axes) for dtype, axes in _ARRAY.findall(shape))


def _product(axes: str) -> int:
    """Of axes as they are written, such as "8,128"."""
    return math.prod(int(axis) for axis in axes.split(",") if axis)


def _called(operation: Operation, attribute: str) -> str:
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", operation.line)
    assert found, operation.line
    return found[1]


def _kind(operation: Operation, program: Program) -> str | None:
    """Which of MOVED an operation is, or a fusion contains."""
    if operation.opcode in MOVED:
        return operation.opcode
    if operation.opcode == "fusion":
        inner = {inner.opcode for inner in program.computations[_called(operation, "calls")].values()}
        return next((kind for kind in MOVED if kind in inner), None)
    return None


def _moved_bytes(operation: Operation, kind: str, program: Program) -> int:
    """What must be moved at least: a gather reads what it writes, a scatter writes what its updates hold."""
    inputs = [size(known.shape) for known in _operands(operation, program)]
    if kind == "gather":
        return 2 * size(operation.shape)
    if kind == "scatter":
        return 2 * sum(sorted(inputs)[:-1])
    return sum(inputs) + size(operation.shape)


def _operands(operation: Operation, program: Program) -> list[Operation]:
    for operations in program.computations.values():
        if operations.get(operation.name) is operation:
            return [operations[name] for name in operation.operands if name in operations]
    return []


def _end_of_operands(rest: str) -> int:
    depth = 1
    for i, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i
    return len(rest)
