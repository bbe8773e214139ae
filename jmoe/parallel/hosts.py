"""The processes of a run: who they are, what they tell each other, and what happens when one ends.

    with start(...) as hosts:                  # jmoe.parallel.startup
        hosts.compare({"config": text, ...})   # raises on every host if one differs
        hosts.gather("damaged", "3")           # on every host: ["0", "3"]
        ...                                    # where current() gives the same hosts

One process has nobody to wait for, and hears only itself.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import faulthandler
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import pathlib
import platform
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import jax
import numpy as np

from jmoe._version import __version__
from jmoe.errors import STUCK, InterruptedRunError, UserError
from jmoe.parallel.channel import GRACE_SECONDS, Channel, Ending, Server, listen

logger = logging.getLogger("jmoe")

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "libtpu")
_WAIT_FOR_NEWS = 5.0  # seconds that a failed step waits to be told which process is lost
_SHOWN = 60  # characters of a value in a sentence
_OF_STREAMS = (OSError, ValueError, RuntimeError, AttributeError)  # of one that is closed, is no file, or is None


@dataclasses.dataclass(frozen=True)
class Host:
    """One process of a run as the table shows it, with the devices that are its own."""

    process: int
    name: str
    devices: str
    platform: str
    jax: str
    jmoe: str


class Hosts:
    """The processes of this run.

    Entered, it looks after their end: what ends one ends all, within moments, with the same sentence and status.

    Attributes:
      count: of processes.
      process: the index of this one.
      timeout: seconds that one waits for the others before something that all do together.
    """

    def __init__(
        self,
        channel: Channel | None = None,
        process: int = 0,
        *,
        server: threading.Thread | None = None,
        timeout: float | int = 1800,
    ):
        """One process, if there is no channel to others; `server` is what process 0 runs for the channels of all."""
        self.count = len(channel.members) if channel else 1
        self.process = process
        self.timeout = timeout
        self._channel = channel
        self._server = server
        self._ending: Ending | None = None
        if channel:
            channel.watch(self._end)

    def gather(self, name: str, value: str, *, timeout: float | int | None = None, about: str = "") -> list[str]:
        """Returns what every process gave under this name, by process; waits for the last, without using devices.

        Short texts: all of them go to all. A name may be used again, in every process as often. May be called from any
        thread; as nothing orders threads among processes, each needs names of its own.

        Args:
          name: the same in all processes.
          value: what this one gives.
          timeout: seconds; by default, those of the start.
          about: what a sentence calls it, if not by its name.

        Raises:
          LostProcessError: some gave nothing within the timeout after the first did; the same in all processes.
        """
        if self._channel is None:
            return [value]
        return self._channel.gather(name, value, self.timeout if timeout is None else timeout, about)

    def compare(self, parts: Mapping[str, str]) -> None:
        """Checks that these texts are the same in all processes; all must call it as often.

        Args:
          parts: by what they are, such as "config" or "the first batch"; of any length, as digests are exchanged.

        Raises:
          UserError: some differ; on every host, naming the part, the processes and the values.
        """
        if self.count == 1:
            return
        digests = {part: hashlib.sha256(value.encode()).hexdigest()[:16] for part, value in parts.items()}
        theirs = [json.loads(text) for text in self.gather("digests", json.dumps(digests))]
        for part in sorted(set().union(*theirs)):
            different = _minority([digests.get(part) for digests in theirs])
            if not different:
                continue
            common = next(i for i in range(self.count) if i not in different)
            speaks = self.process in (common, different[0])  # two are enough; a config is long and hosts are many
            texts = self.gather(f"differing {part}", json.dumps(parts.get(part)) if speaks else "")
            option, a, b = _difference(_read(texts[common]), _read(texts[different[0]]))
            where = f"{part}, {option}" if option else part
            raise UserError(
                f"The hosts differ in {where}: it is {b} in {self._named(different)}, and {a} in "
                f"{self._named([i for i in range(self.count) if i not in different])}. Make them the same on all hosts."
            )

    def table(self) -> list[Host]:
        """Returns who takes part, by process; all must call it."""
        local = jax.local_devices()
        kinds = Counter(device.device_kind for device in local)
        mine = Host(
            process=self.process,
            name=socket.gethostname(),
            devices=", ".join(f"{number} x {kind}" for kind, number in kinds.items()),
            platform=local[0].platform,
            jax=jax.__version__,
            jmoe=__version__,
        )
        texts = self.gather("hosts", json.dumps(dataclasses.astuple(mine)))
        return [Host(*json.loads(text)) for text in texts]

    def fail(self, sentence: str, status: int) -> None:
        """Tells the others that this process is about to end, and why; they end with the same status."""
        if self._channel:
            self._channel.fail(sentence, status)

    def let_others_end(self, seconds: float | int = 0.0) -> None:
        """Process 0 stays a moment longer: JAX's service is in it, and aborts the others when it goes."""
        if self._server:
            self._server.join(seconds + 2.0)

    def __enter__(self) -> "Hosts":
        """Nothing is to be done before."""
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        """Ends together with the others, or tells them why this process ends alone."""
        status = self._leave(error)
        if status is not None:
            # The traceback and the sentence are still to be printed. What must not happen after them is JAX's own
            # farewell: it would wait for the others for minutes and then end the process with a status of its own.
            atexit.register(self._exit, status)

    def end_with_program(self) -> None:
        """What is done on leaving them, for a program that has not entered them: called when it has come to its end."""
        status = self._leave(getattr(sys, "last_value", None))  # the error that ends it, which has been printed
        if status is not None:
            self._exit(status)

    def _leave(self, error: BaseException | None) -> int | None:
        """Tells the others that this process ends; returns the status it must end with after an error."""
        if self._channel is None:
            return None
        # An InterruptedRunError is raised by all after the same step, and sys.exit() is an end like any other.
        if error is None or isinstance(error, InterruptedRunError) or _status(error) == 0:
            self._channel.close()
            with contextlib.suppress(RuntimeError):  # another may be gone by now; nothing depends on it any more
                jax.distributed.shutdown()
            return None
        if not isinstance(error, UserError) and isinstance(error, Exception):
            # Most likely another process is gone and took a collective with it, which comes as a ValueError or a
            # JaxRuntimeError. Who it was, the channel says within moments, and ends this process with it; if it has
            # nothing to say, the error is our own.
            time.sleep(_WAIT_FOR_NEWS)
        status = _status(error)
        sentence = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        self._channel.fail(sentence, status)
        return status

    def _end(self, ending: Ending) -> None:
        """Ends this process from a thread: its main one may be waiting for a device, and that for a lost process."""
        if self._ending is not None:
            return  # what came first is the reason: that process 0 is then gone, too, follows from it
        self._ending = ending
        if ending.at_once:
            self._end_now(ending)
        else:
            timer = threading.Timer(GRACE_SECONDS, self._end_now, (ending,))
            timer.daemon = True
            timer.start()

    def _end_now(self, ending: Ending) -> None:
        if self._channel is None or self._channel.closed:
            return  # this process has found the same mistake itself, and is ending
        if ending.status == STUCK:
            print_stacks()
        self.let_others_end()
        end_process(ending.sentence, ending.status)

    def _exit(self, status: int) -> None:
        """Ends this process after everything has been printed."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(*_OF_STREAMS):
                stream.flush()
        self.let_others_end(GRACE_SECONDS)
        os._exit(status)

    def _named(self, processes: Sequence[int]) -> str:
        assert self._channel is not None
        members = [self._channel.members[i] for i in processes]
        text = ", ".join(f"process {member.process} ({member.host})" for member in members[:4])
        return text + (f" and {len(members) - 4} more" if len(members) > 4 else "")


_current: Hosts | None = None


def current() -> Hosts:
    """The processes of this run: what `start` has made, or one process if it was never called.

    A program that has called jax.distributed.initialize itself gets the same here; all its processes must ask, as they
    meet over the devices. From then on, what ends one of them ends all.
    """
    global _current
    if _current is None:
        _current = connect_over_devices() if jax.process_count() > 1 else Hosts()
        atexit.register(_current.end_with_program)
    return _current


def set_current(hosts: Hosts) -> Hosts:
    """Makes them the processes of this run, and returns them."""
    global _current
    _current = hosts
    return hosts


def connect_over_devices(*, timeout: float | int = 1800) -> Hosts:
    """Connects the processes of a run that JAX has started; the address of process 0 travels over the devices."""
    from jax.experimental import multihost_utils

    count, process = jax.process_count(), jax.process_index()
    address = np.zeros(256, np.uint8)
    server = None
    if process == 0:
        listener = listen("", 0)
        server = Server(listener, count, timeout)
        server.start()
        text = f"{_own_address()} {listener.getsockname()[1]}".encode()
        address[: len(text)] = np.frombuffer(text, np.uint8)
    address = np.asarray(multihost_utils.broadcast_one_to_all(address))
    host, port = bytes(address).rstrip(b"\0").decode().split()
    delay_abort()
    channel = Channel((host, int(port)), count, process, timeout=timeout)
    return Hosts(channel, process, server=server, timeout=timeout)


def delay_abort() -> None:
    """Gives the channel time for its sentence before JAX aborts the process.

    When process 0 is gone, JAX's client logs a stack and aborts in the same instant in which our thread learns who is
    lost. With libc's sleep() as the handler of SIGABRT (its argument is the number of the signal, 6), that thread of
    C++ waits for six seconds first, and nothing of Python runs in a signal handler.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal.restype = ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), ctypes.cast(libc.sleep, ctypes.c_void_p))


def format_table(hosts: Sequence[Host]) -> str:
    """The processes of a run as plain lines."""
    rows = [("process", "host", "devices", "platform", "jax", "jmoe")]
    rows += [(str(h.process), h.name, h.devices, h.platform, h.jax, h.jmoe) for h in hosts]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def code_version() -> str:
    """A digest of the source files of jmoe and kernels_pallas as they are installed here."""
    digest = hashlib.sha256()
    for package in ("jmoe", "kernels_pallas"):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations
        root = pathlib.Path(next(iter(spec.submodule_search_locations)))
        for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
            digest.update(f"{package}/{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes() + b"\0")
    return f"jmoe {__version__}, sources {digest.hexdigest()[:16]}"


def package_versions() -> str:
    """The versions of Python and of the packages that decide what a run computes, in one line."""
    found = [f"python {platform.python_version()}"]
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


def print_stacks() -> None:
    """Prints where each thread stands, to the stream that the process began with; what ends it then goes on anyhow."""
    with contextlib.suppress(*_OF_STREAMS):
        sys.__stderr__.flush()  # pyright: ignore[reportOptionalMemberAccess]
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)  # pyright: ignore[reportArgumentType]


def end_all(sentence: str, status: int) -> None:
    """Ends this process from any thread, and with it all others of the run."""
    if _current is not None:  # one is not made now: it would need the devices
        _current.fail(sentence, status)
        _current.let_others_end()
    end_process(sentence, status)


def end_process(sentence: str, status: int) -> None:
    """Ends this process from any thread, whatever the others are doing; nothing is cleaned up."""
    with contextlib.suppress(*_OF_STREAMS):
        sys.stdout.flush()
        print(f"jmoe: {sentence}", file=sys.stderr, flush=True)
    os._exit(status)


def _status(error: BaseException) -> int:
    """What the command line ends with after this error (jmoe/errors.py)."""
    if isinstance(error, UserError):
        return error.exit_code
    if isinstance(error, SystemExit):
        return 0 if error.code is None else error.code if isinstance(error.code, int) else 1
    others = {KeyboardInterrupt: 130, BrokenPipeError: 141, ModuleNotFoundError: UserError.exit_code}
    return next((status for kind, status in others.items() if isinstance(error, kind)), 1)


def _own_address() -> str:
    """The address of this machine as others see it; no packet is sent to find it."""
    for family, remote in ((socket.AF_INET, "192.0.2.1"), (socket.AF_INET6, "2001:db8::1")):  # for documentation
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((remote, 9))
            return probe.getsockname()[0]
    return socket.gethostname()


def _minority(values: Sequence[str | None]) -> list[int]:
    """The indices whose value is not the most common one, or that of the first of the most common."""
    common, _ = Counter(values).most_common(1)[0]
    return [i for i, value in enumerate(values) if value != common]


def _read(text: str) -> str:
    value = json.loads(text)
    return "(nothing)" if value is None else value


def _difference(a: str, b: str) -> tuple[str, str, str]:
    """The first option in which two configurations differ, and its values; other texts from where they differ."""
    with contextlib.suppress(ValueError):
        ours, theirs = (dict(_options(json.loads(text))) for text in (a, b))
        for option in [*ours, *theirs] if "" not in ours else []:
            if ours.get(option) != theirs.get(option):
                return option, *_shortened(ours.get(option, "(nothing)"), theirs.get(option, "(nothing)"))
    return "", *_shortened(a, b)


def _options(config: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every option of a configuration in JSON by its path, as text."""
    if not isinstance(config, dict | list) or not config:
        yield path, json.dumps(config)
        return
    for name, value in config.items() if isinstance(config, dict) else enumerate(config):
        yield from _options(value, f"{path}.{name}" if path else str(name))


def _shortened(a: str, b: str) -> tuple[str, str]:
    """Both texts from shortly before where they begin to differ."""
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = 0 if max(len(a), len(b)) <= _SHOWN else max(0, start - _SHOWN // 3)

    def shown(text: str) -> str:
        part = text[start : start + _SHOWN]
        return repr(f"{'...' if start else ''}{part}{'...' if start + _SHOWN < len(text) else ''}")

    return shown(a), shown(b)
