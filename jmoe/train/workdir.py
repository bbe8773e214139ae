"""The work folder of a run: which experiment it holds, and how far that came."""

import fcntl
import json
import os
import pathlib
import re
import shutil
import socket
import time
from collections.abc import Sequence
from typing import IO, Any

from jmoe.errors import StorageError, UserError
from jmoe.train.checkpoint import latest
from jmoe.train.config import TrainConfig
from jmoe.train.config_json import differences, from_json, to_json

CONFIG = "config.json"
MODEL = "model.json"  # in its place, in a folder that `jmoe convert` wrote
CHECKPOINTS = "checkpoints"
SUMMARY = "summary.json"
LOCK = "lock"  # is there from the first run on, and locked while one goes on
# What may change between the parts of a run without changing what it computes.
_FREE = ("checkpoint", "evaluate", "log_every", "mesh", "sharding", "watchdog")


def local(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path of a folder or file in a file system; raises UserError for an address such as gs://bucket/run."""
    text = os.fspath(path)
    if not text:
        raise UserError("--workdir wants the name of a folder, and got an empty one. Write . for the current folder.")
    if text.startswith("file:"):
        raise UserError(f"{text} is an address; give the folder itself: {re.sub('^file:/*', '/', text)}.")
    if scheme := re.match(r"([a-zA-Z][\w+.-]*):/+", text):
        raise UserError(
            f"{text} is not in a file system: jmoe reads and writes folders. Mount the bucket on every host, such as "
            f"by gcsfuse for gs://, and give the folder: /mnt/{text[scheme.end() :]}."
        )
    return pathlib.Path(path)


def prepare(workdir: str | os.PathLike[str], config: TrainConfig, claim: "Claim | None" = None) -> pathlib.Path:
    """Makes the folder of a new run, or checks that it holds this one, and records the config.

    A folder in which nothing was saved yet holds no run: it may be used with other options.

    Raises:
      UserError: the folder holds another experiment (the message says what differs), or cannot be written.
    """
    path = local(workdir).absolute()
    new = to_json(config)
    try:
        path.mkdir(parents=True, exist_ok=True)
        if claim is not None:
            claim.take(path)
        if (path / MODEL).exists():
            raise UserError(f"{path} holds a converted model, not a run. Choose another --workdir.")
        begun = (path / SUMMARY).exists() or latest(path / CHECKPOINTS) is not None
        if begun and (path / CONFIG).exists():
            _check_same(path, new)
        if not begun:
            _check_renames(path)
        temporary = path / (CONFIG + ".tmp")
        temporary.write_text(json.dumps(new, indent=2) + "\n")
        temporary.replace(path / CONFIG)
    except OSError as error:
        raise UserError(
            f"The work folder {workdir} cannot be written: {error.strerror or error}. Choose another --workdir."
        ) from error
    return path


class Claim:
    """Keeps two runs from writing into one folder: entered, and given a folder, it holds a lock on that.

    The lock goes with its process, however that ends. Storage that has no locks is not guarded.
    """

    def __init__(self, *, seconds: float = 15.0):
        """Takes how long to wait for a process that is ending."""
        self._seconds = seconds
        self._file: IO[str] | None = None

    def take(self, path: pathlib.Path) -> None:
        """Claims a folder.

        Raises:
          StorageError: another process has claimed it, or one did that has died with its machine, which storage may
            know only later.
        """
        file = self._file = open(path / LOCK, "a+", encoding="utf-8")  # noqa: SIM115, closed on leaving
        deadline = time.monotonic() + self._seconds
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    file.seek(0)
                    raise StorageError(
                        f"{path} is being written by {file.read().strip() or 'another process'}: wait for its end, "
                        "stop it, or choose another --workdir."
                    ) from error
                time.sleep(0.2)
            except OSError:  # no locks here
                break
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_: object) -> None:
        """Lets go of the folder."""
        if self._file is not None:
            self._file.close()


def _check_renames(path: pathlib.Path) -> None:
    """Raises UserError unless folders that hold something can be renamed, by which a checkpoint is made whole."""
    before, after = path / f"rename-{os.getpid()}.tmp", path / f"renamed-{os.getpid()}.tmp"
    try:
        before.mkdir()
        (before / "file").touch()
        try:
            before.rename(after)
        except OSError as error:
            raise UserError(
                f"No checkpoint could be completed in {path}, because its storage does not rename folders "
                f"({error.strerror or error}). A bucket that gcsfuse mounts needs a hierarchical namespace for that."
            ) from error
    finally:
        for folder in (before, after):
            shutil.rmtree(folder, ignore_errors=True)


def differences_from_run(workdir: str | os.PathLike[str], config: TrainConfig, named: Sequence[str]) -> list[str]:
    """What a run was trained with and config has otherwise, of all that decides an evaluation.

    Args:
      workdir: of the run.
      config: the experiment, as it is to be evaluated.
      named: dotted paths that were changed on purpose; they and what is below them are no difference.
    """
    try:
        run = _filled(json.loads((pathlib.Path(workdir) / CONFIG).read_text()))
    except (OSError, ValueError):
        return []
    wanted = to_json(config)
    compared = ("model", "ema_decay", "loss")
    found = differences({n: run.get(n) for n in compared}, {n: wanted[n] for n in compared})
    return [line for line in found if not any(line.startswith((f"{name}.", f"{name}:")) for name in named)]


def read_config(workdir: str | os.PathLike[str]) -> Any:
    """Returns what the folder of a run, or a converted one, has as its configuration.

    Raises:
      UserError: it has none, or one that cannot be read here.
    """
    file = local(workdir) / MODEL
    file = file if file.exists() else file.with_name(CONFIG)
    try:
        return from_json(json.loads(file.read_text()))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise UserError(f"{file} is not a configuration of this jmoe: {error}") from error


def _check_same(path: pathlib.Path, new: dict[str, Any]) -> None:
    """Raises UserError if the folder holds the run of another config."""
    try:
        old = _filled(json.loads((path / CONFIG).read_text()))
    except ValueError as error:
        raise UserError(f"{path / CONFIG} is damaged ({error}). Restore it, or choose another --workdir.") from error
    changed = differences(_bound(old), _bound(new))
    if changed:
        raise UserError(
            f"{path} holds another experiment: {'; '.join(changed[:5])}{' ...' if len(changed) > 5 else ''} "
            "(there -> here). Choose another --workdir, or go back to the options it was started with."
        )


def _filled(saved: Any) -> Any:
    """A saved config with the options that are newer than it at their defaults; as it is if it cannot be built here."""
    try:
        return to_json(from_json(saved))
    except UserError:
        return saved


def _bound(config: Any) -> Any:
    """The options that a run cannot change on the way."""
    return {name: value for name, value in config.items() if name not in _FREE} if isinstance(config, dict) else config
