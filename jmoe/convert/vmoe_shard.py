"""A shard of a checkpoint of google-research/vmoe: chunks of arrays, each with where it belongs.

PREFIX.data-nnnnn-of-NNNNN is one MessagePack map with a marker key and, for each array with a part here, its number in
the index (decimal text) to a list of [pieces, where]: `where` is an N-d slice (extension 6, see vmoe_index), `pieces` a
list of one-dimensional arrays (extension 1: [shape, dtype name, bytes]) that make up the chunk in C order.

A shard may be as large as memory, and a value is only known to be wanted once what follows it is read. So a shard is
scanned first, reading the headers of values and skipping the bytes of arrays; those are then read from where they lie
to where they belong. A general decoder of MessagePack would copy each piece two or three times on the way.
"""

import dataclasses
import math
import os
import pathlib
import struct
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import msgpack
import numpy as np

from jmoe.convert.vmoe_index import Slices, dtype_named, is_pickle, pack, pack_slices, show, size_of, unpack_slices
from jmoe.errors import UserError

_MARKER = b"__msgpack_array_chunk_a87ca2__"
_ARRAY, _SLICES = 1, 6  # extension types
MAX_PIECE_BYTES = 2**30

_SHORT = ((0x80, "integer", 0x7F), (0x90, "map", 0x0F), (0xA0, "array", 0x0F), (0xC0, "bytes", 0x1F))
# First byte of a MessagePack value -> what it is, and how many bytes its size (or an integer itself) takes.
_KINDS = {0xC4: ("bytes", 1), 0xC5: ("bytes", 2), 0xC6: ("bytes", 4), 0xD9: ("bytes", 1), 0xDA: ("bytes", 2)}
_KINDS |= {0xDB: ("bytes", 4), 0xC7: ("extension", 1), 0xC8: ("extension", 2), 0xC9: ("extension", 4)}
_KINDS |= {0xDC: ("array", 2), 0xDD: ("array", 4), 0xDE: ("map", 2), 0xDF: ("map", 4)}
_KINDS |= {0xCC: ("integer", 1), 0xCD: ("integer", 2), 0xCE: ("integer", 4), 0xCF: ("integer", 8), 0xC3: ("true", 0)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """A part of an array, and where its bytes lie.

    Attributes:
      leaf: number of the array in the index.
      where: which part.
      dtype: of its elements.
      pieces: (offset in the file, bytes) of what makes it up.
    """

    leaf: int
    where: Slices
    dtype: np.dtype
    pieces: tuple[tuple[int, int], ...]


def scan(path: pathlib.Path) -> Iterator[Chunk]:
    """Yields the chunks of a shard without reading their bytes.

    Raises:
      UserError: the file ends early, or is not a shard.
    """
    try:
        with open(path, "rb") as file:
            yield from _Scanner(file).chunks()
    except ValueError as error:
        raise error if isinstance(error, UserError) else UserError(f"{path} is damaged: {error}.") from None


class _Scanner:
    """Walks through the values of a shard; raises ValueError, in words, where they are not as they should be."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.size = os.fstat(file.fileno()).st_size
        self.offset = 0

    def chunks(self) -> Iterator[Chunk]:
        if is_pickle(self.take(2)):
            raise ValueError("it looks like a Python pickle, which jmoe never loads")
        self.skip(-2)
        marked = False
        for _ in range(self.expect("map", "a map of chunks")):
            key = self.take(self.expect("bytes", "the number of an array"))
            if key == _MARKER:
                self.expect("true", "true after the marker")
                marked = True
            elif key.isdigit() and len(key) < 20:
                for _ in range(self.expect("array", "a list of chunks")):
                    yield self.chunk(int(key))
            else:
                raise ValueError(f"it has the key {key[:40].decode('utf-8', 'replace')!r} instead of an array's number")
        if not marked:
            raise ValueError("it has no marker of a map of chunks")
        if self.offset != self.size:
            raise ValueError(f"it goes on for {self.size - self.offset} bytes after its end")

    def chunk(self, leaf: int) -> Chunk:
        if self.expect("array", "a chunk") != 2:
            raise ValueError(f"a chunk at byte {self.offset} is no pair of pieces and place")
        pieces = [self.piece() for _ in range(self.expect("array", "the pieces of a chunk"))]
        where = unpack_slices(self.take(self.extension(_SLICES)))
        dtypes = {dtype for dtype, _, _ in pieces}
        nbytes = sum(nbytes for _, _, nbytes in pieces)
        if len(dtypes) != 1 or nbytes != size_of(where) * (dtype := dtypes.pop()).itemsize:
            raise ValueError(
                f"a chunk that ends at byte {self.offset} does not have the size of its place {show(where)}"
            )
        return Chunk(leaf=leaf, where=where, dtype=dtype, pieces=tuple((offset, n) for _, offset, n in pieces))

    def piece(self) -> tuple[np.dtype, int, int]:
        """Returns dtype, offset and bytes of a one-dimensional array, and skips it."""
        end = self.extension(_ARRAY) + self.offset
        if self.expect("array", "shape, dtype and bytes") != 3:
            raise ValueError(f"an array at byte {self.offset} is not shape, dtype and bytes")
        axes = self.expect("array", "the shape of an array")
        elements = math.prod(self.expect("integer", "the shape of an array") for _ in range(axes))
        dtype = dtype_named(self.take(self.expect("bytes", "the dtype of an array")))
        nbytes = self.expect("bytes", "the bytes of an array")
        offset = self.offset
        self.skip(nbytes)
        if nbytes != elements * dtype.itemsize or self.offset != end:
            raise ValueError(f"the array at byte {offset} has {nbytes} bytes, which do not fit its shape and dtype")
        return dtype, offset, nbytes

    def extension(self, code: int) -> int:
        """Returns the size of the extension of this type that is next."""
        size = self.expect("extension", f"an extension of type {code}")
        found = self.take(1)[0]
        if found != code:
            raise ValueError(f"it has the unknown extension type {found} at byte {self.offset - 1}, not {code}")
        return size

    def expect(self, kind: str, what: str) -> int:
        """Returns the size of the value of this kind that is next, or its value if it is an integer."""
        start = self.take(1)[0]
        if start < 0xC0:  # the size is in the first byte
            found, size = next((name, start & mask) for below, name, mask in _SHORT if start < below)
        elif 0xD4 <= start <= 0xD8:
            found, size = "extension", 1 << (start - 0xD4)
        else:
            found, width = _KINDS.get(start, ("value", 0))
            size = int.from_bytes(self.take(width), "big")
        if found != kind:
            raise ValueError(f"it has another value at byte {self.offset} where {what} should be")
        return size

    def take(self, count: int) -> bytes:
        """Reads that many bytes."""
        offset = self.offset
        self.skip(count)
        self.file.seek(offset)
        return self.file.read(count)

    def skip(self, count: int) -> None:
        """Goes on without reading."""
        if self.offset + count > self.size:
            raise ValueError(f"it ends at byte {self.size}, in the middle of a value")
        self.offset += count


def read_chunk(file: BinaryIO, chunk: Chunk, array: np.ndarray) -> None:
    """Reads a chunk into its place in the array: directly where that is contiguous, else by way of a copy of the part.

    Raises:
      UserError: the file is shorter than when it was scanned, or a truth value is neither 0 nor 1.
    """
    part = array[(*(slice(start, stop) for start, stop in chunk.where), ...)]
    target = part if part.flags.c_contiguous else np.empty(part.shape, part.dtype)
    octets = target.reshape(-1).view(np.uint8)
    done = 0
    for offset, nbytes in chunk.pieces:
        file.seek(offset)
        if file.readinto(octets[done : done + nbytes].data) != nbytes:  # type: ignore[attr-defined]
            raise UserError(f"{file.name} changed while it was read.")
        done += nbytes
    if target.dtype == bool and octets.max() > 1:
        raise UserError(f"{file.name} is damaged: it has a truth value that is neither 0 nor 1.")
    if target is not part:
        part[...] = target


def write_shard(file: BinaryIO, leaves: Iterable[tuple[int, np.ndarray, list[Slices]]]) -> None:
    """Writes the chunks of a shard: number, array, and which parts of it, for each array with a part here."""
    leaves = list(leaves)
    packer = msgpack.Packer()
    file.write(packer.pack_map_header(len(leaves) + 1) + packer.pack(_MARKER.decode()) + packer.pack(True))
    for leaf, array, parts in leaves:
        file.write(packer.pack(str(leaf)) + packer.pack_array_header(len(parts)))
        for where in parts:
            chunk = np.ascontiguousarray(array[(*(slice(start, stop) for start, stop in where), ...)])
            file.write(packer.pack_array_header(2) + packer.pack_array_header(1) + _array_header(chunk))
            file.write(chunk.reshape(-1).view(np.uint8).data)
            file.write(packer.pack(msgpack.ExtType(_SLICES, pack_slices(where))))


def _array_header(chunk: np.ndarray) -> bytes:
    """What precedes the bytes of a flattened array, so that they need no copy."""
    header = pack([[chunk.size], chunk.dtype.name, None])[:-1]
    header += _sized((0xC4, 0xC5, 0xC6), chunk.nbytes)
    size = len(header) + chunk.nbytes
    fixed = {1: b"\xd4", 2: b"\xd5", 4: b"\xd6", 8: b"\xd7", 16: b"\xd8"}
    return (fixed.get(size) or _sized((0xC7, 0xC8, 0xC9), size)) + bytes([_ARRAY]) + header


def _sized(codes: tuple[int, int, int], size: int) -> bytes:
    """The header of a value whose size takes 1, 2 or 4 bytes, whichever is least."""
    if size < 2**8:
        return struct.pack(">BB", codes[0], size)
    return struct.pack(">BH", codes[1], size) if size < 2**16 else struct.pack(">BI", codes[2], size)
