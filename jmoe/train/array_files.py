"""The arrays of a checkpoint as files: what Orbax is given, and what is made of what it returns.

Orbax's handler is called here, and none of its checkpointers: those meet at barriers that a process which failed never
reaches, and some of these are collective operations of the devices.
"""

import asyncio
import functools
import logging
import pathlib
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath  # what Orbax, which depends on it, takes for a path

from jmoe.paths import path_names
from jmoe.train import manifest


class ArrayFiles:
    """Writes arrays into folders, one set at a time, and reads them.

    With several processes the arrays are global. All processes write into one folder, each piece of an array by one of
    them, and `join` is called by one of them at the end. Any error that Orbax or the file system has may be raised.
    """

    def __init__(self):
        """Has Orbax's threads ready."""
        logging.getLogger("absl").addFilter(_not_from_orbax)
        self._orbax = ocp.PyTreeCheckpointHandler()
        self._writing: Sequence[Any] = ()  # Orbax's futures of the files that are being written

    def start_writing(self, path: pathlib.Path, arrays: Mapping[str, jax.Array]) -> None:
        """Returns once the arrays have been copied, and may be overwritten; Orbax goes on to write them."""

        async def start() -> None:
            args = ocp.args.PyTreeSave(dict(arrays))
            self._writing = await self._orbax.async_save(epath.Path(path), args=args) or ()

        _run(start())

    def finish_writing(self) -> None:
        """Returns once all that this process has to write is written, or raises what went wrong."""
        writing, self._writing = self._writing, ()
        for future in writing:
            future.result()

    def join(self, path: pathlib.Path) -> None:
        """Makes one of what all processes have written, when all of them have finished."""
        self._orbax.finalize(epath.Path(path))

    def read(self, path: pathlib.Path, wanted: Mapping[str, Any], kinds: Mapping[str, str | None]) -> dict[str, Any]:
        """The leaves of a state, by name.

        Args:
          path: of the folder.
          wanted: arrays or `jax.ShapeDtypeStruct`s, by name; those that have a sharding are read with it.
          kinds: of those that are random keys, as `to_arrays` describes them.

        Raises:
          ValueError: what was read is not what is wanted; or other errors of Orbax.
        """
        stored = {name: leaf for name, leaf in wanted.items() if leaf.size}
        how = {name: _restore_args(leaf) for name, leaf in stored.items()}
        args = ocp.args.PyTreeRestore(item=dict.fromkeys(stored, 0), restore_args=how, partial_restore=True)
        read = self._orbax.restore(epath.Path(path), args=args) if stored else {}
        return {name: _from_array(read.get(name), leaf, kinds.get(name)) for name, leaf in wanted.items()}

    def close(self) -> None:
        """Lets go of Orbax's threads."""
        self._orbax.close()


def written_by(process: int, names: Iterable[str]) -> list[str]:
    """Those of the files that a process has written: they have its number in their path, as Orbax names them."""
    marks = {f"ocdbt.process_{process}", f"process_{process}"}
    return [name for name in names if marks.intersection(name.split("/"))]


def to_arrays(state: Any) -> tuple[dict[str, jax.Array], dict[str, dict]]:
    """What Orbax is given, by name, and the description of every leaf: random keys go as integers, empty arrays not."""
    arrays, leaves = {}, {}
    for name, leaf in zip(path_names(state), jax.tree.leaves(state), strict=True):
        assert isinstance(leaf, jax.Array), f"{name} is {type(leaf)}; a state consists of JAX arrays"
        assert name not in leaves, f"two leaves of the state are called {name}"
        assert jax.process_count() == 1 or not leaf.is_fully_addressable, f"{name} is an array of this process alone"
        leaves[name] = manifest.describe(leaf)
        if _is_key(leaf):
            leaves[name]["key"] = str(jax.random.key_impl(leaf))
        if leaf.size:
            arrays[name] = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    assert arrays, "the state has no array with an element"
    return arrays, leaves


def _from_array(array: Any, leaf: Any, key: str | None) -> jax.Array:
    """Makes the leaf that is wanted of what Orbax returned, which is None for an empty array."""
    # Under jit, since a device_put to devices of several processes compares the values of all, through the devices.
    place = functools.partial(jax.jit, out_shardings=_sharding(leaf))
    if array is None and key is not None:
        array = place(lambda: jax.random.split(jax.random.key(0, impl=key), leaf.shape))()
    elif array is None:
        array = place(lambda: jnp.zeros(leaf.shape, leaf.dtype))()
    elif key is not None:
        array = place(functools.partial(jax.random.wrap_key_data, impl=key))(np.array(array))
    elif not isinstance(array, jax.Array):
        array = jnp.array(array)  # not asarray, so that nobody else holds the memory
    if manifest.describe(array) != manifest.describe(leaf):
        raise ValueError(f"{manifest.describe(array)} was read where {manifest.describe(leaf)} was written")
    return array


def _restore_args(leaf: Any) -> ocp.RestoreArgs:
    if _sharding(leaf) is None or _is_key(leaf):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=_sharding(leaf))


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """Where a leaf should be put, if it says so; an array that is merely on the default device does not."""
    return None if isinstance(leaf, jax.Array) and not leaf.committed else leaf.sharding


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Runs a coroutine to its end, in a thread of its own: in a notebook, this one has an event loop already."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        pool.submit(asyncio.run, coroutine).result()


def _not_from_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs each error with several tracebacks before it raises it; ours is one sentence."""
    return "orbax" not in record.pathname
