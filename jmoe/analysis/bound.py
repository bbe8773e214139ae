"""A lower bound of the time of a program compiled for a TPU, from what its compiler knows.

The compiler counts the cycles of every fusion and matrix multiply. Of what it does not count (kernels, gathers,
scatters, sorts) the bound takes the time that its bytes need at the bandwidth of the memory, or its FLOPs at the peak,
whichever is more. A kernel declares its own. What chips send each other takes what its bytes need over the links, less
what the program does meanwhile. Nothing is run: a real step is slower.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from jmoe.analysis.chips import CHIPS as CHIPS
from jmoe.analysis.chips import GIB as GIB
from jmoe.analysis.chips import Chip as Chip
from jmoe.analysis.collectives import Traffic, collectives, traffic
from jmoe.analysis.hlo import Operation, Program, executed, parse, size
from jmoe.analysis.hlo import array_elements as array_elements

MOVED = ("gather", "scatter", "sort")
UNKNOWN_CYCLES = 10**12  # what the compiler writes where it does not know


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """A lower bound of the time of a program, in seconds.

    Attributes:
      compiler: of what the compiler counted in cycles.
      kernels: of Pallas kernels, from what they declare.
      others: of gathers, scatters and sorts, from their bytes.
      collectives: of what chips send each other, as far as nothing else runs meanwhile.
      traffic: the same by kind and axes of the mesh, with bytes.
      uncounted: how many operations of which kind have no figure at all, loops of unknown length above all.
    """

    compiler: float
    kernels: float
    others: float
    collectives: float = 0.0
    traffic: tuple[Traffic, ...] = ()
    uncounted: Mapping[str, int]

    @property
    def seconds(self) -> float:
        """The sum: nothing is taken to overlap, but for what the program does while chips send."""
        return self.compiler + self.kernels + self.others + self.collectives


def bound(
    hlo: str | Program,
    chip: Chip,
    *,
    mesh: Mapping[str, int] | None = None,
    coordinates: Sequence[Sequence[int]] | None = None,
) -> Bound:
    """Reads the bound off an optimised program.

    Args:
      hlo: the text of `jax.stages.Compiled.as_text()`, or what `parse` made of it.
      chip: that it is compiled for.
      mesh: the axes of the mesh and their sizes, `dict(mesh.shape)`, to say along which of them chips send.
      coordinates: of the chips in the order of the mesh, `[d.coords for d in mesh.devices.flat]`; with them the time
        of an exchange takes into account which links it can use.
    """
    program = parse(hlo) if isinstance(hlo, str) else hlo
    seconds = {"compiler": 0.0, "kernels": 0.0, "others": 0.0}
    uncounted: dict[str, int] = {}
    for operation, times in executed(program):
        part, least = _least(operation, program, chip)
        if part in seconds:
            seconds[part] += times * least
        elif part:
            uncounted[part] = uncounted.get(part, 0) + 1

    def time_of(operations: Sequence[Operation]) -> float:
        return sum(times * _least(one, program, chip)[1] for one, times in executed(program, operations))

    rows = traffic(collectives(program), chip, mesh or {}, coordinates, time_of)
    exposed = sum((row.exposed for row in rows), 0.0)
    return Bound(**seconds, collectives=exposed, traffic=rows, uncounted=uncounted)


def _least(operation: Operation, program: Program, chip: Chip) -> tuple[str, float]:
    """The part of the bound that an operation belongs to and its least time; or what kind of it is not counted."""
    cycles = re.search(r'"estimated_cycles":"(\d+)"', operation.line)
    kind = _kind(operation, program)
    if operation.opcode in ("while", "conditional"):  # of unknown length, or it would not be here
        return operation.opcode, 0.0
    if operation.opcode == "custom-call":
        if declared := _declared(operation):
            return "kernels", max(declared[0] / chip.flops, declared[1] / chip.bandwidth)
        return "kernel" if "tpu_custom_call" in operation.line else "", 0.0
    if cycles and int(cycles[1]) < UNKNOWN_CYCLES:
        return "compiler", int(cycles[1]) / chip.clock
    if kind:
        return "others", _moved_bytes(operation, kind, program) / chip.bandwidth
    return "", 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a program computes and moves on one chip.

    Attributes:
      flops: of matrix multiplies and what kernels declare, two for a multiply-add.
      bytes: read and written, those in memory on the chip included.
    """

    flops: float
    bytes: float


def repeated(program: Program) -> Work:
    """What the loops of a program add to its `cost_analysis()`, which counts the body of a loop once.

    FLOPs are those of matrix multiplies and kernels; bytes are operands and results.
    """
    flops = bytes_ = 0.0
    for operation, times in executed(program):
        if times > 1 and operation.opcode not in ("parameter", "tuple", "get-tuple-element", "bitcast", "constant"):
            flops += (times - 1) * matmul_flops(operation, program)
            inputs = sum(size(operand.shape) for operand in program.operands(operation))
            bytes_ += (times - 1) * (inputs + size(operation.shape))
    return Work(flops=flops, bytes=bytes_)


def matmul_flops(operation: Operation, program: Program) -> float:
    """Of a matrix multiply, a kernel, or a fusion of them."""
    if operation.opcode == "fusion":
        return sum(matmul_flops(inner, program) for inner in program.called(operation, "calls").values())
    if operation.opcode == "convolution":
        return _convolution_flops(operation, program)
    if operation.opcode == "dot":
        left = _axes(program.operands(operation)[0].shape)
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", operation.line)
        inner = math.prod(left[int(i)] for i in contracted[1].split(",")) if contracted and contracted[1] else 1
        return 2.0 * math.prod(_axes(operation.shape)) * inner
    declared = _declared(operation) if operation.opcode == "custom-call" else None
    return float(declared[0]) if declared else 0.0


def _convolution_flops(operation: Operation, program: Program) -> float:
    """Two for every pair of an input and a weight that meet; on TPU all matrix multiplies are convolutions.

    Those of a batch have it as a spatial axis, padded and dilated such that each meets only its own weight.
    """
    image, kernel = (_axes(operand.shape) for operand in program.operands(operation)[:2])
    out = _axes(operation.shape)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", operation.line)
    assert labels, operation.line
    window = re.search(r"window=\{(.*?)\}", operation.line)
    options = dict(re.findall(r"(\w+)=([\dx_\-]+)", window[1])) if window else {}
    pairs = 1
    for digit in sorted(set(labels[1]) - {"b", "f"}):
        i = int(digit)
        low, _ = _option(options, "pad", i, "0_0").split("_")
        stride, left, right = (int(_option(options, name, i, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        length, taps = image[labels[1].index(digit)], kernel[labels[2].index(digit)]
        reach = (length - 1) * left + 1
        # Positions of the output and taps of the window that meet an input: neither padding nor between two inputs.
        places = [o * stride + t * right - int(low) for o in range(out[labels[3].index(digit)]) for t in range(taps)]
        pairs *= sum(0 <= place < reach and place % left == 0 for place in places)
    groups = re.search(r"batch_group_count=(\d+)", operation.line)
    batch = image[labels[1].index("b")] // (int(groups[1]) if groups else 1)
    return 2.0 * pairs * batch * kernel[labels[2].index("i")] * out[labels[3].index("f")]


def _option(options: Mapping[str, str], name: str, i: int, otherwise: str) -> str:
    return options[name].split("x")[i] if name in options else otherwise


def _axes(shape: str) -> tuple[int, ...]:
    found = re.search(r"\[([\d,]*)\]", shape)
    return tuple(int(axis) for axis in found[1].split(",") if axis) if found else ()


def _declared(operation: Operation) -> tuple[int, int] | None:
    """FLOPs and bytes that a kernel declares."""
    cost = re.search(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"', operation.line)
    return (int(cost[1]), int(cost[2])) if cost else None


def _kind(operation: Operation, program: Program) -> str | None:
    """Which of MOVED an operation is, or a fusion contains."""
    if operation.opcode in MOVED:
        return operation.opcode
    if operation.opcode == "fusion":
        inner = {inner.opcode for inner in program.called(operation, "calls").values()}
        return next((kind for kind in MOVED if kind in inner), None)
    return None


def _moved_bytes(operation: Operation, kind: str, program: Program) -> int:
    """What must be moved at least: a gather reads what it writes, a scatter writes what its updates hold."""
    inputs = [size(known.shape) for known in program.operands(operation)]
    if kind == "gather":
        return 2 * size(operation.shape)
    if kind == "scatter":
        return 2 * sum(sorted(inputs)[:-1])
    return sum(inputs) + size(operation.shape)
