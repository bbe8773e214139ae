"""Checkpoints: Orbax writes the arrays, and jmoe sees to it that what is read is what was written.

Orbax notices neither a flipped bit nor another dtype, and takes a directory for a checkpoint that is not one yet. So
each checkpoint has a manifest with the checksum of every file and the name, shape and dtype of every array, and is
published by renaming its directory once all of that is on disk:

    directory/
      300.tmp/              being written, or left behind by a save that was interrupted; never read
      200/                  complete
        jmoe_manifest.json  {"sha256": of the rest, "manifest": {format, step, metadata, leaves, files}}
        state/              written by Orbax, one array per leaf under its path name

Nothing is ever unpickled: the manifest is JSON and Orbax is given arrays only.
"""

import contextlib
import json
import logging
import os
import pathlib
import re
import shutil
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jmoe.errors import UserError
from jmoe.paths import path_names
from jmoe.train import manifest
from jmoe.train.manifest import UnreadableCheckpointError, reason

_STATE = "state"  # the part that Orbax writes
_NAME = re.compile(r"(0|[1-9][0-9]*)(\.tmp|\.old\.tmp)?")

log = logging.getLogger(__name__)


class Checkpointer:
    """Saves and restores pytrees of JAX arrays (dicts, dataclasses, `nnx.State`, optax states, typed random keys).

    Restored arrays equal the saved ones bit for bit. Saving goes on in the background; an error of it is raised by the
    next call of `save`, `wait`, `restore` or `close`. All errors that a full disk, a damaged file or another model can
    cause are `UserError`s. Written for one process.
    """

    def __init__(self, directory: str | os.PathLike, keep: int = 3):
        """Opens a directory, which need not exist yet, and warns of interrupted saves in it; reading deletes nothing.

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
        logging.getLogger("absl").addFilter(_not_from_orbax)
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        for path in _unfinished(self.directory):
            log.warning("%s is ignored: its save was interrupted, or is going on in another process.", path)

    def save(self, step: int, state: Any, metadata: dict, *, wait: bool = False) -> None:
        """Saves a state; returns once its arrays may be overwritten, or with `wait` once the checkpoint is complete.

        A checkpoint of the same step is replaced. `metadata` is anything that JSON can hold.

        Raises:
          UserError: this save, or the one before it, failed; the earlier checkpoints are as they were.
        """
        self.wait()
        arrays, leaves = _to_arrays(state)
        # Serialised and parsed again, so that later changes to metadata cannot reach what is written.
        content = json.loads(json.dumps({"step": step, "metadata": metadata, "leaves": leaves}, allow_nan=False))
        with contextlib.suppress(Exception):
            self._orbax.wait_until_finished()  # a save that was interrupted before its second half could start
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for path in _unfinished(self.directory):
                shutil.rmtree(path)
            self._temporary(step).mkdir()
            self._orbax.save(self._temporary(step) / _STATE, args=ocp.args.PyTreeSave(arrays))
        except Exception as error:
            raise self._failure(step, error) from error
        self._thread = threading.Thread(target=self._finish, args=(step, content), name=f"checkpoint-{step}")
        self._thread.start()
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when the checkpoint that is being saved, if any, is complete; raises UserError if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in order. Whether they are damaged is found out on restoring."""
        return _complete(self.directory)

    def latest(self) -> int | None:
        """The last of `steps()`, or None."""
        return latest(self.directory)

    def restore(self, step: int, abstract_state: Any, *, partial: bool = False) -> tuple[Any, dict]:
        """The state and the metadata saved at a step.

        Args:
          step: one of `steps()`.
          abstract_state: arrays or `jax.ShapeDtypeStruct`s, in the structure of the state; those that have a sharding
            are restored with it, the others to the default device.
          partial: whether the checkpoint may hold more than is asked for, which is then not read.

        Raises:
          UnreadableCheckpointError: a file is damaged or missing; the message names it.
          UserError: there is no such checkpoint, or the names, shapes or dtypes are not those of `abstract_state`; the
            message names the arrays that differ.
        """
        self.wait()
        path = self.directory / str(step)
        if step not in self.steps():
            raise UserError(f"There is no checkpoint of step {step} in {self.directory}, only of {self.steps()}.")
        content = manifest.read(path)
        abstract_leaves, treedef = jax.tree.flatten(abstract_state)
        wanted = dict(zip(path_names(abstract_state), abstract_leaves, strict=True))
        described = {name: manifest.describe(leaf) for name, leaf in wanted.items()}
        manifest.check_leaves(path, content, described, partial=partial)
        manifest.check_files(path, content)
        arrays = self._read_arrays(path, content["leaves"], wanted)
        return treedef.unflatten([arrays[name] for name in wanted]), content["metadata"]

    def restore_latest(self, abstract_state: Any, *, partial: bool = False) -> tuple[Any, dict, int]:
        """State, metadata and step of the last checkpoint that is sound; warns of each damaged one it passes over.

        Arguments as in `restore`.

        Raises:
          UserError: there is no checkpoint, none is sound, or the last sound one is of another model.
        """
        self.wait()
        problems = []
        for step in reversed(self.steps()):
            try:
                return *self.restore(step, abstract_state, partial=partial), step
            except UnreadableCheckpointError as error:
                log.warning("%s The checkpoint before it is used instead.", error)
                self._unusable.add(step)
                problems.append(str(error))
        found = " ".join(problems) or "It has no complete checkpoint."
        raise UserError(f"Nothing to restore in {self.directory}: {found} Train from the start in another folder.")

    def close(self) -> None:
        """Waits as `wait` does, and lets go of Orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.close()
        except UserError as failure:
            if error is None:
                raise
            log.error("%s", failure)  # the error that is already on its way says more

    def _finish(self, step: int, content: dict) -> None:
        """Second half of a save, in the background: checksums, manifest, publication, deletion of old checkpoints."""
        try:
            self._orbax.wait_until_finished()
            temporary, final = self._temporary(step), self.directory / str(step)
            manifest.write(temporary, content)
            if final.exists():
                final.rename(self._outdated(step))
            temporary.rename(final)
        except Exception as error:
            self._error = self._failure(step, error)
        else:
            self._delete_outdated(step)

    def _delete_outdated(self, step: int) -> None:
        """Deletes what the complete checkpoint of a step makes superfluous: all but `keep`, and the damaged ones."""
        self._unusable.discard(step)
        try:
            # Those after this step are no reason to delete one before it: they may be damaged too.
            earlier = [s for s in self.steps() if s < step and s not in self._unusable]
            for old in {*earlier[: max(0, len(earlier) - (self.keep - 1))], *self._unusable}:
                # Renamed first, so that one half deleted is never taken for a complete one.
                (self.directory / str(old)).rename(self._outdated(old))
            self._unusable.clear()
            for path in _unfinished(self.directory):
                shutil.rmtree(path)
        except (OSError, UserError) as error:
            log.warning("Old checkpoints in %s could not be deleted: %s.", self.directory, reason(error))

    def _read_arrays(self, path: pathlib.Path, leaves: dict[str, dict], wanted: dict[str, Any]) -> dict[str, jax.Array]:
        """Reads the arrays of a checkpoint whose manifest and files have been checked."""
        stored = {name: leaf for name, leaf in wanted.items() if leaf.size}
        how = {name: _restore_args(leaf) for name, leaf in stored.items()}
        try:
            args = ocp.args.PyTreeRestore(item=dict.fromkeys(stored, 0), restore_args=how, partial_restore=True)
            arrays = self._orbax.restore(path / _STATE, args=args) if stored else {}
            return {name: _from_array(arrays.get(name), leaf, leaves[name].get("key")) for name, leaf in wanted.items()}
        except Exception as error:
            raise UnreadableCheckpointError(f"Checkpoint {path} cannot be read: {reason(error)}.") from error

    def _temporary(self, step: int) -> pathlib.Path:
        return self.directory / f"{step}.tmp"

    def _outdated(self, step: int) -> pathlib.Path:
        return self.directory / f"{step}.old.tmp"

    def _failure(self, step: int, error: Exception) -> UserError:
        """Cleans up after a save that failed, and says so in one sentence."""
        shutil.rmtree(self._temporary(step), ignore_errors=True)
        try:
            latest = self.latest()
        except UserError:  # the directory itself is gone
            latest = None
        rest = "there is no earlier one" if latest is None else f"that of step {latest} is intact"
        return UserError(
            f"The checkpoint of step {step} could not be saved in {self.directory}: {reason(error)}; {rest}. "
            "Free some space or choose another folder, and start again."
        )


def peek(directory: str | os.PathLike) -> dict:
    """The manifest of the last complete checkpoint that has a sound one, without reading any array.

    Returns:
      A dict with "step", "metadata" as saved, and "leaves": {name: {"shape": [...], "dtype": "float32"}}.

    Raises:
      UserError: there is none.
    """
    for step in reversed(_complete(pathlib.Path(directory))):
        try:
            return manifest.read(pathlib.Path(directory) / str(step))
        except UnreadableCheckpointError as error:
            log.warning("%s The checkpoint before it is used instead.", error)
    raise UserError(f"There is no usable checkpoint in {directory}; train first, or name another folder.")


def _not_from_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs each error with several tracebacks before it raises it; ours is one sentence."""
    return "orbax" not in record.pathname


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
    return max(_complete(directory), default=None)


def _complete(directory: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in _entries(directory) if _is_complete(path))


def _unfinished(directory: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in _entries(directory) if not _is_complete(path)]


def _is_complete(path: pathlib.Path) -> bool:
    return not path.suffix and (path / manifest.NAME).exists()


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_arrays(state: Any) -> tuple[dict[str, jax.Array], dict[str, dict]]:
    """What Orbax is given, by name, and the description of every leaf: random keys go as integers, empty arrays not."""
    arrays, leaves = {}, {}
    for name, leaf in zip(path_names(state), jax.tree.leaves(state), strict=True):
        assert isinstance(leaf, jax.Array), f"{name} is {type(leaf)}; a state consists of JAX arrays"
        assert name not in leaves, f"two leaves of the state are called {name}"
        leaves[name] = manifest.describe(leaf)
        if _is_key(leaf):
            leaves[name]["key"] = str(jax.random.key_impl(leaf))
        if leaf.size:
            arrays[name] = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    assert arrays, "the state has no array with an element"
    return arrays, leaves


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """Where a leaf should be put, if it says so; an array that is merely on the default device does not."""
    return None if isinstance(leaf, jax.Array) and not leaf.committed else leaf.sharding


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    if _sharding(leaf) is None or _is_key(leaf):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=_sharding(leaf))


def _from_array(array: Any, leaf: Any, key: str | None) -> jax.Array:
    """Makes the leaf that is wanted of what Orbax returned, which is None for an empty array."""
    if key is not None and array is None:
        array = jax.random.split(jax.random.key(0, impl=key), leaf.shape)
    elif key is not None:
        array = jax.random.wrap_key_data(jnp.array(array), impl=key)
    elif array is None:
        array = jnp.zeros(leaf.shape, leaf.dtype)
    elif not isinstance(array, jax.Array):
        array = jnp.array(array)  # not asarray, so that nobody else holds the memory
    if manifest.describe(array) != manifest.describe(leaf):
        raise ValueError(f"{manifest.describe(array)} was read where {manifest.describe(leaf)} was written")
    return array if _sharding(leaf) is None else jax.device_put(array, _sharding(leaf))
