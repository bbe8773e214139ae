"""Checkpoint files of the reference, ours, and damaged ones. `published` spells the layout out a second time."""

import json
import pathlib
import re
import shutil
import tracemalloc

import jax.numpy as jnp
import msgpack
import numpy as np
import pytest

from jmoe.convert import vmoe_format
from jmoe.convert.names import flatten
from jmoe.convert.vmoe_format import read, read_notes, write
from jmoe.errors import UserError
from tests.convert import published

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
CASES = ["params_1shard", "params_3shards", "params_sharded", "misc_dtypes"]


def recorded(case):
    """The config of a recorded checkpoint and its arrays by name; bfloat16 as bits."""
    with np.load(GOLDENS / f"checkpoint_{case}.npz", allow_pickle=False) as golden:
        arrays = {name.split("/", 1)[1]: golden[name] for name in golden.files if name != "config"}
        return json.loads(str(golden["config"])), arrays


def bits(array):
    array = np.asarray(array)
    return array.shape, array.dtype.name, array.tobytes()


def same(a, b):
    a, b = flatten(a), flatten(b)
    return a.keys() == b.keys() and all(bits(a[name]) == bits(b[name]) for name in a)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def sentence(prefix):
    with pytest.raises(UserError) as error:
        read(prefix)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{pathlib.Path(prefix).parent}/", "")


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_the_reference_is_read_bit_for_bit(case):
    _, expected = recorded(case)
    tree = read(GOLDENS / f"checkpoint_{case}")
    found = flatten(tree)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        is_bfloat16 = name.endswith("bf16")
        assert found[name].dtype == (jnp.bfloat16 if is_bfloat16 else array.dtype)
        assert bits(found[name].view(np.uint16) if is_bfloat16 else found[name]) == bits(array), name
    if case == "misc_dtypes":
        assert tree["empty"] == {}
        assert tree["tuple"]["1"] == {}
        assert list(tree["list"]) == ["0", "1"]


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_what_the_reference_writes(case, tmp_path):
    config, _ = recorded(case)
    tree = read(GOLDENS / f"checkpoint_{case}")
    write(tmp_path / f"checkpoint_{case}", tree, num_shards=config["num_shards"])
    again = tmp_path / f"checkpoint_{case}.index"  # with the ending, as one copies it from a listing
    assert same(read(again), tree)
    assert read(again).keys() == tree.keys()
    if case == "params_sharded":  # its chunks follow the devices that the reference's arrays were on
        return
    for name, content in files(tmp_path).items():
        if name.endswith(".jmoe"):
            continue
        expected = (GOLDENS / name).read_bytes()
        if name == "checkpoint_misc_dtypes.index":  # it says which scalar was of weak type, which NumPy does not know
            expected = expected.replace(b"float32\xc3", b"float32\xc2")
        assert content == expected, name


def test_lists_scalars_and_empty_nodes_are_kept(tmp_path):
    tree = {"b": [np.arange(2), (np.float32(3.5), {})], "a": jnp.ones((3, 2), jnp.bfloat16), "empty": {}, "n": np.True_}
    write(tmp_path / "x", tree)
    found = read(tmp_path / "x")
    assert found["empty"] == {}
    assert found["b"]["1"]["1"] == {}
    assert bits(found["b"]["0"]) == bits(np.arange(2))
    assert bits(found["b"]["1"]["0"]) == bits(np.float32(3.5))
    assert bits(found["a"]) == bits(tree["a"])
    assert bits(found["n"]) == bits(np.True_)


@pytest.mark.parametrize("most", [4, 8, 20, 60, 100, 10_000])
def test_chunks_are_no_larger_than_allowed_and_shards_fill_evenly(most, tmp_path):
    rng = np.random.default_rng(0)
    tree = {"kernel": rng.normal(size=(5, 3, 7)).astype(np.float32), "bias": np.arange(11, dtype=">i4")}
    write(tmp_path / "x", tree, num_shards=3, max_chunk_bytes=most)
    found = read(tmp_path / "x")
    assert same(found, {"kernel": tree["kernel"], "bias": np.arange(11, dtype=np.int32)})
    sizes = [[], [], []]
    for i, chunks in enumerate(sizes):
        content = msgpack.unpackb((tmp_path / f"x.data-{i:05d}-of-00003").read_bytes())
        for number, values in content.items():
            for pieces, _ in values if number != published.MARKER else []:
                chunks += [len(msgpack.unpackb(piece.data)[2]) for piece in pieces]
    assert max(map(max, filter(None, sizes))) <= most
    if most < 1000:
        assert max(map(sum, sizes)) - min(map(sum, sizes)) <= most


def test_what_another_encoder_wrote_is_read(tmp_path):
    a, b = np.arange(24, dtype=np.float32).reshape(2, 3, 4), np.arange(3, dtype=np.int32)
    parts = [[(0, 2), (0, 3), (0, 1)], [(0, 2), (0, 3), (1, 4)]]
    tree = {
        "z": published.leaf((3,), "int32", [[(0, 3)]], [1]),
        "m": {"w": published.leaf(a.shape, "float32", parts, [1, 0])},
    }
    first = {0: [published.chunk([a[:, :, 1:].ravel()[:5], a[:, :, 1:].ravel()[5:]], parts[1])]}
    second = {1: [published.chunk([b], [(0, 3)])], 0: [published.chunk([a[:, :, :1].ravel()], parts[0])]}
    found = read(published.save(tmp_path, tree, first, second))
    assert same(found, {"m": {"w": a}, "z": b})


@pytest.mark.parametrize("contiguous", [True, False])
def test_memory_stays_under_the_result_and_the_largest_array(tmp_path, contiguous):
    largest, others = np.ones((4, 2**18), np.float32), [np.full((2**18,), i, np.float32) for i in range(8)]
    if contiguous:
        write(tmp_path / "x", {"w": largest, "others": others}, max_chunk_bytes=2**22)
    else:  # one chunk is no contiguous part of the array, so that it takes a copy
        parts = [[(0, 4), (0, 1)], [(0, 4), (1, 2**18)]]
        tree = {"w": published.leaf(largest.shape, "float32", parts, [0, 0])}
        tree |= {f"a{i}": published.leaf(a.shape, "float32", [[(0, a.size)]], [0]) for i, a in enumerate(others)}
        content = {i: [published.chunk([a], [(0, a.size)])] for i, a in enumerate(others)}
        content[8] = [
            published.chunk([np.ones(int(np.prod([b - a for a, b in part])), np.float32)], part) for part in parts
        ]
        published.save(tmp_path, tree, content)
    result = largest.nbytes + sum(a.nbytes for a in others)
    tracemalloc.start()
    try:
        found = read(tmp_path / "x")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert np.array_equal(found["w"], largest)
    assert found["w"].ctypes.data % 64 == 0  # as JAX wants it, to take it without a copy
    assert peak < result + (0 if contiguous else largest.nbytes) + 2**20


def test_writing_takes_no_copy(tmp_path):
    tree = {f"a{i}": np.ones((4, 2**18), np.float32) for i in range(3)}
    tracemalloc.start()
    try:
        write(tmp_path / "x", tree, num_shards=2)
        assert tracemalloc.get_traced_memory()[1] < 3 * 2**20  # a packer has a buffer of its own; an array has 4 MiB
    finally:
        tracemalloc.stop()


@pytest.fixture
def small(tmp_path):
    """A checkpoint of three shards that jmoe wrote."""
    tree = {
        "a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(3, np.float32)},
        "b": np.ones(2),
    }
    write(tmp_path / "x", tree, num_shards=3, notes={"model": "ViT"})
    return tmp_path / "x"


def test_the_trainer_of_the_reference_finds_the_step_in_the_name_of_every_file(tmp_path):
    write(tmp_path / "ckpt_300", {"a": np.ones(3)}, num_shards=2)
    names = sorted(files(tmp_path))
    assert len(names) == 4
    assert all(re.fullmatch(r"ckpt_300\.[a-zA-Z]+(-[0-9]+-of-[0-9]+)?", name) for name in names)


def test_notes_are_kept(small):
    assert read_notes(small) == {"model": "ViT"}
    assert read_notes(GOLDENS / "checkpoint_misc_dtypes") == {}


def test_without_checksums_it_is_a_checkpoint_like_any_other(small):
    tree = read(small)
    small.with_name("x.jmoe").unlink()
    assert same(read(small), tree)


def test_nothing_is_replaced_unless_asked_for(small):
    before = files(small.parent)
    with pytest.raises(
        UserError, match=r"There is a checkpoint .*x already \(x\.data-00000-of-00003\)\. Choose another"
    ):
        write(small, {"c": np.ones(3)})
    assert files(small.parent) == before
    write(small, {"c": np.ones(3)}, overwrite=True)
    assert sorted(files(small.parent)) == ["x.data-00000-of-00001", "x.index", "x.jmoe"]
    assert same(read(small), {"c": np.ones(3)})


@pytest.mark.parametrize("fails_at", range(1, 6))
def test_a_write_that_fails_leaves_what_was_there(small, monkeypatch, fails_at):
    before, calls, flush = files(small.parent), [], vmoe_format.os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == fails_at:
            raise OSError(28, "No space left on device")
        flush(descriptor)

    monkeypatch.setattr(vmoe_format.os, "fsync", full)
    if fails_at == 5:  # two shards, index and checksums: all are written
        return write(small, {"c": np.ones(3)}, num_shards=2, overwrite=True)
    with pytest.raises(UserError, match=r"The checkpoint .*x cannot be written: No space left on device\."):
        write(small, {"c": np.ones(3)}, num_shards=2, overwrite=True)
    assert files(small.parent) == before


def test_what_the_layout_cannot_store_is_named(tmp_path):
    for array, what in (
        (np.zeros((0, 3), np.float32), r"float32 \(0, 3\)"),
        (np.array(["x"]), "<U1"),
        (np.array([{}]), "object"),
    ):
        with pytest.raises(UserError, match=rf"The array 'a/b' is {what}.*, which the published layout cannot store\."):
            write(tmp_path / "x", {"a": {"b": array}})
    for key in ("..", "a/b", "", "a\0b"):
        with pytest.raises(UserError, match="cannot be a part of a parameter's name"):
            write(tmp_path / "x", {"a": {key: np.ones(2)}})
    for options in ({"num_shards": 0}, {"max_chunk_bytes": 0}, {"max_chunk_bytes": 2**31}):
        with pytest.raises(UserError, match="A checkpoint has 1 to 99,999 shards, and chunks of 1 to 1073741824 bytes"):
            write(tmp_path / "x", {"a": np.ones(2)}, **options)
    with pytest.raises(UserError, match="is no prefix of a checkpoint"):
        write(f"{tmp_path}/", {"a": np.ones(2)})
    assert files(tmp_path) == {}


# Bad input: each a sentence with the file, and the array where one is concerned.


def test_a_missing_file_is_named(small):
    for path in list(small.parent.iterdir()):
        content = path.read_bytes()
        path.unlink()
        if not path.name.endswith(".jmoe"):
            assert (
                sentence(small)
                == f"{path.name} is missing: x.jmoe lists it. Bring all files of the checkpoint together."
            )
        path.write_bytes(content)
    small.with_name("x.jmoe").unlink()
    small.with_name("x.data-00002-of-00003").unlink()
    assert sentence(small) == (
        "x.data-00002-of-00003 is missing: x.index says that there are 3 shards. Bring all files of "
        "the checkpoint together."
    )
    assert (
        sentence(small.with_name("y"))
        == "There is no file y.index. Give the PREFIX of PREFIX.index, without its ending."
    )


def test_a_changed_file_is_named(small):
    for path in list(small.parent.iterdir()):
        content = path.read_bytes()
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        found = sentence(small)
        if path.name == "x.jmoe":
            assert found == "x.jmoe, with the checksums of the checkpoint, is damaged: it is not what was written."
        else:
            assert found.startswith(f"{path.name} is not what was written: its checksum differs from that in x.jmoe.")
        path.write_bytes(content)


LEAF = published.leaf((2, 3), "float32", [[(0, 2), (0, 3)]], [0])
CHUNK = published.chunk([np.ones(6, np.float32)], [(0, 2), (0, 3)])
SHARD = {0: [CHUNK]}


def one(array_or_piece, slices=((0, 2), (0, 3)), **options):
    return {0: [published.chunk([array_or_piece], slices, **options)]}


F32 = np.ones(6, np.float32)
DISAGREEING = {
    "unknown array": ({0: [CHUNK], 1: [CHUNK]}, "has a chunk of array 1; the index has only 1, from 0."),
    "missing": ({}, "lacks a part of 'w/kernel' that its index says it has."),
    "twice": ({0: [CHUNK, CHUNK]}, "has a part of 'w/kernel' that its index does not expect there, or has it twice."),
    "elsewhere": (
        one(F32, ((0, 3), (0, 2))),
        "has a part of 'w/kernel' that its index does not expect there, or has it twice.",
    ),
    "another dtype": (one(np.ones(6, np.int32)), "has int32 in 'w/kernel'; the index says float32."),
    "damaged": (b"", "is damaged: it ends at byte 0, in the middle of a value."),
}


@pytest.mark.parametrize("what", DISAGREEING)
def test_a_shard_that_disagrees_with_the_index_is_named(what, tmp_path):
    content, expected = DISAGREEING[what]
    assert sentence(published.save(tmp_path, {"w": {"kernel": LEAF}}, content)) == f"x.data-00000-of-00001 {expected}"


def test_a_truth_value_of_two_is_no_truth_value(tmp_path):
    leaf = published.leaf((3,), "bool", [[(0, 3)]], [0])
    wrong = one(published.piece(np.array([0, 1, 2], np.uint8), dtype="bool"), ((0, 3),))
    assert sentence(published.save(tmp_path, {"w": leaf}, wrong)).endswith(
        "x.data-00000-of-00001 is damaged: it has a truth value that is neither 0 nor 1."
    )


def test_absurd_sizes_are_refused_before_anything_is_allocated(tmp_path):
    side = 2**40
    leaf = published.leaf((side, 3), "float32", [[(0, side), (0, 3)]], [0])
    assert sentence(published.save(tmp_path, {"a": LEAF, "w": leaf}, SHARD)) == (
        "x.data-00000-of-00001 lacks a part of 'w' that its index says it has."
    )
    assert sentence(published.save(tmp_path, {"w": LEAF}, SHARD, shard_count=2**60)) == (
        f"x.data-00000-of-{2**60} is missing: x.index says that there are {2**60} shards. "
        "There is x.data-00000-of-00001. Bring all files of the checkpoint together."
    )


def test_parts_that_overlap_and_leave_a_hole_are_found(tmp_path):
    parts = [[(0, 2), (0, 2)], [(1, 3), (1, 3)], [(0, 1), (2, 3)]]  # nine elements of nine, one of them twice
    tree = {"w": published.leaf((3, 3), "float32", parts, [0, 0, 0])}
    content = {0: [published.chunk([np.ones(4, np.float32)], part) for part in parts[:2]]}
    content[0].append(published.chunk([np.ones(1, np.float32)], parts[2]))
    assert sentence(published.save(tmp_path, tree, content)) == (
        "x.index describes 'w' wrongly: its part [1:3, 1:3] overlaps another."
    )


def mutations(contents, count, seed):
    """Flips a bit or a byte, or cuts off the end, of one of the files; yields its name and its new content."""
    rng = np.random.default_rng(seed)
    names = sorted(contents)
    for _ in range(count):
        name = names[rng.integers(len(names))]
        content = bytearray(contents[name])
        position = int(rng.integers(len(content)))
        match rng.integers(4):
            case 0:
                del content[position:]
            case 1:
                content[position] = int(rng.integers(256))
            case _:
                content[position] ^= 1 << int(rng.integers(8))
        yield name, bytes(content)


def survives(folder, prefix, name, content):
    """Writes a damaged file and reads: the tree, or None if it was refused in one sentence that names a file."""
    path, original = folder / name, (folder / name).read_bytes()
    path.write_bytes(content)
    try:
        return read(prefix)
    except UserError as error:
        message = str(error)
    finally:
        path.write_bytes(original)
    assert str(prefix) in message
    assert "\n" not in message
    return None


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_damage_goes_unnoticed_where_there_are_checksums(count, tmp_path):
    tree = read(GOLDENS / "checkpoint_params_sharded")
    write(tmp_path / "x", tree, num_shards=2, max_chunk_bytes=1500)
    refused = 0
    for name, content in mutations(files(tmp_path), count, seed=1):
        found = survives(tmp_path, tmp_path / "x", name, content)
        refused += found is None
        assert found is None or same(found, tree)
    assert refused > 0.9 * count


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_damage_without_checksums_is_never_a_crash(count, tmp_path):
    for path in GOLDENS.glob("checkpoint_misc_dtypes.*-*"):
        shutil.copy(path, tmp_path)
    shutil.copy(GOLDENS / "checkpoint_misc_dtypes.index", tmp_path)
    tree, refused = flatten(read(tmp_path / "checkpoint_misc_dtypes")), 0
    for name, content in mutations(files(tmp_path), count, seed=2):
        found = survives(tmp_path, tmp_path / "checkpoint_misc_dtypes", name, content)
        refused += found is None
        # What is read has the shape and dtype of its index, whatever its values; most damage here is to structure.
        for name, array in flatten(found or {}).items():
            assert name not in tree or array.nbytes == tree[name].nbytes
    assert refused > 0.3 * count
