"""Times of functions that compete, taken in turn, so that what else the machine does falls on all of them alike."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import kernels_pallas
from kernels_pallas.cases import Case

Times = Mapping[str, list[float]]
Work = tuple[Callable[..., Any], tuple[Any, ...]]  # a function and its arguments, arrays all
STARTING = 50e-6  # seconds in which a host can start a small program, with some reserve


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpTimes:
    """How long an op takes, forward alone and with its gradients.

    Attributes:
      op: its name.
      case: the size.
      dtype: of the rows.
      bound: what it is held against, such as "copy", in seconds under this name.
      default: the implementation that is taken here where none is named.
      runs: how often each was timed.
      seconds: {"forward": {name: seconds}, "both": {name: seconds}}, medians, of the bound and of implementations.
      ratios: the same without the bound: medians of the ratios to it in the same run.
      left_out: implementations of this platform that cannot take the arguments, and why.
    """

    op: str
    case: Case
    dtype: str
    bound: str
    default: str
    runs: int
    seconds: Mapping[str, Mapping[str, float]]
    ratios: Mapping[str, Mapping[str, float]]
    left_out: Mapping[str, str]


def paired_times(functions: Mapping[str, Callable[[], Any]], *, runs: int = 20, calls: int = 1) -> Times:
    """Seconds per call of each function, run after run; the n-th of all followed each other.

    Args:
      functions: by name; each returns arrays, which are waited for. All are called twice before the clock starts.
      runs: how often each is timed.
      calls: of a function that are queued before the last result is waited for, where one is too short for the clock.
    """
    for function in functions.values():
        jax.block_until_ready(function())
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            result, start = None, time.perf_counter()
            for _ in range(calls):
                result = function()  # one result at a time is held: those of large layers would fill the memory
            jax.block_until_ready(result)  # a device ends programs in the order in which they were started
            times[name].append((time.perf_counter() - start) / calls)
            del result
    return times


def ratio(times: Times, name: str, baseline: str) -> float:
    """The median over runs of the time of name over that of baseline, each pair taken one after the other."""
    return statistics.median(ours / theirs for ours, theirs in zip(times[name], times[baseline], strict=True))


def medians(times: Times) -> dict[str, float]:
    """The median of each, in seconds."""
    return {name: statistics.median(values) for name, values in times.items()}


def compiled_times(works: Mapping[str, Work], *, runs: int = 20) -> Times:
    """Seconds per call of each function, compiled, run after run as in `paired_times`.

    On CPU calls are awaited one by one; on an accelerator 20 are queued, so that the device need not wait for the next.
    Work that is shorter than STARTING even so measures how fast programs can be started: make it larger.
    """
    functions = {
        name: functools.partial(jax.jit(function), *arguments) for name, (function, arguments) in works.items()
    }
    return paired_times(functions, runs=runs, calls=1 if jax.default_backend() == "cpu" else 20)


def default_dtype() -> str:
    """In what is computed here as a rule: float32 on CPU, which is slow at everything else, bfloat16 elsewhere."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def with_gradients(function: Callable[..., Any], primals: tuple[Any, ...], others: tuple[Any, ...], dout: Any) -> Work:
    """The work of function(*primals, *others) and of its gradients in the primals, for a gradient of its result."""

    def both(primals, others, dout):
        result, pull = jax.vjp(lambda *primals: function(*primals, *others), *primals)
        return result, pull(dout)

    return both, (primals, others, dout)


def copy_work(rows_moved: int, width: int, dtype: Any) -> Work:
    """The work of reading and writing rows_moved rows, half of each: what moves them can hardly take less time."""
    # Signs change, because the compiler would give back the array itself for a copy of it.
    return jnp.negative, (jnp.ones((-(-rows_moved // 2), width), dtype),)


def time_op(
    op: str,
    case: Case,
    function: Callable[..., Any],
    primals: tuple[Any, ...],
    others: tuple[Any, ...],
    *,
    bound: str,
    bounds: Mapping[str, Work],
    implementations: Sequence[str] | None,
    runs: int,
) -> OpTimes:
    """Times the implementations of an op in turn with its bound.

    Args:
      op: its name.
      case: the size.
      function: (*primals, *others, implementation=name) -> an array.
      primals: what it is differentiated in; rows first.
      others: its other arguments.
      bound: the name of the bound.
      bounds: its work, for "forward" and "both".
      implementations: names; None for all that can run here, without the slow "reference".
      runs: how often each is timed.

    Raises:
      NotImplementedError: a named implementation is unknown, or cannot run here; it says why.
    """
    here = kernels_pallas.implementations()[op]
    works: dict[str, Mapping[str, Work]] = {}
    left_out: dict[str, str] = {}
    for name in implementations or [name for name in here if name != "reference"]:
        one = functools.partial(function, implementation=name)
        try:
            like = jax.eval_shape(one, *primals, *others)
            dout = jax.random.normal(jax.random.key(9), like.shape, like.dtype)
            works[name] = {"forward": (one, (*primals, *others)), "both": with_gradients(one, primals, others, dout)}
            for work, arguments in works[name].values():
                jax.jit(work).lower(*arguments)
        except NotImplementedError as error:
            if implementations:
                raise
            works.pop(name, None)
            left_out[name] = str(error)
    times = {
        part: compiled_times({bound: work} | {name: parts[part] for name, parts in works.items()}, runs=runs)
        for part, work in bounds.items()
    }
    return OpTimes(
        op=op,
        case=case,
        dtype=jnp.dtype(primals[0].dtype).name,
        bound=bound,
        default=next(name for name in here if name not in left_out),
        runs=runs,
        seconds={part: medians(values) for part, values in times.items()},
        ratios={part: {name: ratio(values, name, bound) for name in works} for part, values in times.items()},
        left_out=left_out,
    )
