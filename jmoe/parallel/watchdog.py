"""Ends a run that no longer makes steps, with the stacks that say where it stands."""

import contextlib
import math
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator

from jmoe.errors import STUCK
from jmoe.parallel.hosts import end_all, print_stacks

_RECENT = 50  # steps whose median is what a step should take


class Watchdog:
    """Watches while it is entered that steps end, in a thread that sleeps until one is overdue.

    A lost process is found otherwise (jmoe/parallel/hosts.py); this is for what hangs and is still there: devices that
    wait for each other, a file system, a worker of the data pipeline. A step is overdue after `multiple` times the
    median of the recent ones, and never before `least_seconds`. The first step is not timed before it ends, as it
    compiles; `first_seconds` is its limit, and `pause_seconds` that of evaluating or saving. All stacks of this process
    are then printed, and it ends with status 76; the other hosts print theirs and end, too.

    Attributes:
      step: the last that ended; None before the first.
    """

    def __init__(
        self,
        *,
        multiple: float | int = 20,
        least_seconds: float | int = 600,
        first_seconds: float | int = 3600,
        pause_seconds: float | int = 7200,
    ):
        """Takes how many times the median a step may take, and the least limits in seconds."""
        self.step: int | None = None
        self._multiple = float(multiple)
        self._least = float(least_seconds)
        self._first = float(first_seconds)
        self._longest_pause = float(pause_seconds)
        self._times: deque[float] = deque(maxlen=_RECENT)
        self._since = 0.0  # when the step under way began, pauses not counted
        self._pauses = 0
        self._paused_at = 0.0
        self._over = False
        self._wakes = math.inf  # when the thread looks next
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._watch, name="jmoe-watchdog", daemon=True)

    def step_ended(self, step: int) -> None:
        """Notes that a step has ended."""
        now = time.monotonic()
        with self._changed:
            if self.step is not None:
                self._times.append(now - self._since)
            self.step = step
            self._since = now
            # Nearly always the thread sleeps on, and sees that the limit has moved when the old one is reached.
            if now + self.limit() < self._wakes:
                self._changed.notify_all()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count the time within: for evaluating, saving and compiling, which are no part of a step."""
        with self._changed:
            self._pauses += 1
            if self._pauses == 1:
                self._paused_at = time.monotonic()
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._pauses -= 1
                if self._pauses == 0:
                    self._since += time.monotonic() - self._paused_at
                    self._changed.notify_all()

    def limit(self) -> float:
        """The seconds after which the step under way is overdue."""
        if not self._times:
            return self._first
        return max(self._least, self._multiple * statistics.median(self._times))

    def __enter__(self) -> "Watchdog":
        """Begins to watch."""
        self._since = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ceases to watch."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
        self._thread.join()

    def _watch(self) -> None:
        with self._changed:
            while not self._over:
                overdue = self._paused_at + self._longest_pause if self._pauses else self._since + self.limit()
                left = overdue - time.monotonic()
                if left <= 0:
                    break
                self._wakes = overdue
                self._changed.wait(left)
            else:
                return
        self._bark()

    def _bark(self) -> None:
        step = "The first step has not ended" if self.step is None else f"No step has ended after step {self.step}"
        seconds = self.limit()
        if self._pauses:
            step, seconds = f"{step}, nor what comes after it", self._longest_pause
            why = "the limit of evaluating or saving"
        elif self._times:
            median = statistics.median(self._times)
            why = f"{self._multiple:g} times the median of {median:.3g} s, at least {self._least:g} s"
        else:
            why = f"the limit of the first, {self._first:g} s"
        print_stacks()
        end_all(
            f"{step} for {seconds:.3g} s ({why}). The stacks above say where each thread stands. Run the same "
            "command on all hosts to go on from the last checkpoint.",
            STUCK,
        )
