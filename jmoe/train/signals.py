"""Stopping a run from outside: a signal asks, a second Ctrl-C insists."""

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any

logger = logging.getLogger("jmoe")

_TOGETHER = 2.0  # seconds within which signals are one request


class StopRequest:
    """Notes Ctrl-C and SIGTERM while it is entered, so that a run can finish its step and save.

    Ctrl-C again insists: it interrupts at once, as if nobody had asked for politeness. But what follows the first
    signal immediately belongs to it: a terminal signals all, and the script that started this one passes on its own.
    SIGTERM never insists: schedulers send it more than once before SIGKILL, and there may still be time to save.

    Attributes:
      signum: the number of the signal that came, or None.
    """

    def __init__(self) -> None:
        """Nothing is noted before it is entered."""
        self.signum: int | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def ask(self, why: str) -> None:
        """Stops the run as SIGTERM would; from any thread."""
        if self.signum is None:
            self.signum, self._since = signal.SIGTERM, time.monotonic()
            _say(why)

    def __enter__(self) -> "StopRequest":
        """Starts to note signals; does nothing outside the main thread, which gets none."""
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        """Leaves signals as they were."""
        self._restore()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        if self.signum is None:
            self.signum, self._since = signum, now
            _say(signal.Signals(signum).name)
        elif signum == signal.SIGINT and now - self._since >= _TOGETHER:
            self._restore()
            signal.raise_signal(signum)

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}


def _say(why: str) -> None:
    logger.warning("%s: stopping as soon as what was computed is saved.", why)
