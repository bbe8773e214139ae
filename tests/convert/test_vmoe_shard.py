import pickle

import msgpack
import numpy as np
import pytest

from jmoe.convert.vmoe_shard import read_chunk, scan, write_shard
from jmoe.errors import UserError
from tests.convert import published

F32 = np.arange(6, dtype=np.float32)
PLACE = ((0, 2), (0, 3))
GOOD = {0: [published.chunk([F32], PLACE)]}


def one(array_or_piece, slices=PLACE, **options):
    return {0: [published.chunk([array_or_piece], slices, **options)]}


def scanned(tmp_path, content):
    path = tmp_path / "x"
    path.write_bytes(content if isinstance(content, bytes) else published.shard(content))
    return path, list(scan(path))


def test_a_shard_is_scanned_without_its_bytes_and_read_where_they_belong(tmp_path):
    pieces = [F32[:4], F32[4:]]
    path, (scalar, chunk) = scanned(
        tmp_path, {7: [published.chunk([np.ones(1, np.int8)], ())], 12: [published.chunk(pieces, ((1, 3), (2, 5)))]}
    )
    assert (scalar.leaf, scalar.where, scalar.dtype) == (7, (), np.int8)
    assert (chunk.leaf, chunk.where, chunk.dtype) == (12, ((1, 3), (2, 5)), np.float32)
    assert [nbytes for _, nbytes in chunk.pieces] == [16, 8]
    array, number = np.zeros((4, 5), np.float32), np.zeros((), np.int8)
    with path.open("rb") as file:
        read_chunk(file, chunk, array)
        read_chunk(file, scalar, number)
    expected = np.zeros((4, 5))
    expected[1:3, 2:5] = [[0, 1, 2], [3, 4, 5]]
    np.testing.assert_array_equal(array, expected)
    assert number == 1


@pytest.mark.parametrize("size", [1, 3, 40, 60, 250, 17_000, 70_000])  # sizes around those that take a longer header
def test_what_is_written_is_what_another_encoder_writes(tmp_path, size):
    arrays = {0: np.arange(size, dtype=np.uint8).reshape(1, size), 10: np.full((2, 5), 0.5, np.float16)}
    parts = {0: [((0, 1), (0, size))], 10: [((0, 2), (0, 3)), ((0, 2), (3, 5))]}
    with (tmp_path / "x").open("wb") as file:
        write_shard(file, [(i, arrays[i], parts[i]) for i in arrays])
    expected = {
        i: [published.chunk([arrays[i][:, a:b].ravel()], (rows, (a, b))) for rows, (a, b) in parts[i]] for i in arrays
    }
    assert (tmp_path / "x").read_bytes() == published.shard(expected)


BAD = {
    "ends early": (published.shard(GOOD)[:-2], "it ends at byte 92, in the middle of a value"),
    "goes on": (published.shard(GOOD) + b"abc", "it goes on for 3 bytes after its end"),
    "empty": (b"", "it ends at byte 0, in the middle of a value"),
    "pickle": (pickle.dumps({"w": 1}), "it looks like a Python pickle, which jmoe never loads"),
    "no map": (b"no map at all", "it has another value at byte 1 where a map of chunks should be"),
    "no marker": (msgpack.packb({"0": GOOD[0]}), "it has no marker of a map of chunks"),
    "key": ({"w": GOOD[0]}, "it has the key 'w' instead of an array's number"),
    "no list": (
        msgpack.packb({published.MARKER: True, "0": 7}),
        "it has another value at byte 36 where a list of chunks",
    ),
    "no pair": ({0: [[1, 2, 3]]}, "a chunk at byte 37 is no pair of pieces and place"),
    "short": (one(F32[:5]), "a chunk that ends at byte 90 does not have the size of its place [0:2, 0:3]"),
    "two dtypes": (
        {0: [published.chunk([F32[:3], np.ones(3, np.int32)], PLACE)]},
        "a chunk that ends at byte 108 does not have the size of its place [0:2, 0:3]",
    ),
    "no pieces": (
        {0: [published.chunk([], PLACE)]},
        "a chunk that ends at byte 54 does not have the size of its place",
    ),
    "piece size": (
        one(published.piece(F32, shape=[5])),
        "the array at byte 54 has 24 bytes, which do not fit its shape",
    ),
    "piece type": (one(published.piece(F32, code=3)), "it has the unknown extension type 3 at byte 40, not 1"),
    "place type": (one(F32, code=9), "it has the unknown extension type 9 at byte 80, not 6"),
    "no place": ({0: [[[published.piece(F32)], msgpack.ExtType(6, b"abc")]]}, "its MessagePack cannot be read"),
    "object": (
        one(published.piece(F32, dtype="object")),
        "its dtype 'object' would have to be unpickled, which jmoe never",
    ),
    "dtype": (one(published.piece(F32, dtype="float23")), "its dtype 'float23' is not known"),
    "step": (one(F32, ((0, 4, 2), (0, 3))), "it has the slice (0, 4, 2), where [start, stop, nil] was expected"),
    "backwards": (one(F32, ((2, 0), (0, 3))), "it has the slice (2, 0, None), where [start, stop, nil] was expected"),
    "huge": (
        published.shard({})[:-1].replace(b"\x81", b"\x82") + b"\xc3\xa10\xdd\xff\xff\xff\xff\x92\x91",
        "in the middle of a value",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_shard_is_refused_in_a_sentence(what, tmp_path):
    content, expected = BAD[what]
    with pytest.raises(UserError) as error:
        scanned(tmp_path, content)
    assert str(error.value).startswith(f"{tmp_path / 'x'} is damaged: ")
    assert expected in str(error.value)


def test_a_file_that_shrinks_while_it_is_read_is_found(tmp_path):
    path, (chunk,) = scanned(tmp_path, GOOD)
    path.write_bytes(path.read_bytes()[:60])
    with path.open("rb") as file, pytest.raises(UserError, match="changed while it was read"):
        read_chunk(file, chunk, np.zeros((2, 3), np.float32))
