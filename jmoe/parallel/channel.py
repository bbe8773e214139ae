"""Short messages between the processes of a run, beside the devices.

JAX has a service of its own for this, but its client ends the process with a stack of C++ when something is wrong, and
learns of a lost process only when its heartbeats have been missing for a while. Here every process keeps one connection
to process 0 for as long as the run lasts. It is how they meet, how they compare what they are about to do and agree on
what they have done, and how the others learn within moments that one of them failed or is gone: the system closes the
connections of a process however it ends, and drops those of a machine that no longer answers (KEEPALIVE_SECONDS).

Messages are JSON, one object a line. Process 0 serves; it is also a client of itself, so that all are alike:

    client: hello, then any of gather and end          server: started or refused, then gathered, failed, lost, ended
"""

import contextlib
import dataclasses
import json
import os
import secrets
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from jmoe.errors import LOST, LostProcessError, UserError

KEEPALIVE_SECONDS = 60  # after which a machine that does not answer is lost
GRACE_SECONDS = 5.0  # that a process has to end by itself after another has failed
_LINGER_SECONDS = 5.0  # for which a failed meeting is told to those who come late
_LONGEST = 1 << 24  # bytes of a message; more is not one of ours
_AGAIN = "Run the same command on all hosts to go on from the last checkpoint."


@dataclasses.dataclass(frozen=True)
class Member:
    """One process of a run: its index, the name of its machine, and its number there."""

    process: int
    host: str
    pid: int

    def __str__(self) -> str:
        """How sentences name it."""
        return f"process {self.process} on {self.host}"


@dataclasses.dataclass(frozen=True)
class Ending:
    """Why this process should end: the sentence and the exit status, and whether at once or in a moment."""

    sentence: str
    status: int
    at_once: bool


class _Line:
    """A connection that sends and receives JSON objects."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self.member: Member | None = None
        self.ended = False  # has said that it ends
        self.gone = False  # its connection has ended
        self._rest = b""
        self._lock = threading.Lock()
        _keep_alive(connection)

    def send(self, **message: Any) -> bool:
        """Sends a message; False if the other side is gone, which receiving will find, too."""
        try:
            with self._lock:
                self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return False
        return True

    def receive(self) -> list[dict[str, Any]] | None:
        """Waits for bytes and returns the messages that they complete; None when the connection has ended."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        if not data or len(self._rest) > _LONGEST:
            return None
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            return None  # somebody who speaks something else
        return messages if all(isinstance(message, dict) for message in messages) else None

    def close(self) -> None:
        self.gone = True
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()


def _keep_alive(connection: socket.socket) -> None:
    """Has the system ask a silent machine whether it is still there, without a thread of ours."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    tries = 6
    pause = KEEPALIVE_SECONDS // tries
    options = {"TCP_KEEPIDLE": pause, "TCP_KEEPINTVL": pause, "TCP_KEEPCNT": tries - 1}
    options["TCP_USER_TIMEOUT"] = 1000 * KEEPALIVE_SECONDS  # the same for bytes that are never acknowledged
    for name, value in options.items():
        if hasattr(socket, name):  # those of Linux
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Server(threading.Thread):
    """What process 0 runs beside its training: sees who comes and goes, and passes messages on.

    Args:
      listener: where the others connect.
      count: of processes.
      timeout: seconds within which all must have come.
      announce: what all are told once they have.
    """

    def __init__(self, listener: socket.socket, count: int, timeout: float | int, announce: str = ""):
        """Begins to serve when started."""
        super().__init__(name="jmoe-server", daemon=True)
        self._listener = listener
        self._count = count
        self._timeout = timeout
        self._announce = announce
        self._members: dict[int, _Line] = {}
        self._phase = "meeting"  # then "running", or "refused" if the meeting failed
        self._refusal: dict[str, Any] = {}
        self._over = False  # whether all have been told to end
        self._gathers: dict[str, tuple[float, dict[int, str]]] = {}  # by name: deadline, values
        self._missed: set[str] = set()  # names about which some gave nothing in time, as all have been told
        self._done: set[int] = set()  # who has ended as it should, and gives nothing any more
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def run(self) -> None:
        """Serves until process 0 has ended and the others are gone; whoever joins this thread waits for that."""
        self._deadline = time.monotonic() + self._timeout
        while not (self._phase == "running" and self._all_gone()):
            deadlines = [deadline for deadline, _ in self._gathers.values()]
            deadlines += [] if self._phase == "running" else [self._deadline]
            wait = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
            for key, _ in self._selector.select(wait):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._read(key.data)
            now = time.monotonic()
            if self._phase != "running" and now >= self._deadline:
                if self._phase == "refused":
                    break
                self._refuse(self._who_is_missing(), LOST)
            for name in [name for name, (deadline, _) in self._gathers.items() if now >= deadline]:
                _, values = self._gathers.pop(name)
                self._missed.add(name)
                self._tell_all(kind="gathered", name=name, missing=[i for i in range(self._count) if i not in values])
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, _Line):
                key.data.close()
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            connection.settimeout(KEEPALIVE_SECONDS)  # so that one that does not read cannot stop the others
            self._selector.register(connection, selectors.EVENT_READ, _Line(connection))

    def _read(self, line: _Line) -> None:
        messages = line.receive()
        if messages is None:
            self._drop(line)
            return
        try:
            for message in messages:
                self._handle(line, message)
        except (KeyError, TypeError, ValueError):  # not one of ours
            self._drop(line)

    def _handle(self, line: _Line, message: dict[str, Any]) -> None:
        kind, member = message["kind"], line.member
        if kind == "hello" and member is None:
            self._greet(line, message)
        elif member is None:
            raise ValueError(kind)
        elif kind == "gather" and message["name"] in self._missed:
            pass  # it is late, and has the answer already
        elif kind == "gather":
            _, values = self._gathers.setdefault(message["name"], (time.monotonic() + message["timeout"], {}))
            values[member.process] = message["value"]
            if len(values) == self._count:
                del self._gathers[message["name"]]
                ordered = [values[i] for i in range(self._count)]
                self._tell_all(kind="gathered", name=message["name"], values=ordered)
            self._answer_without_those_who_are_done()
        elif kind == "end":
            line.ended = True
            sentence, status = f"{member} ended: {message['sentence']}", message["status"]
            if status:
                self._over = True
                self._tell_all(kind="failed", process=member.process, sentence=sentence, status=status)
                return
            self._done.add(member.process)
            self._answer_without_those_who_are_done()
            if member.process == 0:
                self._tell_all(kind="ended")
            else:
                line.send(kind="ended")

    def _answer_without_those_who_are_done(self) -> None:
        """Has nobody wait for what will never come."""
        for name, (_, values) in list(self._gathers.items()):
            missing = sorted(self._done - values.keys())
            if missing and not self._over:  # else all are ending, for another reason
                del self._gathers[name]
                self._missed.add(name)
                self._tell_all(kind="gathered", name=name, missing=missing, ended=True)

    def _greet(self, line: _Line, hello: dict[str, Any]) -> None:
        line.member = member = Member(hello["process"], hello["host"], hello["pid"])
        if self._phase == "refused":
            line.send(**self._refusal)
            return
        if hello["count"] != self._count:
            sentence = (
                f"{member} was told of {hello['count']} processes, and process 0 of {self._count}. "
                "All need the same --processes."
            )
            self._refuse(sentence[0].upper() + sentence[1:], UserError.exit_code, line)
        elif member.process in self._members:
            first = self._members[member.process].member
            assert first is not None
            sentence = (
                f"Two processes are number {member.process} of {self._count}: one on {first.host} (pid {first.pid}) "
                f"and one on {member.host} (pid {member.pid}). Each needs a --process of its own, from 0 to "
                f"{self._count - 1}."
            )
            self._refuse(sentence, UserError.exit_code, line)
        else:
            self._members[member.process] = line
            if len(self._members) == self._count:
                self._phase = "running"
                members = [dataclasses.astuple(self._members[i].member) for i in range(self._count)]  # pyright: ignore
                self._tell_all(kind="started", members=members, announce=self._announce)

    def _refuse(self, sentence: str, status: int, late: _Line | None = None) -> None:
        """Ends the meeting for all who are there or come in the next moments; if all came, only for the late one."""
        refusal = {"kind": "refused", "sentence": sentence, "status": status}
        if late is not None:
            late.send(**refusal)
        if self._phase == "meeting":
            self._phase, self._refusal = "refused", refusal
            self._deadline = time.monotonic() + _LINGER_SECONDS
            self._tell_all(**refusal)

    def _who_is_missing(self) -> str:
        missing = [i for i in range(self._count) if i not in self._members]
        came = ", ".join(f"{i} on {line.member.host}" for i, line in sorted(self._members.items()) if line.member)
        return (
            f"{_numbers(missing)} of {self._count} did not come within {self._timeout:g} s; there are {came}. See "
            "whether the same command runs on every host, with the same coordinator, and what it says there."
        )

    def _drop(self, line: _Line) -> None:
        self._selector.unregister(line.socket)
        line.close()
        member = line.member
        if member is None or self._members.get(member.process) is not line or line.ended:
            return
        if self._phase == "meeting":
            del self._members[member.process]  # it may be started again while the others are waited for
        elif self._phase == "running":
            line.ended = True
            if self._over:
                return  # all have been told why they end
            self._over = True
            self._tell_all(
                kind="lost",
                sentence=f"Lost {member}: its connection ended without a word, so it was killed, it crashed, or its "
                f"machine is gone. {_AGAIN}",
            )

    def _all_gone(self) -> bool:
        return all(line.gone or (i == 0 and line.ended) for i, line in self._members.items())

    def _tell_all(self, **message: Any) -> None:
        # Process 0 is the last to hear anything: it may end with it, and this thread runs in it.
        for _, line in sorted(self._members.items(), reverse=True):
            if not line.gone:
                line.send(**message)


class Channel:
    """The connection of this process to all others of the run.

    Attributes:
      members: the processes, by index.
      announce: what process 0 told all at the start.
    """

    def __init__(self, address: tuple[str, int], count: int, process: int, *, timeout: float | int, shown: str = ""):
        """Meets the others: returns when all are there.

        Args:
          address: of process 0, host and port.
          count: of processes.
          process: the index of this one.
          timeout: seconds within which process 0 must answer and all must come.
          shown: how the user wrote the address.

        Raises:
          LostProcessError: process 0 cannot be reached, or others did not come in time.
          UserError: the processes do not fit together.
        """
        self.members: list[Member] = []
        self.announce = ""
        self._count = count
        self._process = process
        self._asked: Counter[str] = Counter()  # how often for each name
        self._gathered: dict[str, dict[str, Any]] = {}  # answers that nobody has fetched yet
        self._changed = threading.Condition()
        self._closed = False
        self._over = False  # whether this process, or process 0, is done, and so is all that all do together
        self._answered = threading.Event()
        self._on_ending: Callable[[Ending], None] | None = None
        shown = shown or f"{address[0]}:{address[1]}"
        self._line = _connect(address, timeout, f"process {process}", shown)
        self._line.send(kind="hello", count=count, process=process, host=socket.gethostname(), pid=os.getpid())
        try:
            messages = self._meet(timeout, shown)
        except UserError:
            self._line.close()
            raise
        self._reader = threading.Thread(target=self._read, args=(messages,), name="jmoe-channel", daemon=True)

    def watch(self, on_ending: Callable[[Ending], None]) -> None:
        """Begins to listen; on_ending is called, in a thread of the channel, when this process has to end."""
        self._on_ending = on_ending
        self._reader.start()

    def gather(self, name: str, value: str, timeout: float | int, about: str = "") -> list[str]:
        """Returns the value of every process, by index; waits for the last of them.

        All must ask for the same name. It may be used again: what each process asks for the second time belongs
        together, and so on. May be called from any thread, for one name from one at a time.

        Args:
          name: what belongs together.
          value: of this process.
          timeout: seconds.
          about: what a sentence calls it, if not by the name.

        Raises:
          LostProcessError: some did not ask within `timeout` seconds after the first, or ended without asking; in all
            processes, also in those that come later.
        """
        with self._changed:
            self._asked[name] += 1
            numbered = f"{name} {self._asked[name]}"
        self._line.send(kind="gather", name=numbered, value=value, timeout=timeout)
        with self._changed:
            # The server's clock decides; ours only guards against a server that hangs.
            self._changed.wait_for(lambda: numbered in self._gathered or self._over, timeout + KEEPALIVE_SECONDS)
            nothing = {"missing": [self._process if self._closed else 0], "ended": self._over}
            answer: dict[str, Any] = self._gathered.pop(numbered, nothing)
        values: list[str] | None = answer.get("values")
        if values is not None:
            return values
        which = _list([str(self.members[i]) for i in answer["missing"]])
        why = ", as it ended before" if answer.get("ended") else f" within {timeout:g} s"
        raise LostProcessError(f"No word about {about or repr(name)} from {which}{why}. {_AGAIN}")

    def fail(self, sentence: str, status: int) -> None:
        """Tells the others that this process ends, and why; they end, too."""
        self._say_end(sentence, status)

    def close(self) -> None:
        """Tells the others that this process is done; what becomes of them no longer matters to it."""
        self._say_end("", 0)

    def _say_end(self, sentence: str, status: int) -> None:
        if self._closed:
            return
        self._closed = True
        if self._line.send(kind="end", status=status, sentence=sentence) and self._reader.is_alive():
            self._answered.wait(GRACE_SECONDS)

    def _meet(self, timeout: float | int, shown: str) -> list[dict[str, Any]]:
        """Waits until process 0 says that all are there, and returns what it has said since."""
        self._line.socket.settimeout(timeout + 2 * _LINGER_SECONDS)  # process 0 keeps the time
        messages = self._line.receive()
        while messages == []:
            messages = self._line.receive()
        if messages is None:
            raise LostProcessError(
                f"Process {self._process} reached {shown}, but what answers there is not process 0 of this run, or it "
                "ended. See what process 0 says, and whether its port is that of another program."
            )
        first, *rest = messages
        if first["kind"] == "refused":
            raise (LostProcessError if first["status"] == LOST else UserError)(first["sentence"])
        self.members = [Member(*member) for member in first["members"]]
        self.announce = first["announce"]
        self._line.socket.settimeout(None)
        return rest

    def _read(self, messages: list[dict[str, Any]] | None) -> None:
        while messages is not None:
            for message in messages:
                kind = message["kind"]
                if kind == "gathered":
                    with self._changed:
                        self._gathered[message["name"]] = message
                        self._changed.notify_all()
                elif kind == "failed" and message["process"] == self._process:
                    self._answered.set()
                elif kind == "failed":
                    sentence = message["sentence"][0].upper() + message["sentence"][1:]
                    self._end(Ending(sentence, message["status"], at_once=False))
                elif kind == "lost":
                    self._end(Ending(message["sentence"], LOST, at_once=True))
                elif kind == "ended":
                    self._answered.set()
                    with self._changed:
                        self._over = True
                        self._changed.notify_all()
                    return
            messages = self._line.receive()
        self._end(
            Ending(
                f"Lost {self.members[0]}, which the others meet at: it was killed, it crashed, or its machine is gone. "
                f"{_AGAIN}",
                LOST,
                at_once=True,
            )
        )

    def _end(self, ending: Ending) -> None:
        if not self._closed and self._on_ending is not None:
            self._on_ending(ending)

    @property
    def closed(self) -> bool:
        """Whether this process has told the others that it ends."""
        return self._closed


def listen(host: str, port: int, *, backlog: int = 1024) -> socket.socket:
    """A listening socket at the port of this machine; host "" is all its addresses, and port 0 any that is free."""
    if host:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=backlog)
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):  # a container may have no IPv6 although the system has
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=backlog)


def _connect(address: tuple[str, int], timeout: float | int, who: str, shown: str) -> _Line:
    """Tries to reach process 0 until the time is over: it may start later, and its name be known later."""
    deadline = time.monotonic() + timeout
    pause = 0.05
    while True:
        try:
            left = max(0.1, deadline - time.monotonic())
            return _Line(socket.create_connection(address, timeout=min(left, 30.0)))
        except OSError as error:
            if time.monotonic() + pause >= deadline:
                why = error.strerror or str(error)
                advice = "See whether process 0 runs there and whether a firewall lets the port through."
                if isinstance(error, socket.gaierror):
                    advice = "See whether the name is spelled right, and known on this host."
                elif who == "process 0":
                    advice = f"Process 0 itself runs on {socket.gethostname()}: give an address of this machine."
                raise LostProcessError(
                    f"The coordinator {shown} could not be reached from {who} on {socket.gethostname()} within "
                    f"{timeout:g} s ({why}). {advice}"
                ) from error
        time.sleep(pause * (0.5 + secrets.randbelow(1000) / 1000))  # not all of a thousand hosts at the same moment
        pause = min(2 * pause, 5.0)


def _numbers(values: Sequence[int]) -> str:
    """Such as 'Process 3' or 'Processes 1, 2 and 7'."""
    return f"Process{'es' if len(values) > 1 else ''} {_list([str(value) for value in values])}"


def _list(texts: Sequence[str], most: int = 8) -> str:
    """Such as 'a', 'a and b' or 'a, b and 7 more'."""
    if len(texts) > most:
        texts = [*texts[:most], f"{len(texts) - most} more"]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
