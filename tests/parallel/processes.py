"""Real processes on this machine for tests: started together, watched, and all gone at the end whatever happens.

    with processes.start([processes.function("tests.parallel.test_x:body", "an argument")] * 2) as running:
        running.wait_for(0, "step 3")  # a line of its stdout or stderr
        running.kill(1)
        first, second = running.wait(60)

`function` calls a function of a module in each of them after jax.distributed.initialize, with gloo between their CPU
devices; `starter` calls one that does so itself. Any other command can be started as well; {coordinator}, {processes}
and {process} in it are filled in. `together` is the short form for functions that are all expected to succeed.
"""

import dataclasses
import importlib
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

ROOT = pathlib.Path(__file__).parents[2]
SIGKILL, SIGTERM = signal.SIGKILL, signal.SIGTERM
# What each thread of gloo prints on stdout piece by piece, so that two of them can run into each other.
_LAST = "Expected number of connected peer ranks is : "
_GREETINGS = re.compile(rf"(?:\[Gloo\] Rank |\d* is connected to |\d* peer ranks\. |{_LAST}\d*)+\n*")


def without_greetings(text: str) -> str:
    """What a process printed itself."""
    return _GREETINGS.sub(lambda match: "\n" * (match[0].count("\n") - match[0].count(_LAST)), text)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended: its status (negative: a signal ended it), what it printed, and seconds since the start."""

    status: int
    stdout: str
    stderr: str
    seconds: float


class Running:
    """The processes of one job, by their index."""

    def __init__(self, commands: Sequence[Sequence[str]], environment: Mapping[str, str], folder: pathlib.Path):
        self._folder = folder
        self._started = time.monotonic()
        self._popens = [self._start(i, command, environment) for i, command in enumerate(commands)]

    def _start(self, i, command, environment):
        # Files, not pipes: a pipe that nobody reads stops its writer.
        with open(self._folder / f"{i}.out", "wb") as out, open(self._folder / f"{i}.err", "wb") as err:
            return subprocess.Popen(command, stdout=out, stderr=err, env=environment, start_new_session=True)

    def output(self, i: int) -> str:
        """What a process has printed so far, stdout and then stderr."""
        return self._read(i, "out") + self._read(i, "err")

    def wait_for(self, i: int, text: str, timeout: float = 60) -> None:
        """Returns once a process has printed the text; fails if it ends or the seconds pass before."""
        deadline = time.monotonic() + timeout
        while text not in self.output(i):
            ended = self._popens[i].poll() is not None
            if (ended and text not in self.output(i)) or time.monotonic() > deadline:
                raise AssertionError(f"process {i} did not print {text!r}:\n{self.output(i)}")
            time.sleep(0.02)

    def kill(self, i: int, signum: int = SIGKILL) -> None:
        """Sends a signal to a process, and to none of its children."""
        self._popens[i].send_signal(signum)

    def wait(self, timeout: float = 60) -> list[Ended]:
        """Returns how each ended; fails, showing what they printed, if one is still there after so many seconds."""
        deadline = time.monotonic() + timeout
        seconds: dict[int, float] = {}
        while len(seconds) < len(self._popens):
            for i, popen in enumerate(self._popens):
                if i not in seconds and popen.poll() is not None:
                    seconds[i] = time.monotonic() - self._started
            if time.monotonic() > deadline:
                shown = "\n".join(
                    f"--- process {i} ({p.poll()}):\n{self.output(i)}" for i, p in enumerate(self._popens)
                )
                raise AssertionError(f"still running after {timeout} s: only {sorted(seconds)} ended\n{shown}")
            time.sleep(0.02)
        return [
            Ended(popen.returncode, self._read(i, "out"), self._read(i, "err"), seconds[i])
            for i, popen in enumerate(self._popens)
        ]

    def _read(self, i, kind):
        text = (self._folder / f"{i}.{kind}").read_text(errors="replace")
        return without_greetings(text)

    def end(self) -> None:
        """Kills what is left, with the children of each."""
        for popen in self._popens:
            try:
                os.killpg(popen.pid, SIGKILL)  # a process group of its own, as it has its own session
            except ProcessLookupError:
                continue
        for popen in self._popens:
            popen.wait()


def free_port() -> int:
    """A port of this machine that nobody uses, as the system gives it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def function(name: str, *arguments: str) -> list[str]:
    """The command that calls a function, "package.module:function", with text arguments in an initialized process."""
    return [
        sys.executable,
        "-m",
        "tests.parallel.processes",
        name,
        "{coordinator}",
        "{processes}",
        "{process}",
        *arguments,
    ]


def starter(name: str, *arguments: str) -> list[str]:
    """The command that calls a function with coordinator, number of processes, index and the text arguments."""
    return [*function(name, *arguments), "--uninitialized"]


@contextmanager
def start(
    commands: Sequence[Sequence[str]], *, devices: int = 1, environment: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """Starts one process for each command, each with so many CPU devices; all have ended when the block is left."""
    whole = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "OMPI_"))}
    whole |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices), "PYTHONPATH": str(ROOT)}
    # Their programs are small and run a few times: most of their time is the compiler's.
    whole |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    whole |= {"PYTHONUNBUFFERED": "1"} | dict(environment or {})
    coordinator = f"127.0.0.1:{free_port()}"
    filled = []
    for i, command in enumerate(commands):
        words = {"{coordinator}": coordinator, "{processes}": str(len(commands)), "{process}": str(i)}
        filled.append([words.get(argument, argument) for argument in command])
    folder = pathlib.Path(tempfile.mkdtemp(prefix="jmoe-processes-"))
    try:
        running = Running(filled, whole, folder)
        try:
            yield running
        finally:
            running.end()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def together(name: str, count: int, *arguments: str, devices: int = 1, timeout: float = 60) -> list[str]:
    """Calls a function in so many processes, fails unless all succeed, and returns what each wrote to stdout."""
    with start([function(name, *arguments)] * count, devices=devices) as running:
        ended = running.wait(timeout)
    for i, process in enumerate(ended):
        assert process.status == 0, f"process {i} ended with {process.status}:\n{process.stdout}{process.stderr}"
    return [process.stdout for process in ended]


if __name__ == "__main__":
    named, *rest = sys.argv[1:]
    if rest[-1] == "--uninitialized":
        del rest[-1]
    else:
        import jax

        coordinator, processes, process = rest[:3]
        jax.distributed.initialize(coordinator, int(processes), int(process), initialization_timeout=60)
        del rest[:3]
    module, _, called = named.partition(":")
    getattr(importlib.import_module(module), called)(*rest)
