"""Checkpoints in the published layout, spelled out with msgpack alone: an encoder that owes nothing to jmoe's."""

import msgpack

MARKER = "__msgpack_array_chunk_a87ca2__"
VERSION = "20220622"


def place(slices):
    """The payload of an N-d slice, of (start, stop) or (start, stop, step)."""
    return msgpack.packb([msgpack.packb([*axis, *[None] * (3 - len(axis))]) for axis in slices])


def leaf(shape, dtype, slices, shards, code=8):
    """A leaf of an index."""
    described = msgpack.packb([list(shape), dtype, False, {}])
    return msgpack.ExtType(code, msgpack.packb([described, [place(part) for part in slices], list(shards)]))


def piece(array, code=1, shape=None, dtype=None):
    """A flat array."""
    shape = [array.size] if shape is None else shape
    return msgpack.ExtType(code, msgpack.packb([shape, dtype or array.dtype.name, array.tobytes()]))


def chunk(pieces, slices, code=6):
    """A value of a shard's list: pieces (arrays, or what `piece` made) and where they belong."""
    pieces = [p if isinstance(p, msgpack.ExtType) else piece(p) for p in pieces]
    return [pieces, msgpack.ExtType(code, place(slices))]


def index(tree, shard_count=1, **more):
    """The content of an index file."""
    return msgpack.packb({"shard_count": shard_count, "index": tree, "version": VERSION} | more)


def shard(chunks):
    """The content of a shard, of {number: list of chunks}."""
    return msgpack.packb({MARKER: True} | {str(number): value for number, value in chunks.items()})


def save(folder, tree, *shards, **more):
    """Writes folder/x.index and the shards, given as bytes or as {number: list of chunks}; returns the prefix."""
    (folder / "x.index").write_bytes(index(tree, **{"shard_count": len(shards)} | more))
    for i, content in enumerate(shards):
        content = content if isinstance(content, bytes) else shard(content)
        (folder / f"x.data-{i:05d}-of-{len(shards):05d}").write_bytes(content)
    return folder / "x"
