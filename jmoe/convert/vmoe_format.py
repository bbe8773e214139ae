"""Checkpoints in the published layout of google-research/vmoe: PREFIX.index with PREFIX.data-nnnnn-of-NNNNN.

Of the files, `vmoe_index` and `vmoe_shard` say what is in them. Beside them jmoe writes PREFIX.jmoe, which is JSON: the
checksum of every file, and notes such as the exact configuration of the model. The reference does not look at it, but
its trainer looks for steps in the names of all files like PREFIX_STEP.SUFFIX, and fails on a second dot.
"""

import contextlib
import hashlib
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from jmoe.convert.seal import Content, seal, unseal
from jmoe.convert.vmoe_index import (
    DTYPES,
    Index,
    Leaf,
    Slices,
    as_map,
    check_disjoint,
    check_key,
    pack_index,
    read_index,
)
from jmoe.convert.vmoe_shard import MAX_PIECE_BYTES, Chunk, read_chunk, scan, write_shard
from jmoe.errors import UserError

MAX_CHUNK_BYTES = 2**28  # of the reference's writer


def read(prefix: str | os.PathLike[str], *, unversioned: bool = False) -> dict[str, Any]:
    """Reads a checkpoint as nested dictionaries of arrays, bit for bit; lists and tuples come as {"0": ..., "1": ...}.

    Everything is compared before an array is allocated: sizes of files, what the index says, and what is in the shards.
    Shards are then read one after the other, straight into the arrays; beside the result, memory is needed for no more
    than one chunk. Checksums are compared where jmoe wrote them; without, a changed byte of an array goes unnoticed.

    Args:
      prefix: the path without ".index"; that ending may be there.
      unversioned: whether to read an index of before 2022-06-22, which does not say how its arrays are numbered, as
        that of a tree of dictionaries: by sorted names, as now. Shapes and dtypes are compared with the shards' own.

    Raises:
      UserError: a file is missing, damaged, or not what the index says; the message names the file and the array.
    """
    prefix = _prefix(prefix)
    try:
        _verify(prefix)
        index = read_index(_index(prefix), unversioned=unversioned)
        shards = _present_shards(prefix, index.num_shards)
        wanted: list[set[tuple[int, Slices]]] = [set() for _ in shards]
        for number, leaf in enumerate(index.leaves):
            for where, shard in leaf.chunks.items():
                wanted[shard].add((number, where))
        chunks = {path: _compared(path, parts, index) for path, parts in zip(shards, wanted, strict=True)}
        # What is described is there, so that no size can be absurd any more.
        _check_disjoint(_index(prefix), index)
        arrays = {leaf.name: _empty(leaf) for leaf in index.leaves}
        for path, found in chunks.items():
            with open(path, "rb") as file:
                for chunk in found:
                    read_chunk(file, chunk, arrays[index.leaves[chunk.leaf].name])
    except OSError as error:
        raise UserError(f"{error.filename or prefix} cannot be read: {error.strerror or error}.") from error
    return _map_leaves(index.tree, lambda leaf: arrays[leaf.name])


def read_notes(prefix: str | os.PathLike[str]) -> Mapping[str, str]:
    """Returns the notes that `write` was given, none for a checkpoint of another program."""
    return (_manifest(_prefix(prefix)) or {"notes": {}})["notes"]


def write(
    prefix: str | os.PathLike[str],
    tree: Mapping[str, Any],
    *,
    num_shards: int = 1,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
    notes: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint that the reference can read, and its checksums beside it.

    Arrays are cut along their first axes into chunks of at most max_chunk_bytes; array by array, each chunk goes to the
    shard with the fewest bytes so far. All files are written under temporary names and renamed at the end.

    Args:
      prefix: the path without ".index".
      tree: nested mappings and sequences of arrays.
      num_shards: files the arrays are spread over.
      max_chunk_bytes: 256 MiB as published; at most 1 GiB.
      notes: text that is kept beside the checksums, by name.
      overwrite: whether a checkpoint of this name may be replaced.

    Raises:
      UserError: there is one already, an array cannot be written, or the files cannot.
    """
    if not 1 <= num_shards < 100_000 or not 1 <= max_chunk_bytes <= MAX_PIECE_BYTES:
        raise UserError(
            f"A checkpoint has 1 to 99,999 shards, and chunks of 1 to {MAX_PIECE_BYTES} bytes; "
            f"it got num_shards={num_shards} and max_chunk_bytes={max_chunk_bytes}."
        )
    prefix = _prefix(prefix)
    if (there := _files(prefix)) and not overwrite:
        raise UserError(
            f"There is a checkpoint {prefix} already ({there[0].name}). Choose another, or say --overwrite."
        )
    arrays: list[np.ndarray] = []
    index, parts = _plan(tree, num_shards, max_chunk_bytes, arrays)
    shards = [_shard(prefix, i, num_shards) for i in range(num_shards)]
    try:
        prefix.parent.mkdir(parents=True, exist_ok=True)
        for path, of_shard in zip(shards, parts, strict=True):
            with _temporary_file(path) as file:
                write_shard(file, [(leaf, arrays[leaf], chunks) for leaf, chunks in of_shard.items()])
        with _temporary_file(_index(prefix)) as file:
            file.write(pack_index(index))
        sums = {path.name: _checksum(_temporary(path)) for path in (*shards, _index(prefix))}
        with _temporary_file(_jmoe(prefix)) as file:
            file.write(seal({"files": sums, "notes": dict(notes or {})}).encode())
        # The index goes first and comes last: without one there is no checkpoint, instead of a mixture of two.
        for path in sorted(there, key=lambda path: path != _index(prefix)):
            path.unlink(missing_ok=True)
        for path in (*shards, _jmoe(prefix), _index(prefix)):
            _temporary(path).rename(path)
    except OSError as error:
        raise UserError(f"The checkpoint {prefix} cannot be written: {error.strerror or error}.") from error
    finally:
        for left in _unfinished(prefix):
            left.unlink(missing_ok=True)


def _plan(
    tree: Mapping[str, Any], num_shards: int, max_chunk_bytes: int, arrays: list[np.ndarray]
) -> tuple[Index, list[dict[int, list[Slices]]]]:
    """Returns the index and, for each shard, which parts of which array it holds; appends the arrays by number."""
    leaves: list[Leaf] = []
    parts: list[dict[int, list[Slices]]] = [{} for _ in range(num_shards)]
    load = [0] * num_shards

    def plan(node: Any, keys: tuple[str, ...]) -> Any:
        if isinstance(node, Mapping | list | tuple):
            children = as_map(node)
            for key in children:
                check_key(key, f"The tree to be written, in {'/'.join(keys)!r},")
            return {key: plan(children[key], (*keys, key)) for key in sorted(children)}
        array = np.asarray(node)
        leaf = Leaf(name="/".join(keys), shape=array.shape, dtype=array.dtype.newbyteorder("="), chunks={})
        if array.dtype.name not in DTYPES or not array.size:
            what = f"is {array.dtype} {array.shape}"
            raise UserError(f"The array {leaf.name!r} {what}, which the published layout cannot store.")
        for where in _cut(array.shape, array.dtype.itemsize, max_chunk_bytes):
            shard = load.index(min(load))
            load[shard] += int(np.prod([stop - start for start, stop in where], dtype=np.int64)) * array.dtype.itemsize
            leaf.chunks[where] = shard
            parts[shard].setdefault(len(leaves), []).append(where)
        arrays.append(array.astype(leaf.dtype, copy=False))
        leaves.append(leaf)
        return leaf

    return Index(num_shards=num_shards, tree=plan(tree, ()), leaves=leaves), parts


def _cut(shape: tuple[int, ...], itemsize: int, most: int) -> Iterator[Slices]:
    """Yields parts of at most so many bytes (or one element), which are contiguous in memory."""
    if not shape:
        yield ()
        return
    side, *rest = shape
    row = int(np.prod(rest, dtype=np.int64)) * itemsize
    rows = min(side, max(1, most // row))
    for start in range(0, side, rows):
        whole = tuple((0, s) for s in rest)
        for inner in [whole] if row <= most else _cut(tuple(rest), itemsize, most):
            yield ((start, min(start + rows, side)), *inner)


def _present_shards(prefix: pathlib.Path, count: int) -> list[pathlib.Path]:
    """Returns the paths of all shards; raises UserError if one is missing."""
    for i in range(count):  # one by one: a damaged index may ask for any number
        path = _shard(prefix, i, count)
        if not path.exists():
            others = [other for other in _files(prefix) if ".data-" in other.name] + _unfinished(prefix)
            found = f" There is {others[0].name}." if others and i == 0 else ""
            raise UserError(
                f"{path} is missing: {_index(prefix)} says that there are {count} shards.{found} Bring all files of "
                "the checkpoint together."
            )
    return [_shard(prefix, i, count) for i in range(count)]


def _check_disjoint(path: pathlib.Path, index: Index) -> None:
    for leaf in index.leaves:
        try:
            check_disjoint(leaf)
        except ValueError as error:
            raise UserError(f"{path} describes {leaf.name!r} wrongly: {error}.") from None


def _compared(path: pathlib.Path, wanted: set[tuple[int, Slices]], index: Index) -> list[Chunk]:
    """Returns the chunks of a shard, which are those that the index says are in it: number of the array, and part."""
    found = []
    for chunk in scan(path):
        if chunk.leaf >= len(index.leaves):
            raise UserError(
                f"{path} has a chunk of array {chunk.leaf}; the index has only {len(index.leaves)}, from 0."
            )
        leaf = index.leaves[chunk.leaf]
        if (chunk.leaf, chunk.where) not in wanted:
            raise UserError(
                f"{path} has a part of {leaf.name!r} that its index does not expect there, or has it twice."
            )
        if chunk.dtype != leaf.dtype:
            raise UserError(f"{path} has {chunk.dtype} in {leaf.name!r}; the index says {leaf.dtype}.")
        wanted.remove((chunk.leaf, chunk.where))
        found.append(chunk)
    if wanted:
        names = sorted({index.leaves[number].name for number, _ in wanted})
        more = f" and of {len(names) - 1} more arrays" if len(names) > 1 else ""
        raise UserError(f"{path} lacks a part of {names[0]!r}{more} that its index says it has.")
    return found


def _verify(prefix: pathlib.Path) -> None:
    """Raises UserError unless the files are those that jmoe wrote; of another program's it knows nothing."""
    for name, expected in (_manifest(prefix) or {"files": {}})["files"].items():
        path = prefix.with_name(pathlib.PurePath(name).name)
        if not path.exists():
            raise UserError(f"{path} is missing: {_jmoe(prefix)} lists it. Bring all files of the checkpoint together.")
        if _checksum(path) != expected:
            raise UserError(
                f"{path} is not what was written: its checksum differs from that in {_jmoe(prefix)}. Copy it again; if "
                "another program has written it since, delete the file with the checksums."
            )


def _manifest(prefix: pathlib.Path) -> Content | None:
    try:
        return unseal(_jmoe(prefix).read_bytes(), {"files", "notes"})
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{_jmoe(prefix)}, with the checksums of the checkpoint, {error}.") from None


def _empty(leaf: Leaf) -> np.ndarray:
    """An array that begins at a multiple of 64 bytes, so that JAX can take it for one of its own without a copy."""
    nbytes = math.prod(leaf.shape) * leaf.dtype.itemsize
    memory = np.empty(nbytes + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + nbytes].view(leaf.dtype).reshape(leaf.shape)


def _map_leaves(tree: Any, function: Callable[[Leaf], Any]) -> Any:
    if isinstance(tree, Leaf):
        return function(tree)
    return {key: _map_leaves(node, function) for key, node in tree.items()}


def _prefix(prefix: str | os.PathLike[str]) -> pathlib.Path:
    text = os.fspath(prefix)
    path = pathlib.Path(text.removesuffix(".index"))
    if not path.name or text.endswith(("/", os.sep)):
        raise UserError(f"{text!r} is no prefix of a checkpoint: it is the path of PREFIX.index, without its ending.")
    return path


def _index(prefix: pathlib.Path) -> pathlib.Path:
    return prefix.with_name(f"{prefix.name}.index")


def _jmoe(prefix: pathlib.Path) -> pathlib.Path:
    return prefix.with_name(f"{prefix.name}.jmoe")


def _temporary(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".tmp.{path.name}")


def _shard(prefix: pathlib.Path, i: int, count: int) -> pathlib.Path:
    return prefix.with_name(f"{prefix.name}.data-{i:05d}-of-{count:05d}")


def _files(prefix: pathlib.Path, start: str = "") -> list[pathlib.Path]:
    """Returns the files of a checkpoint that there are, of any number of shards."""
    name = re.compile(re.escape(start + prefix.name) + r"\.(index|jmoe|data-\d{5,}-of-\d{5,})")
    return sorted(path for path in prefix.parent.glob("*") if name.fullmatch(path.name))


def _unfinished(prefix: pathlib.Path) -> list[pathlib.Path]:
    return _files(prefix, ".tmp.")


@contextlib.contextmanager
def _temporary_file(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Opens a file for writing under its temporary name; it is on disk afterwards."""
    with open(_temporary(path), "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _checksum(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
