"""Checkpoints: Orbax writes the arrays, and jmoe sees to it that what is read is what was written.

Orbax notices neither a flipped bit nor another dtype, and takes a directory for a checkpoint that is not one yet. So
each checkpoint has a manifest with the checksum of every file and the name, shape and dtype of every array, and is
published by renaming its directory once all of that is on disk:

    directory/
      300.tmp/              being written, or left behind by a save that was interrupted; never read
      200/                  complete
        jmoe_manifest.json  {"sha256": of the rest, "manifest": {format, step, metadata, leaves, files}}
        state/              written by Orbax (`array_files.py`), one array per leaf under its path name
      100.old.tmp/          complete, but being replaced by a new 100; becomes 100 again where that was interrupted

Nothing is ever unpickled: the manifest is JSON and Orbax is given arrays only.

In a job of several processes, all save together into one folder that they share, and restore together; how many there
are, and on which mesh the arrays lie, may differ from one to the other. Each piece of an array is written by one
process, which also computes the checksums of its files; process 0 joins what the others wrote and publishes it. On
restoring, each process verifies its share of the files. Whatever can go wrong in one of them is told to all before
anyone goes on (`agreement.py`), so that all take the same checkpoint, or raise the same error.
"""

import contextlib
import itertools
import json
import logging
import os
import pathlib
import re
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from jmoe.errors import LostProcessError, StorageError, UserError
from jmoe.parallel.hosts import current
from jmoe.paths import path_names
from jmoe.train import manifest
from jmoe.train.agreement import Agreement
from jmoe.train.array_files import ArrayFiles, to_arrays, written_by
from jmoe.train.manifest import UnreadableCheckpointError, reason

_STATE = "state"  # the part that Orbax writes
_NAME = re.compile(r"(0|[1-9][0-9]*)(\.tmp|\.old\.tmp)?")
_TOKEN = "jmoe_written_by-"  # starts the name of a file by which processes see that they share a folder
_T = TypeVar("_T")

# How long to look for what another host has written: NFS may remember what was in a folder for 60 seconds by default.
VISIBLE_SECONDS = 60.0

log = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores pytrees of JAX arrays (dicts, dataclasses, `nnx.State`, optax states, typed random keys).

    Restored arrays equal the saved ones bit for bit. Saving goes on in the background; an error of it is raised by the
    next call of `save`, `wait`, `restore` or `close`. All errors that a full disk, a damaged file or another model can
    cause are `UserError`s.

    In a job of several processes, each of them opens the same folder and makes the same calls in the same order; the
    arrays are global ones. A call that fails in one process raises the same error in all, and one that a process does
    not come to raises LostProcessError in the others after `agreement.SECONDS`. Warnings are given by process 0. Where
    the processes were not connected before (`jmoe.parallel.startup`), opening the first does so, over the devices.
    """

    _opened = itertools.count()  # those of this process; the processes of a job open theirs in the same order

    def __init__(self, directory: str | os.PathLike, keep: int = 3):
        """Opens a directory, which need not exist yet, and warns of interrupted saves in it; reading deletes nothing.

        A checkpoint whose replacement was interrupted gets its name back.

        Args:
          directory: where the checkpoints are, one sub-directory for each.
          keep: how many are kept; older ones are deleted, but only after a newer one is complete.
        """
        if keep < 1:
            raise UserError(f"keep={keep} checkpoints would leave none; keep at least 1.")
        self.directory = pathlib.Path(directory).absolute()
        self.keep = keep
        self._unusable: set[int] = set()  # complete, but found damaged
        self._thread: threading.Thread | None = None
        self._error: UserError | None = None
        self._hosts = current()
        name = f"checkpoints {next(self._opened)}"
        self._now = Agreement(self._hosts, f"{name}, now", (UnreadableCheckpointError,))  # of the calls
        self._later = Agreement(self._hosts, f"{name}, later")  # of the saves that go on meanwhile
        self._arrays = ArrayFiles()
        self._steps: list[int] = []  # that all processes have last agreed on
        self._published: list[int] | None = None  # the same after the save that `wait` will find complete
        self._now.together("opening the folder", lambda: self._put_back(strict=False))
        self._agree_on_steps()
        for path in _unfinished(self.directory):
            self._warn("%s is ignored: its save was interrupted, or is going on in another process.", path)

    def save(self, step: int, state: Any, metadata: dict, *, wait: bool = False) -> None:
        """Saves a state; returns once its arrays may be overwritten, or with `wait` once the checkpoint is complete.

        A checkpoint of the same step is replaced. `metadata` is anything that JSON can hold; that of process 0 counts.

        Raises:
          UserError: this save, or the one before it, failed; the earlier checkpoints are as they were.
        """
        self.wait()
        arrays, leaves = to_arrays(state)
        # Serialised and parsed again, so that later changes to metadata cannot reach what is written.
        content = json.loads(json.dumps({"step": step, "metadata": metadata, "leaves": leaves}, allow_nan=False))
        with contextlib.suppress(Exception):
            self._arrays.finish_writing()  # for a save that was interrupted before its second half could start
        try:
            start = f"the start of saving step {step}"
            _, tokens = self._now.together(start, lambda: self._prepare(step), tell=lambda token: token)
            self._now.together(f"the folder for step {step}", lambda: self._look_for(step, tokens[0]))
        except Exception as error:
            raise self._failure(step, error) from error
        refusal = None
        try:
            self._arrays.start_writing(self._temporary(step) / _STATE, arrays)
        except Exception as error:  # told to the others, who are writing, as an error of writing is
            refusal = error
        self._thread = threading.Thread(target=self._finish, args=(step, content, refusal), name=f"checkpoint-{step}")
        self._thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when the checkpoint that is being saved, if any, is complete; raises UserError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._published is not None:
            self._steps, self._published = self._published, None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order, but for those that were found to be damaged on restoring.

        With several processes, those that there were when the folder was opened or the last call of another method
        ended: the same in all.
        """
        return self._sound() if self._hosts.count == 1 else list(self._steps)

    def latest(self) -> int | None:
        """The last of `steps()`, or None."""
        return max(self.steps(), default=None)

    def restore(self, step: int, abstract_state: Any, *, partial: bool = False) -> tuple[Any, dict]:
        """The state and the metadata saved at a step.

        Args:
          step: one of `steps()`.
          abstract_state: arrays or `jax.ShapeDtypeStruct`s, in the structure of the state; those that have a sharding
            are restored with it, whatever it was when they were saved, the others to the default device (of each
            process).
          partial: whether the checkpoint may hold more than is asked for, which is then not read.

        Raises:
          UnreadableCheckpointError: a file is damaged or missing; the message names it.
          UserError: there is no such checkpoint, or the names, shapes or dtypes are not those of `abstract_state`; the
            message names the arrays that differ. Or the processes do not see the same files, or one could not read
            what is not known to be damaged, for want of memory or because of its storage.
        """
        self.wait()
        path = self.directory / str(step)
        if step not in self._agree_on_steps():
            raise UserError(f"There is no checkpoint of step {step} in {self.directory}, only of {self.steps()}.")
        abstract_leaves, treedef = jax.tree.flatten(abstract_state)
        wanted = dict(zip(path_names(abstract_state), abstract_leaves, strict=True))
        content = self._read_manifest(path, wanted, partial)
        self._now.together(
            f"checking step {step}",
            lambda: manifest.check_files(path, content, process=self._hosts.process, processes=self._hosts.count),
        )
        leaves, _ = self._now.together(f"reading step {step}", lambda: self._read_leaves(path, content, wanted))
        return treedef.unflatten([leaves[name] for name in wanted]), content["metadata"]

    def restore_latest(self, abstract_state: Any, *, partial: bool = False) -> tuple[Any, dict, int]:
        """State, metadata and step of the last checkpoint that is sound; warns of each damaged one it passes over.

        Arguments as in `restore`.

        Raises:
          UserError: there is no checkpoint, none is sound, or the last sound one is of another model or could not be
            read here.
        """
        self.wait()
        problems = []
        for step in reversed(self._agree_on_steps()):
            try:
                return *self.restore(step, abstract_state, partial=partial), step
            except UnreadableCheckpointError as error:
                self._warn("%s The checkpoint before it is used instead.", error)
                self._unusable.add(step)
                self._steps = [other for other in self._steps if other != step]
                problems.append(str(error))
        found = " ".join(problems) or "It has no complete checkpoint."
        raise UserError(f"Nothing to restore in {self.directory}: {found} Train from the start in another folder.")

    def close(self) -> None:
        """Waits as `wait` does, and lets go of Orbax's threads."""
        try:
            self.wait()
        finally:
            self._arrays.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.close()
        except UserError as failure:
            if error is None:
                raise
            log.error("%s", failure)  # the error that is already on its way says more

    # Saving

    def _prepare(self, step: int) -> str | None:
        """Has process 0 make the folder that all write into, and a file by which they know that it is that one."""
        if self._hosts.process:
            return None
        self.directory.mkdir(parents=True, exist_ok=True)
        self._put_back()  # lest it be deleted
        for path in _unfinished(self.directory):
            shutil.rmtree(path)
        token = f"{_TOKEN}{uuid.uuid4().hex}"
        (self._temporary(step) / _STATE).mkdir(parents=True)
        (self._temporary(step) / token).touch()
        return token

    def _look_for(self, step: int, token: str) -> None:
        """Raises UserError unless this process sees the folder that process 0 has made, and no other of that name."""
        try:
            self._in_time((self._temporary(step) / token).stat)
        except FileNotFoundError:
            raise UserError(
                "the folder is not shared by all processes, as what process 0 has just written is not there"
            ) from None

    def _finish(self, step: int, content: dict, refusal: Exception | None) -> None:
        """Second half of a save, in the background: checksums, manifest, publication, deletion of old checkpoints."""
        temporary, final = self._temporary(step), self.directory / str(step)
        process, processes = self._hosts.process, self._hosts.count

        def write() -> None:
            if refusal is not None:
                raise refusal
            self._arrays.finish_writing()
            own = written_by(process, manifest.files_below(temporary))  # process 0 adds the rest at the end
            manifest.write_part(temporary, process, manifest.checksums(temporary, own))

        def publish() -> list[int]:
            if process:
                return []
            # Before Orbax joins what the processes have written: it would leave out what it does not see yet.
            known = self._in_time(lambda: manifest.take_parts(temporary, range(processes)))
            self._arrays.join(temporary / _STATE)
            for token in temporary.glob(f"{_TOKEN}*"):
                token.unlink()
            manifest.write(temporary, content, known)
            if final.exists():
                final.rename(self._outdated(step))
            temporary.rename(final)
            self._delete_outdated(step)
            return self._sound()

        try:
            self._later.together(f"the end of writing step {step}", write)
            what = f"the checkpoint of step {step}"
            self._published = self._later.together(what, publish, tell=lambda steps: steps)[1][0]
        except Exception as error:
            self._error = self._failure(step, error)

    def _delete_outdated(self, step: int) -> None:
        """Deletes what the complete checkpoint of a step makes superfluous: all but `keep`, and the damaged ones."""
        self._unusable.discard(step)
        try:
            # Those after this step are no reason to delete one before it: they may be damaged too.
            earlier = [s for s in _complete(self.directory) if s < step and s not in self._unusable]
            for old in {*earlier[: max(0, len(earlier) - (self.keep - 1))], *self._unusable}:
                # Renamed first, so that one half deleted is never taken for a complete one, nor put back.
                (self.directory / str(old)).rename(self._temporary(old))
            self._unusable.clear()
            for path in _unfinished(self.directory):
                shutil.rmtree(path)
        except (OSError, UserError) as error:
            log.warning("Old checkpoints in %s could not be deleted: %s.", self.directory, reason(error))

    def _sound(self) -> list[int]:
        return [step for step in _complete(self.directory) if step not in self._unusable]

    def _put_back(self, *, strict: bool = True) -> None:
        """Has process 0 give a checkpoint its name again whose replacement ended between the two renames."""
        for path, final in [] if self._hosts.process else _set_aside(self.directory):
            with contextlib.nullcontext() if strict else contextlib.suppress(OSError):  # the folder may be read-only
                path.rename(final)

    def _temporary(self, step: int) -> pathlib.Path:
        return self.directory / f"{step}.tmp"

    def _outdated(self, step: int) -> pathlib.Path:
        return self.directory / f"{step}.old.tmp"

    def _failure(self, step: int, error: Exception) -> UserError:
        """Cleans up after a save that failed, and says so in one sentence."""
        if self._hosts.process == 0:
            shutil.rmtree(self._temporary(step), ignore_errors=True)
        try:
            self._put_back(strict=False)
            latest = self.latest()
        except (OSError, UserError):  # the directory itself is gone
            latest = None
        rest = "there is no earlier one" if latest is None else f"that of step {latest} is intact"
        sentence = f"The checkpoint of step {step} could not be saved in {self.directory}"
        if isinstance(error, LostProcessError):  # says itself what to do
            return LostProcessError(f"{sentence}; {rest}. {error}")
        why = str(error).rstrip(". ") if isinstance(error, UserError) else reason(error)
        if manifest.passes(error):
            return StorageError(f"{sentence}: {why}; {rest}. Run the same command to go on.")
        return UserError(f"{sentence}: {why}; {rest}. Free some space or choose another folder, and start again.")

    # Restoring

    def _read_manifest(self, path: pathlib.Path, wanted: dict[str, Any], partial: bool) -> dict:
        """The manifest of a checkpoint, once all processes have found it to be the same and to have what is wanted."""
        described = {name: manifest.describe(leaf) for name, leaf in wanted.items()}

        def read() -> dict:
            content = manifest.read(path)
            manifest.check_leaves(path, content, described, partial=partial)
            return content

        content, digests = self._now.together(f"the manifest of {path.name}", read, tell=manifest.digest)
        self._check_shared(digests, f"Step {path.name} has another manifest")
        return content

    def _read_leaves(self, path: pathlib.Path, content: dict, wanted: dict[str, Any]) -> dict[str, Any]:
        """The leaves of a state in a checkpoint whose manifest and files have been checked."""
        try:
            kinds = {name: leaf.get("key") for name, leaf in content["leaves"].items()}
            return self._arrays.read(path / _STATE, wanted, kinds)
        except Exception as error:
            raise manifest.unread(f"Checkpoint {path} is sound, but", error) from error

    # Agreeing

    def _agree_on_steps(self) -> list[int]:
        """The steps of the complete checkpoints, which all processes see."""
        deadline = time.monotonic() + VISIBLE_SECONDS
        while True:
            # Process 0 says whether there is time to look again, as clocks differ.
            said = self._now.together(
                "the list of checkpoints",
                lambda: _complete(self.directory),
                tell=lambda steps: [steps, time.monotonic() < deadline],
            )[1]
            lists = [steps for steps, _ in said]
            if lists.count(lists[0]) == len(lists):
                self._steps = lists[0]
                return self._steps
            if not said[0][1]:
                self._check_shared(lists, "It has other checkpoints")
            time.sleep(0.5)

    def _check_shared(self, seen: list, difference: str) -> None:
        """Raises UserError unless all processes see the same."""
        for process, other in enumerate(seen):
            if other != seen[0]:
                shown = f" ({seen[0]} and {other})" if isinstance(other, list) else ""
                raise UserError(
                    f"{self.directory} is not the same folder for all processes. {difference} for process 0 than for "
                    f"process {process} of {len(seen)}{shown}. Put it on storage that all hosts share."
                )

    def _in_time(self, look: Callable[[], _T]) -> _T:
        """What it returns; tried again while a file is missing, until `VISIBLE_SECONDS` have passed."""
        deadline = time.monotonic() + (VISIBLE_SECONDS if self._hosts.count > 1 else 0)
        while True:
            try:
                return look()
            except FileNotFoundError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def _warn(self, text: str, *values: Any) -> None:
        """Warns once, however many processes there are."""
        if self._hosts.process == 0:
            log.warning(text, *values)


def peek(directory: str | os.PathLike) -> dict:
    """The manifest of the last complete checkpoint that has a sound one, without reading any array.

    Returns:
      A dict with "step", "metadata" as saved, and "leaves": {name: {"shape": [...], "dtype": "float32"}}.

    Raises:
      UserError: there is none, or the last one could not be read here.
    """
    for step in reversed(_complete(pathlib.Path(directory))):
        try:
            return manifest.read(pathlib.Path(directory) / str(step))
        except UnreadableCheckpointError as error:
            log.warning("%s The checkpoint before it is used instead.", error)
    raise UserError(f"There is no usable checkpoint in {directory}; train first, or name another folder.")


def _entries(directory: pathlib.Path) -> list[pathlib.Path]:
    """What is in a directory that has the name of a checkpoint, complete or not."""
    try:
        return sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name) and path.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"The checkpoints in {directory} cannot be listed: {reason(error)}.") from error


def latest(directory: pathlib.Path) -> int | None:
    """The step of the last complete checkpoint in a folder, or None; neither the folder nor a file is changed."""
    aside = [int(final.name) for _, final in _set_aside(directory)]
    return max(_complete(directory) + aside, default=None)


def _complete(directory: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in _entries(directory) if _is_complete(path))


def _unfinished(directory: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in _entries(directory) if not _is_complete(path)]


def _set_aside(directory: pathlib.Path) -> list[tuple[pathlib.Path, pathlib.Path]]:
    """Checkpoints that were to be replaced while nothing has taken their place, each with the name that it had."""
    names = [(path, path.with_name(path.name.removesuffix(".old.tmp"))) for path in _unfinished(directory)]
    return [(path, final) for path, final in names if (path / manifest.NAME).exists() and not final.exists()]


def _is_complete(path: pathlib.Path) -> bool:
    return not path.suffix and (path / manifest.NAME).exists()
