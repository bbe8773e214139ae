"""The index of a checkpoint of google-research/vmoe: which arrays there are, and which shard holds which part of each.

PREFIX.index is one MessagePack map {"shard_count": int, "index": tree, "version": "20220622"}. The tree is nested maps;
a leaf is extension 8 with the payload [shape-and-dtype, slices, shard of each slice], whose parts are packed in turn:

    4 shape-and-dtype  [shape, dtype name, weak_type, {}]
    5 slice            [start, stop, step]
    6 N-d slice        [slice of each axis]

Leaves are numbered 0, 1, 2, ... depth first, the keys of every map in sorted order; shards know them by number.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import msgpack
import numpy as np

from jmoe.errors import UserError

VERSION = "20220622"
_LEAF = 8  # extension type
_DEPTH = 64  # maps within maps; a model has five
DTYPES = {
    **{name: np.dtype(name) for name in ("bool", "float16", "float32", "float64", "complex64", "complex128")},
    **{f"{sign}int{bits}": np.dtype(f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
    "bfloat16": np.dtype(jnp.bfloat16),
}

Slices = tuple[tuple[int, int], ...]  # (start, stop) of each axis


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
    """An array as the index describes it.

    Attributes:
      name: the keys of the maps it is in, such as "Encoder/encoderblock_1/Moe/Router/dense/kernel".
      shape: of the array.
      dtype: of the array.
      chunks: the parts it is stored in, which are disjoint and cover it, with the number of the shard of each.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: dict[Slices, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Index:
    """What an index file says.

    Attributes:
      num_shards: how many shards there are.
      tree: nested dictionaries with `Leaf`s in them; empty ones are kept.
      leaves: by number.
    """

    num_shards: int
    tree: dict[str, Any]
    leaves: list[Leaf]


def pack_index(index: Index) -> bytes:
    """Returns the content of an index file."""

    def describe(node: Any) -> Any:
        if isinstance(node, Leaf):
            shape = pack([list(node.shape), node.dtype.name, False, {}])
            slices = [pack_slices(where) for where in node.chunks]
            return msgpack.ExtType(_LEAF, pack([shape, slices, list(node.chunks.values())]))
        return {key: describe(node[key]) for key in sorted(node)}

    return pack({"shard_count": index.num_shards, "index": describe(index.tree), "version": VERSION})


def read_index(path: pathlib.Path, *, unversioned: bool = False) -> Index:
    """Reads an index file and checks that the chunks of every array can be disjoint and cover it.

    Args:
      path: of the file.
      unversioned: whether one without a version is read as if it had this one.

    Raises:
      UserError: it is no such file, is damaged, is of another version, or describes what cannot be read.
    """
    content = _load(path)
    if not isinstance(content, dict) or "index" not in content:
        raise UserError(f"{path} is no index of a checkpoint: it should hold a map with 'index' and 'shard_count'.")
    version = content.get("version", VERSION if unversioned else None)
    if version is None:
        # Its arrays are numbered in the order of a tree that is not in the file: equal shapes could be swapped unseen.
        raise UserError(
            f"{path} has no version: it was written before {VERSION} and does not say how its arrays are numbered. If "
            "it was saved from nothing but dictionaries, as parameters are, that is by sorted names: convert it with "
            "jmoe convert --unversioned."
        )
    if version != VERSION:
        raise UserError(f"{path} has version {str(version)[:40]!r}; jmoe reads version {VERSION!r}.")
    num_shards = content.get("shard_count")
    if type(num_shards) is not int or num_shards < 1:
        raise UserError(f"{path} has shard_count {str(num_shards)[:40]}, which must be an integer of at least 1.")
    leaves: list[Leaf] = []
    return Index(num_shards=num_shards, tree=_tree(path, content["index"], (), num_shards, leaves), leaves=leaves)


def _load(path: pathlib.Path) -> Any:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"There is no file {path}. Give the PREFIX of PREFIX.index, without its ending.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from None
    if is_pickle(data[:2]):
        raise UserError(f"{path} looks like a Python pickle, which jmoe never loads, and not like an index.")
    try:
        return unpack(data, raw=False, object_pairs_hook=_without_duplicates)
    except ValueError as error:
        raise UserError(f"{path} is damaged, or no index of a checkpoint: {error}.") from None


def is_pickle(start: bytes) -> bool:
    """Returns whether a file that starts with these two bytes can be a pickle of protocol 2 or newer."""
    return start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")


def pack(value: Any) -> bytes:
    """Returns the value as MessagePack."""
    data = msgpack.packb(value)
    assert data is not None
    return data


def unpack(data: bytes, **options: Any) -> Any:
    """Returns the MessagePack value in data; raises ValueError in words for whatever is wrong with it."""
    try:
        return msgpack.unpackb(data, **{"raw": True} | options)
    except (msgpack.exceptions.UnpackException, ValueError, TypeError, OverflowError) as error:
        reason = str(error).splitlines()[0][:100].rstrip(". ") if str(error) else type(error).__name__
        raise ValueError(f"its MessagePack cannot be read ({reason})") from None


def _without_duplicates(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _tree(path: pathlib.Path, node: Any, keys: tuple[str, ...], num_shards: int, leaves: list[Leaf]) -> Any:
    """Returns the tree with its leaves decoded, and appends them to `leaves` in the order of their numbers."""
    name = "/".join(keys)
    if isinstance(node, dict):
        if len(keys) >= _DEPTH:
            raise UserError(f"{path} has maps within maps more than {_DEPTH} deep; no model has.")
        for key in node:
            check_key(key, f"{path}, in {name or 'its tree'!r},")
        return {key: _tree(path, node[key], (*keys, key), num_shards, leaves) for key in sorted(node)}
    if not isinstance(node, msgpack.ExtType):
        raise UserError(f"{path} has {str(node)[:40]!r} at {name!r}, where an array should be described.")
    if node.code != _LEAF:
        raise UserError(f"{path} has the unknown extension type {node.code} at {name!r}; an array is of type {_LEAF}.")
    try:
        leaf = _leaf(name, node.data, num_shards)
    except ValueError as error:
        raise UserError(f"{path} describes {name!r} wrongly: {error}.") from None
    leaves.append(leaf)
    return leaf


def check_key(key: Any, where: str) -> None:
    """Raises UserError unless the key can be part of a name, and of a file's name, without leading anywhere else."""
    if not isinstance(key, str) or not key or key in (".", "..") or any(c in key for c in "/\\\0"):
        raise UserError(f"{where} has the key {str(key)[:80]!r}, which cannot be a part of a parameter's name.")


def _leaf(name: str, payload: bytes, num_shards: int) -> Leaf:
    """Decodes a leaf; raises ValueError in words."""
    match unpack(payload):
        case [bytes(shape_and_dtype), [*slices], [*shards]] if len(slices) == len(shards):
            pass
        case _:
            raise ValueError("it should be [shape and dtype, slices, shards], with a shard for each slice")
    match unpack(shape_and_dtype):
        case [[*shape], bytes(dtype), *_] if all(type(side) is int for side in shape):
            pass
        case _:
            raise ValueError("its shape and dtype cannot be read")
    if len(shape) > 32 or any(side < 0 for side in shape):
        raise ValueError(f"it cannot have the shape {_short(shape)}")
    if 0 in shape:
        raise ValueError(f"an array of no elements, {_short(shape)}, cannot be stored in this layout")
    leaf = Leaf(name=name, shape=tuple(shape), dtype=dtype_named(dtype), chunks={})
    for where, shard in zip(slices, shards, strict=True):
        if type(shard) is not int or not 0 <= shard < num_shards:
            raise ValueError(f"a part of it is in shard {_short(shard)}, but there are only {num_shards}, from 0")
        chunk = unpack_slices(where)
        if len(chunk) != len(shape) or any(stop > side for (_, stop), side in zip(chunk, shape, strict=False)):
            raise ValueError(f"its part {show(chunk)} is outside of its shape {_short(shape)}")
        leaf.chunks[chunk] = shard
    if len(leaf.chunks) < len(slices) or sum(map(size_of, leaf.chunks)) > math.prod(shape):
        raise ValueError("its parts overlap")
    if sum(map(size_of, leaf.chunks)) < math.prod(shape):
        raise ValueError(f"its {len(slices)} parts do not cover its shape {_short(shape)}: there is a hole")
    return leaf


def check_disjoint(leaf: Leaf) -> None:
    """Raises ValueError, in words, if parts overlap, given that they have as many elements as the array together.

    Takes a byte for each element at most, so that it must be known that the elements are there.
    """
    if len(leaf.chunks) == 1:
        return
    edges = [sorted({edge for chunk in leaf.chunks for edge in chunk[axis]}) for axis in range(len(leaf.shape))]
    cells = np.zeros([len(of_axis) - 1 for of_axis in edges], bool)  # between the edges, no part begins or ends
    for chunk in leaf.chunks:
        part = tuple(
            slice(of_axis.index(start), of_axis.index(stop))
            for of_axis, (start, stop) in zip(edges, chunk, strict=True)
        )
        if cells[part].any():
            raise ValueError(f"its part {show(chunk)} overlaps another")
        cells[part] = True


def dtype_named(name: bytes) -> np.dtype:
    """Returns the dtype of that name; raises ValueError, in words, for one that is not read."""
    text = name.decode("utf-8", "replace")[:40]
    if text not in DTYPES:
        why = "would have to be unpickled, which jmoe never does" if text.startswith("object") else "is not known"
        raise ValueError(f"its dtype {text!r} {why}")
    return DTYPES[text]


def pack_slices(where: Slices) -> bytes:
    """Returns the payload of an N-d slice."""
    return pack([pack([start, stop, None]) for start, stop in where])


def unpack_slices(payload: Any) -> Slices:
    """Returns the N-d slice of a payload; raises ValueError, in words, if it is none."""
    axes = unpack(payload) if isinstance(payload, bytes) else None
    if not isinstance(axes, list) or not all(isinstance(axis, bytes) for axis in axes):
        raise ValueError("a slice of it cannot be read")
    found = []
    for axis in map(unpack, axes):
        match axis:
            case [int(start), int(stop), None | 1] if 0 <= start < stop:
                found.append((start, stop))
            case _:
                raise ValueError(f"it has the slice {_short(axis)}, where [start, stop, nil] was expected")
    return tuple(found)


def size_of(chunk: Slices) -> int:
    """Returns the number of elements of a part."""
    return math.prod(stop - start for start, stop in chunk)


def show(chunk: Slices) -> str:
    """Returns a part as one would index it."""
    return f"[{', '.join(f'{start}:{stop}' for start, stop in chunk)}]"


def _short(value: Any) -> str:
    text = f"({', '.join(map(str, value))})" if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def as_map(node: Mapping[str, Any] | Sequence[Any]) -> Mapping[str, Any]:
    """Returns a mapping; of a list, that from "0", "1", ... to its elements."""
    return node if isinstance(node, Mapping) else {str(i): element for i, element in enumerate(node)}
