"""Stopping a run from outside: the first signal asks, the second insists."""

import logging
import signal
import threading
from types import FrameType
from typing import Any

logger = logging.getLogger("jmoe")


class StopRequest:
    """Notes Ctrl-C and SIGTERM while it is entered, so that a run can finish its step and save.

    A second signal is handled as if nobody had asked for politeness: it interrupts at once.

    Attributes:
      signum: the number of the signal that came, or None.
    """

    def __init__(self) -> None:
        """Nothing is noted before it is entered."""
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

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
        self.signum = signum
        self._restore()
        logger.warning("%s: stopping as soon as what was computed is saved.", signal.Signals(signum).name)

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        self._before = {}
