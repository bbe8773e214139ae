"""Times of functions that compete, taken in turn, so that what else the machine does falls on all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

Times = Mapping[str, list[float]]


def paired_times(functions: Mapping[str, Callable[[], Any]], *, runs: int = 20, calls: int = 1) -> Times:
    """Seconds per call of each function, run after run; the n-th of all followed each other.

    Args:
      functions: by name; each returns arrays, which are waited for. All are called twice before the clock starts.
      runs: how often each is timed.
      calls: of a function that are queued before their results are waited for, where one is too short for the clock.
    """
    for function in functions.values():
        jax.block_until_ready(function())
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(runs):
        for name, function in functions.items():
            start = time.perf_counter()
            results = [function() for _ in range(calls)]
            jax.block_until_ready(results)
            times[name].append((time.perf_counter() - start) / calls)
    return times


def ratio(times: Times, name: str, baseline: str) -> float:
    """The median over runs of the time of name over that of baseline, each pair taken one after the other."""
    return statistics.median(ours / theirs for ours, theirs in zip(times[name], times[baseline], strict=True))
