"""Reads the text of a compiled program, `jax.stages.Compiled.as_text()`."""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping

BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}
BYTES |= {"s64": 8, "u64": 8, "f64": 8}
_ARRAY = re.compile(r"\b(" + "|".join(BYTES) + r")\[([\d,]*)\]")
# The same with its layout: the order of its axes, the fastest first, the tile, and where it lies.
_LAID_OUT = re.compile(_ARRAY.pattern + r"(?:\{([\d,]*)(?::(?:T\(([\d,]*)\))?(?:\([\d,]*\))*(?:S\((\d+)\))?[^}]*)?\})?")
_OPERATION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line of a compiled program."""

    name: str
    shape: str  # of the result, such as "bf16[8,128]{1,0}", or a tuple of those
    opcode: str
    operands: tuple[str, ...]
    line: str
    computation: str  # that it belongs to

    @property
    def is_root(self) -> bool:
        """Whether its result is that of its computation."""
        return self.line.lstrip().startswith("ROOT ")


@dataclasses.dataclass(frozen=True)
class Program:
    """The computations of a program, by name, each a mapping of operations by name, in the order in which they run."""

    entry: str
    computations: Mapping[str, Mapping[str, Operation]]
    partitions: int = 1  # devices that run it together

    def operands(self, operation: Operation) -> list[Operation]:
        """Those that compute what an operation reads."""
        known = self.computations[operation.computation]
        return [known[name] for name in operation.operands if name in known]

    def called(self, operation: Operation, attribute: str) -> Mapping[str, Operation]:
        """The computation that an operation names, such as calls=%fused."""
        return self.computations[called(operation, attribute)]


def parse(hlo: str) -> Program:
    """Reads the text of a compiled program."""
    computations: dict[str, dict[str, Operation]] = {}
    entry = current = ""
    partitions = re.search(r"^HloModule .*\bnum_partitions=(\d+)", hlo)
    for line in hlo.splitlines():
        if head := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line):
            current = head[2]
            computations[current] = {}
            entry = current if head[1] else entry
        elif current and (found := _OPERATION.match(line)):
            name, shape, opcode, rest = found.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", rest[: _end_of_operands(rest)]))
            computations[current][name] = Operation(name, shape, opcode, operands, line, current)
    return Program(entry, computations, int(partitions[1]) if partitions else 1)


def executed(
    program: Program, operations: Iterable[Operation] | None = None, times: int = 1
) -> Iterator[tuple[Operation, int]]:
    """Yields every operation that runs and how often; loops of unknown length once, after a `while` that says so.

    Args:
      program: the program.
      operations: of one computation, with those of the loops among them; all of the program if None.
      times: how often these run.
    """
    if operations is None:
        operations = program.computations[program.entry].values()
    for operation in operations:
        if operation.opcode == "while":
            count = trip_count(program, operation)
            if count is None:
                yield operation, times
            yield from executed(program, program.called(operation, "body").values(), times * (count or 1))
        elif operation.opcode == "call":
            yield from executed(program, program.called(operation, "to_apply").values(), times)
        else:
            yield operation, times


def trip_count(program: Program, operation: Operation) -> int | None:
    """How often the body of a while loop runs; None where neither the compiler says it nor the loop shows it.

    A loop shows it if it counts up to a constant, as `jax.lax.scan` does: by ones from a constant, while the counter
    is less than another.
    """
    if count := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', operation.line):
        return int(count[1])
    condition = _root(program.called(operation, "condition"))
    body = _root(program.called(operation, "body"))
    start = program.operands(operation)[0]
    if condition is None or condition.opcode != "compare" or "direction=LT" not in condition.line:
        return None
    if body is None or body.opcode != "tuple" or start.opcode != "tuple":
        return None
    counter, limit = program.operands(condition)
    index = _index(program, counter)
    step = None if index is None else _source(program, program.operands(body)[index])
    if index is None or step is None or step.opcode != "add":
        return None
    counters = [_index(program, operand) == index for operand in program.operands(step)]
    by = [_constant(program, operand) for operand in program.operands(step)]
    first, last = _constant(program, program.operands(start)[index]), _constant(program, limit)
    if counters.count(True) != 1 or by[counters.index(False)] != 1 or first is None or last is None:
        return None
    return max(last - first, 0)


def _root(operations: Mapping[str, Operation]) -> Operation | None:
    return next((operation for operation in operations.values() if operation.is_root), None)


def _source(program: Program, operation: Operation) -> Operation:
    """What an operation copies, if it only does that."""
    while operation.opcode in ("copy", "convert", "bitcast"):
        operation = program.operands(operation)[0]
    return operation


def _index(program: Program, operation: Operation) -> int | None:
    """Which element of a tuple an operation is."""
    return index_in_tuple(_source(program, operation))


def _constant(program: Program, operation: Operation) -> int | None:
    """The whole number that an operation always has."""
    source = _source(program, operation)
    found = re.search(r"\bconstant\((-?\d+)\)", source.line) if source.opcode == "constant" else None
    return int(found[1]) if found else None


def index_in_tuple(operation: Operation) -> int | None:
    """Which element of its operand a get-tuple-element is; None for other operations."""
    found = re.search(r"\bindex=(\d+)", operation.line) if operation.opcode == "get-tuple-element" else None
    return int(found[1]) if found else None


def size(shape: str) -> int:
    """Bytes of a shape, or of all in a tuple."""
    return sum(BYTES[dtype] * math.prod(axes) for dtype, axes in arrays(shape))


def stored(shape: str) -> int:
    """Bytes that a shape, or all in a tuple, take in the memory of a TPU chip: whole tiles, as its layout has them.

    An array that lies elsewhere, such as in vector memory (the layout says S(1)), takes none.
    """
    total = 0
    for dtype, axes, order, tile, space in _LAID_OUT.findall(shape):
        if space not in ("", "0"):
            continue
        lengths = [int(axis) for axis in axes.split(",") if axis]
        if order and tile:
            fastest_first = [lengths[int(i)] for i in order.split(",")]
            tiles = [int(side) for side in reversed(tile.split(","))] + [1] * len(lengths)
            lengths = [-(-n // side) * side for n, side in zip(fastest_first, tiles, strict=False)]
        total += BYTES[dtype] * math.prod(lengths)
    return total


def arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """The dtype and the axes of every array that a text mentions."""
    return [(dtype, tuple(int(axis) for axis in axes.split(",") if axis)) for dtype, axes in _ARRAY.findall(text)]


def array_elements(hlo: str) -> set[int]:
    """How many elements the arrays anywhere in a program have, fusions included."""
    return {math.prod(axes) for _, axes in arrays(hlo)}


def called(operation: Operation, attribute: str) -> str:
    """The name of the computation that an operation names by an attribute."""
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", operation.line)
    assert found, operation.line
    return found[1]


def _end_of_operands(rest: str) -> int:
    depth = 1
    for i, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return i
    return len(rest)
