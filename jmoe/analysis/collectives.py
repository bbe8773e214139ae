"""What the chips of a compiled program send each other: how many bytes, along which axes of the mesh, how fast at best.

Bytes are those of the whole array that a chip has before or after, whichever is larger: the operand of an all-to-all,
all-reduce, reduce-scatter or permute, the result of an all-gather. A chip must send, in a group of n: of an all-reduce
2(n - 1)/n of them, of an all-gather, reduce-scatter or all-to-all (n - 1)/n, of a permute all.

The least time is the largest of these bounds, none of which any routing of messages can beat:

- all bytes that must be sent, over all links of all chips;
- what one chip must send or receive, over the links that it has: fewer at the edge of a slice that does not wrap
  around;
- where the coordinates of the chips are known, what must cross a plane through the slice, over the links that cross it.
  This is what slows an all-to-all over many chips: half of it crosses the middle.

Nothing is added for latency, nor for the links that messages of several hops take from others, but for the planes. A
ragged all-to-all is taken to be full and evenly spread, for what it sends is not known before it runs.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from jmoe.analysis.chips import Chip
from jmoe.analysis.hlo import Operation, Program, called, size, trip_count

KINDS = (
    "all-to-all",
    "ragged-all-to-all",
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "collective-permute",
    "collective-broadcast",
)
Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One exchange between chips.

    Attributes:
      name: in the program.
      kind: one of KINDS; an all-reduce of which every chip keeps only its part is a reduce-scatter.
      bytes: of the whole array, per chip; see the top of this file.
      groups: the chips that exchange with each other, as positions in the mesh; (source, target) pairs of a permute.
      times: how often it runs in a step.
      between: what the program does while it is under way; empty if it waits.
    """

    name: str
    kind: str
    bytes: int
    groups: Groups
    times: int
    between: tuple[Operation, ...] = ()

    @property
    def sent(self) -> float:
        """Bytes that a chip must send at least, each time."""
        return self.bytes * _sent(self.kind, max(map(len, self.groups), default=1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """All collectives of one kind along the same axes, per chip and step.

    Attributes:
      kind: one of KINDS.
      axes: of the mesh, along which it goes.
      count: how many there are.
      bytes: of the arrays.
      sent: bytes that a chip must send at least.
      seconds: the least time over the links.
      exposed: seconds of those in which the chip has nothing else to do.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int
    sent: float
    seconds: float
    exposed: float


def collectives(program: Program) -> list[Collective]:
    """Every exchange between chips in a program, those of loops with how often they run.

    An exchange in two parts, or in parts that are fused with other work, is listed once.
    """
    return list(_collectives(program, program.computations[program.entry].values(), 1))


def traffic(
    found: Iterable[Collective],
    chip: Chip,
    mesh: Mapping[str, int],
    coordinates: Sequence[Sequence[int]] | None = None,
    hidden: Callable[[Sequence[Operation]], float] = lambda operations: 0.0,
) -> tuple[Traffic, ...]:
    """Sums collectives up by kind and axes, the slowest first.

    Args:
      found: of `collectives`.
      chip: that sends.
      mesh: the axes of the mesh and their sizes, the last varying fastest over the positions.
      coordinates: of the chip at each position in the grid of links; None leaves out the bounds that need them.
      hidden: the time of operations that run between the start of an exchange and its end.
    """
    rows: dict[tuple[str, tuple[str, ...]], list[Traffic]] = collections.defaultdict(list)
    where = None if coordinates is None else tuple(tuple(int(x) for x in place) for place in coordinates)
    for one in found:
        seconds = least_seconds(one, chip, where)
        exposed = max(0.0, seconds - hidden(one.between)) if one.between else seconds
        row = Traffic(
            kind=one.kind,
            axes=axes_of(one.groups, mesh),
            count=one.times,
            bytes=one.times * one.bytes,
            sent=one.times * one.sent,
            seconds=one.times * seconds,
            exposed=one.times * exposed,
        )
        rows[row.kind, row.axes].append(row)
    sums = []
    for (kind, axes), parts in rows.items():
        total = {field: sum(getattr(p, field) for p in parts) for field in ("count", "bytes", "sent", "seconds")}
        sums.append(Traffic(kind=kind, axes=axes, exposed=sum(p.exposed for p in parts), **total))
    return tuple(sorted(sums, key=lambda row: (-row.seconds, row.kind, row.axes)))


def least_seconds(collective: Collective, chip: Chip, coordinates: tuple[tuple[int, ...], ...] | None = None) -> float:
    """The least time that an exchange takes each time; see the top of this file. 0 for a chip of unknown links."""
    if not chip.ici or not collective.sent:
        return 0.0
    if coordinates is None:
        return collective.sent / chip.ici
    return collective.bytes * _seconds_per_byte(collective.kind, collective.groups, chip, coordinates)


def axes_of(groups: Groups, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The axes of a mesh along which the members of a group differ."""
    members = [group for group in groups if len(group) > 1]
    if not members or math.prod(mesh.values()) <= max(map(max, members)):
        return ()  # of a mesh that is not this one
    differ = np.zeros(len(mesh), bool)
    for group in members:
        places = np.stack(np.unravel_index(np.array(group), tuple(mesh.values())))  # [axes, members]
        differ |= (places != places[:, :1]).any(axis=1)
    return tuple(name for name, one in zip(mesh, differ, strict=True) if one)


def groups_of(line: str, partitions: int) -> Groups:
    """The groups of a collective, from its line in a program that so many devices run.

    Raises:
      ValueError: they are written in a way that is not known here.
    """
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})?\}", line):
        return _listed(pairs[1] or "")
    if re.search(r"replica_groups=\{\}", line) or "replica_groups=" not in line:
        return (tuple(range(partitions)),)
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return _listed(listed[1])
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
        return _tuples(_iota(iota[3]).reshape(int(iota[1]), int(iota[2])))
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}", line):
        return _along(mesh[1], mesh[2], mesh[3])
    raise ValueError(f"Replica groups of unknown form: {line.strip()[:300]}")


def _listed(text: str) -> Groups:
    return tuple(tuple(int(i) for i in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", text))


def _iota(text: str) -> np.ndarray:
    """The numbers from 0 in the order of "[4,8]T(1,0)": counted over the first shape, read in another order."""
    shape, _, order = text.partition("T")
    axes = _numbers(shape)
    ids = np.arange(math.prod(axes)).reshape(axes)
    return ids.transpose(_numbers(order)) if order else ids


def _along(mesh: str, device_ids: str | None, names: str) -> Groups:
    """Groups along axes of a mesh: "'a'=4,'b'=2", perhaps "[2,4]T(1,0)", and "'b'" or part of an axis, "'a':(2)2"."""
    sizes = {name: int(length) for name, length in re.findall(r"'?([^',=]+)'?=(\d+)", mesh)}
    if device_ids is None:
        ids = np.arange(math.prod(sizes.values()))
    else:
        ids = _iota(device_ids) if device_ids.startswith("[") else np.array(_numbers(device_ids))
    parts = collections.defaultdict(list)  # of each axis: (the product of what comes before, size)
    for name, before, length in re.findall(r"'?([^',:]+)'?(?::\((\d+)\)(\d+))?", names):
        parts[name].append((int(before or 1), int(length or sizes[name])))
    shape, chosen = [], []
    for name, length in sizes.items():
        position = 1
        for before, part in sorted(parts[name]):
            shape += [before // position, part]
            chosen += [False, True]
            position = before * part
        shape.append(length // position)
        chosen.append(False)
    order = [i for i, inside in enumerate(chosen) if not inside] + [i for i, inside in enumerate(chosen) if inside]
    members = math.prod(length for length, inside in zip(shape, chosen, strict=True) if inside)
    return _tuples(ids.reshape(shape).transpose(order).reshape(-1, members))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _tuples(groups: np.ndarray) -> Groups:
    return tuple(tuple(int(i) for i in group) for group in groups)


def _collectives(program: Program, operations: Iterable[Operation], times: int) -> Iterator[Collective]:
    """Those among operations of one computation, and of the loops and calls among these."""
    operations = list(operations)
    seen: set[str] = set()  # channels of exchanges that are spread over several fusions
    for i, operation in enumerate(operations):
        if operation.opcode == "while":
            yield from _collectives(
                program, program.called(operation, "body").values(), times * (trip_count(program, operation) or 1)
            )
        elif operation.opcode == "call":
            yield from _collectives(program, program.called(operation, "to_apply").values(), times)
        elif operation.opcode.removesuffix("-start") in KINDS:
            end = _end(operations, i) if operation.opcode.endswith("-start") else i
            yield _collective(program, operation, times, operations[i + 1 : end])
        elif operation.opcode == "async-start":
            for inner in _inside(program, operation):
                yield _collective(program, inner, times, operations[i + 1 : _end(operations, i)])
        elif operation.opcode == "fusion":
            for inner in _inside(program, operation):
                channel = _channel(inner)
                if channel in seen:
                    continue
                seen.add(channel)
                end = i
                if _has(program, operation, "AsyncCollectiveStart"):
                    end = next((j for j in range(i + 1, len(operations)) if _ends(program, operations[j], channel)), i)
                yield _collective(program, inner, times, operations[i + 1 : end], fused=True)


def _collective(
    program: Program, operation: Operation, times: int, between: Sequence[Operation], fused: bool = False
) -> Collective:
    kind = operation.opcode.removesuffix("-start")
    groups = groups_of(operation.line, program.partitions)
    if kind == "collective-permute":
        groups = tuple(pair for pair in groups if pair[0] != pair[1])
    operands = program.operands(operation)
    if kind == "ragged-all-to-all":  # the others are the buffer to write into, offsets and sizes
        operands = operands[:1]
    whole = sum(size(operand.shape) for operand in operands)
    if kind == "all-gather":
        whole *= max(map(len, groups), default=1)
    if kind == "all-reduce" and fused and _only_a_part_is_kept(program, operation):
        kind = "reduce-scatter"
    return Collective(name=operation.name, kind=kind, bytes=whole, groups=groups, times=times, between=tuple(between))


def _inside(program: Program, operation: Operation) -> list[Operation]:
    """The collectives in a fusion, or in what an async-start calls."""
    found = []
    for inner in program.called(operation, "calls").values():
        if inner.opcode in KINDS:
            found.append(inner)
        elif inner.opcode == "fusion":
            found += _inside(program, inner)
    return found


def _only_a_part_is_kept(program: Program, all_reduce: Operation) -> bool:
    """Whether a fusion slices the result of its all-reduce: how the compiler for TPUs writes a reduce-scatter."""
    users = [o for o in program.computations[all_reduce.computation].values() if all_reduce.name in o.operands]
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def _end(operations: Sequence[Operation], start: int) -> int:
    """Where the operation of that index ends: the first "-done" that reads it, or its updates."""
    names = {operations[start].name}
    for j in range(start + 1, len(operations)):
        if names & set(operations[j].operands):
            if operations[j].opcode.endswith("-done"):
                return j
            if operations[j].opcode.endswith("-update"):
                names.add(operations[j].name)
    return start


def _ends(program: Program, operation: Operation, channel: str) -> bool:
    return (
        operation.opcode == "fusion"
        and any(_channel(inner) == channel for inner in _inside(program, operation))
        and _has(program, operation, "AsyncCollectiveDone")
    )


def _has(program: Program, fusion: Operation, target: str) -> bool:
    """Whether a fusion contains the custom call of that name."""
    inside = program.computations[called(fusion, "calls")].values()
    return any(o.opcode == "custom-call" and f'custom_call_target="{target}"' in o.line for o in inside)


def _channel(operation: Operation) -> str:
    found = re.search(r"\bchannel_id=(\d+)", operation.line)
    return found[1] if found else operation.name


def _sent(kind: str, n: int) -> float:
    """The share of the whole array that each chip of a group of n must send."""
    if n < 2:
        return 0.0
    if kind in ("collective-permute", "collective-broadcast"):
        return 1.0
    return (2 if kind == "all-reduce" else 1) * (n - 1) / n


@functools.lru_cache(maxsize=1024)
def _seconds_per_byte(kind: str, groups: Groups, chip: Chip, coordinates: tuple[tuple[int, ...], ...]) -> float:
    """The least time for each byte of the whole array, from all bounds."""
    places = np.array(coordinates)[:, : chip.directions]  # [positions, directions]
    sizes = tuple(int(s) for s in places.max(axis=0) + 1)
    wraps = chip.wraps(sizes)
    # Links of each chip: two in a direction, but at an end that does not wrap one, and none where there is no other.
    links = np.zeros(len(places))
    for d, (length, wrap) in enumerate(zip(sizes, wraps, strict=True)):
        at_end = (places[:, d] == 0).astype(int) + (places[:, d] == length - 1)
        links += 2 - (0 if wrap else at_end)
    members = np.array(sorted({i for group in groups for i in group if len(group) > 1}))
    fewest = links[members].min()
    total = sum(len(g) * _sent(kind, len(g)) for g in groups) / (2 if kind == "collective-permute" else 1)
    alone = 1.0 if kind == "all-reduce" else max(_sent(kind, len(g)) for g in groups)
    seconds = [total / links.sum(), alone / fewest]
    for d, (length, wrap) in enumerate(zip(sizes, wraps, strict=True)):
        counts = _counts(groups, places[:, d], length)
        lines = len(places) / length
        for first in range(length if wrap else 1):
            for width in range(1, length // 2 + 1 if wrap else length):
                inside = [(first + w) % length for w in range(width)]
                crossing = _crossing(kind, counts[..., inside].sum(axis=-1), counts.sum(axis=-1))
                seconds.append(crossing / (lines * (2 if wrap else 1)))
    return float(max(seconds)) / chip.link


def _counts(groups: Groups, coordinate: np.ndarray, length: int) -> np.ndarray:
    """How many members of each group have which coordinate, [groups, members or ends of a pair, length]."""
    counts = np.zeros((len(groups), max(map(len, groups)), length))
    for g, group in enumerate(groups):
        for m, member in enumerate(group):
            counts[g, m, coordinate[member]] = 1
    return counts


def _crossing(kind: str, inside: np.ndarray, present: np.ndarray) -> float:
    """How many whole arrays must leave or enter a part of the slice, whichever is more.

    Args:
      kind: of the collective.
      inside: [groups, members], 1 for a member that is inside.
      present: [groups, members], 1 for a member of a group, which may be smaller than others.
    """
    if kind == "collective-permute":
        source, target = inside[:, 0], inside[:, 1]
        return max(float((source * (1 - target)).sum()), float((target * (1 - source)).sum()))
    a, n = inside.sum(axis=1), present.sum(axis=1)
    b = n - a
    both = (a > 0) & (b > 0)
    if kind in ("all-to-all", "ragged-all-to-all"):
        return float((a * b / n).sum())
    if kind in ("all-reduce", "collective-broadcast"):
        return float(both.sum()) if kind == "all-reduce" else 0.0
    return max(float((both * a / n).sum()), float((both * b / n).sum()))
