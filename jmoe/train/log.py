"""What a run tells the world: metrics in JSON lines and for TensorBoard, and progress on the terminal."""

import collections
import contextlib
import datetime
import io
import json
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any, SupportsFloat

import numpy as np

from jmoe.errors import UserError

log = logging.getLogger(__name__)


class MetricWriter:
    """Writes metrics to metrics.jsonl and, for TensorBoard, to events files in the folder tensorboard.

    Each line of metrics.jsonl is one JSON object: {"step": 100, "time": seconds since 1970, "loss": 0.25, ...}; arrays
    are lists, and floats that are not finite, which JSON lacks, are the strings "NaN", "Infinity" and "-Infinity".
    """

    def __init__(self, workdir: str | os.PathLike, *, resume_step: int | None = None):
        """Opens the files of a run.

        Args:
          workdir: folder of the run; made if need be.
          resume_step: the step from which an interrupted run goes on. What was written for later steps is removed, as
            the run will write it again. None starts afresh, without any earlier line.

        Raises:
          UserError: the folder cannot be written.
        """
        self._path = pathlib.Path(workdir) / "metrics.jsonl"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            kept = [] if resume_step is None else _lines_until(self._path, resume_step)
            # Replaced in one go, so that a run killed right here has the old lines or the new ones.
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text("".join(kept), encoding="utf-8")
            temporary.replace(self._path)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115, closed by close()
        except OSError as error:
            raise self._failure(error) from error
        self._tensorboard = _open_tensorboard(pathlib.Path(workdir) / "tensorboard", resume_step)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes the metrics of a step, each a number or an array of numbers, and flushes.

        Raises:
          UserError: the disk is full, or the like. Failures of TensorBoard are only logged, once.
        """
        if reserved := metrics.keys() & {"step", "time"}:
            raise ValueError(f"A metric cannot be called {sorted(reserved)[0]!r}; every line has a field of that name.")
        now = time.time()
        values = {name: np.asarray(value) for name, value in metrics.items()}
        record = {"step": int(step), "time": now} | {name: _jsonable(value.tolist()) for name, value in values.items()}
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise self._failure(error) from error
        self._write_tensorboard(int(step), now, values)

    def sync(self) -> None:
        """Returns when all lines are on the disk, where they outlive the machine, as a checkpoint does.

        Raises:
          UserError: the disk is full, or the like.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Closes the files."""
        with contextlib.suppress(OSError):  # every line is flushed by write, which has raised if one could not be
            self._file.close()
        self._close_tensorboard()

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.close()

    def _write_tensorboard(self, step: int, now: float, values: dict[str, np.ndarray]) -> None:
        if self._tensorboard is None:
            return
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        scalars = {}
        for name, value in values.items():
            scalars |= {f"{name}/{i}": v for i, v in enumerate(value.flat)} if value.ndim else {name: value}
        try:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=float(v)) for tag, v in scalars.items()])
            self._tensorboard.write(Event(step=step, wall_time=now, summary=summary).SerializeToString())
            self._tensorboard.flush()
        except Exception as error:
            log.warning("TensorBoard gets no more metrics, metrics.jsonl does: %s", error)
            self._close_tensorboard()

    def _close_tensorboard(self) -> None:
        if self._tensorboard is not None:
            with contextlib.suppress(OSError):
                self._tensorboard.close()
            self._tensorboard = None

    def _failure(self, error: OSError) -> UserError:
        return UserError(
            f"Metrics cannot be written to {self._path}: {error.strerror}. Free some space or choose another folder."
        )


class Progress:
    """Shows how far a run is: a bar on a terminal, and elsewhere a plain line for each step that comes with a loss.

    Use it as a context manager, which gives the terminal back also when training ends with an exception.
    """

    def __init__(self, total_steps: int, batch_size: int, *, start_step: int = 0, file: io.TextIOBase | None = None):
        """Prepares a display for steps start_step + 1 to total_steps of batch_size images, on file or else stdout."""
        import rich.console
        import rich.progress

        self._total_steps, self._batch_size = total_steps, batch_size
        # Times of the latest steps. The first one is the end of the first step, so that compilation is not counted.
        self._recent: collections.deque[tuple[float, int]] = collections.deque(maxlen=200)
        self._first: tuple[float, int] | None = None
        self._loss = math.nan
        stream: Any = file or sys.stdout
        self._console = rich.console.Console(file=stream, highlight=False, markup=False, soft_wrap=True)
        self._bar = None
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("step {task.completed}/{task.total}", markup=False),
                rich.progress.BarColumn(),
                rich.progress.TextColumn("{task.fields[state]}", markup=False),
                console=self._console,
            )
            self._task = self._bar.add_task("", total=total_steps, completed=start_step, state="compiling")

    def update(self, step: int, loss: SupportsFloat | None = None) -> None:
        """Says that a step is done, and its loss where that is known; cheap enough for every step."""
        now = time.monotonic()
        self._recent.append((now, step))
        if self._first is None:
            self._first = (now, step)
        if loss is not None:
            self._loss = float(loss)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, state=self._state())
        elif loss is not None:
            self.print(f"step {step}/{self._total_steps}  {self._state()}")

    def print(self, message: str) -> None:
        """Prints a line, above the bar if there is one."""
        self._console.print(message)

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _state(self) -> str:
        """Loss, images/s of the latest steps, and the time left if all goes on as since the first one."""
        assert self._first is not None
        now, step = self._recent[-1]

        def seconds_per_step(since: tuple[float, int]) -> float:
            return (now - since[0]) / (step - since[1]) if step > since[1] else 0.0

        speed, left = "? images/s", "?"
        if seconds := seconds_per_step(self._recent[0]):
            speed = f"{self._batch_size / seconds:,.0f} images/s"
        if seconds := seconds_per_step(self._first):  # since the first, so that evaluations and saves have their share
            left = str(datetime.timedelta(seconds=round(seconds * max(self._total_steps - step, 0))))
        return f"loss {self._loss:.4f}  {speed}  {left} left"


def _lines_until(path: pathlib.Path, last_step: int) -> list[str]:
    """The lines of steps up to the last one; a line that a killed run did not finish is not among them."""
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else ():
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= last_step:
                lines.append(line)
        except (ValueError, LookupError, TypeError):
            log.warning("A line of %s is dropped, which is not one of ours: %.60s", path, line)
    return lines


def _jsonable(value: Any) -> Any:
    """Replaces floats that JSON does not have by their names."""
    if isinstance(value, list):
        return [_jsonable(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _open_tensorboard(directory: pathlib.Path, resume_step: int | None):
    """A writer of events, or None if TensorBoard's files cannot be written."""
    try:
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        # Not tensorboardX's SummaryWriter, whose thread dies on a full disk, and then the next metric waits for ever.
        from tensorboardX.record_writer import RecordWriter

        directory.mkdir(parents=True, exist_ok=True)
        writer = RecordWriter(str(directory / f"events.out.tfevents.{time.time_ns()}"))
        writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        if resume_step is not None:  # hides what an interrupted run wrote for later steps
            restart = Event(
                step=resume_step + 1, wall_time=time.time(), session_log=SessionLog(status=SessionLog.START)
            )
            writer.write(restart.SerializeToString())
        writer.flush()
    except Exception as error:
        log.warning("There will be no TensorBoard files, only metrics.jsonl: %s", error)
        return None
    return writer
