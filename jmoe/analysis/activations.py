"""What a training step keeps for its backward pass, read off its compiled program.

A compiler for TPUs gives one number for all temporary memory: activations, gradients on their way and workspace. But
its program is in the order in which it runs, so that the arrays which are there when the backward pass begins can be
counted: those that were made before, are read after, and lie in the chip's memory (not in the fast one beside its
units, and not among what the step was given).
"""

import re
from collections.abc import Iterator, Mapping

from jmoe.analysis.hlo import Operation, Program, called, index_in_tuple, stored

_BARRIERS = ("opt-barrier", "optimization-barrier")
_VIEWS = ("bitcast", "tuple", "get-tuple-element", *_BARRIERS)
_WITHOUT = ("parameter", "constant")  # of temporary memory


def activations(program: Program) -> int:
    """Bytes per chip of what the forward pass leaves in memory for the backward pass; 0 for a program that has none.

    Where a batch is computed in parts, it is that of one part, as each has both passes.

    Args:
      program: of `parse`, of a step that `jax.grad` or `jax.value_and_grad` is a part of.
    """
    return max((_between(program, operations) for operations in _in_order(program)), default=0)


def _in_order(program: Program) -> Iterator[Mapping[str, Operation]]:
    """The computations whose operations run one after another: the program, the bodies of its loops, what it calls."""
    waiting = [program.entry]
    while waiting:
        operations = program.computations[waiting.pop()]
        yield operations
        for operation in operations.values():
            if operation.opcode in ("while", "call"):
                waiting.append(called(operation, "body" if operation.opcode == "while" else "to_apply"))


def _between(program: Program, operations: Mapping[str, Operation]) -> int:
    """Bytes of what is made before the backward pass of a computation begins, and read after that."""
    start = _start_of_backward(list(operations.values()))
    if start is None:
        return 0
    made, read = _lifetimes(program, operations)
    return sum(stored(operations[name].shape) for name in made if made[name] < start <= read.get(name, -1))


def _start_of_backward(operations: list[Operation]) -> int | None:
    """The place in the order that leaves the fewest operations of either pass on the wrong side of it.

    A scheduler moves a few: what the gradient of a sum needs is known before the sum.
    """
    backward = [_is_backward(operation) for operation in operations]
    ahead = backward.count(False)  # of the forward pass, from here on
    if not ahead or True not in backward:
        return None
    start, fewest, behind = 0, ahead, 0
    for place, one in enumerate(backward, 1):
        ahead -= one is False
        behind += one is True
        if ahead + behind < fewest:
            start, fewest = place, ahead + behind
    return start


def _is_backward(operation: Operation) -> bool | None:
    """By the name that JAX gives what it differentiates; None for what belongs to neither pass."""
    name = re.search(r'op_name="([^"]*)"', operation.line)
    if name is None or "jvp(" not in name[1]:
        return None
    return "transpose(" in name[1]


def _lifetimes(program: Program, operations: Mapping[str, Operation]) -> tuple[dict[str, int], dict[str, int]]:
    """Where in the order every array is made and where it is read last, each under the name of what makes it.

    A view has no array of its own. What starts and ends elsewhere, such as a copy, makes its array at the start and
    reads until the end. Of several results, each is an array.
    """
    place = {name: i for i, name in enumerate(operations)}
    begun = dict(place)  # where the results of an operation are made
    views: dict[str, frozenset[str]] = {}  # the arrays that each operation shows
    made: dict[str, int] = {}
    read: dict[str, int] = {}
    for name, operation in operations.items():
        inputs = program.operands(operation)
        shown = frozenset[str]().union(*(views[one.name] for one in inputs))
        read |= dict.fromkeys(shown, place[name])
        if operation.opcode.endswith("-done"):
            begun[name] = place[inputs[0].name]
        source = _element(program, operation)
        if operation.opcode in _WITHOUT:
            views[name] = frozenset()
        elif source is not None and source.opcode not in (*_VIEWS, *_WITHOUT):  # one of several results
            views[name], made[name] = frozenset([name]), begun[source.name]
        elif source is not None:
            views[name] = views[source.name]
        elif operation.opcode in _VIEWS or operation.opcode.endswith("-start"):
            views[name] = shown
        elif operation.shape.startswith("("):
            views[name] = frozenset()
        else:
            views[name], made[name] = frozenset([name]), begun[name]
    return made, read


def _element(program: Program, operation: Operation) -> Operation | None:
    """What an element of a tuple is: what was put into it, or the operation that has several results."""
    index = index_in_tuple(operation)
    if index is None:
        return None
    (source,) = program.operands(operation)
    while source.opcode in _BARRIERS:
        (source,) = program.operands(source)
    return program.operands(source)[index] if source.opcode == "tuple" else source
