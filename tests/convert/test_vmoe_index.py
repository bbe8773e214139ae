import pickle

import msgpack
import numpy as np
import pytest

from jmoe.convert.vmoe_index import Index, Leaf, check_disjoint, pack_index, read_index
from jmoe.errors import UserError
from tests.convert import published

WHOLE = [[(0, 2), (0, 3)]]
GOOD = published.leaf((2, 3), "float32", WHOLE, [0])


def written(tmp_path, content):
    path = tmp_path / "x.index"
    path.write_bytes(content if isinstance(content, bytes) else published.index(content, shard_count=2))
    return path


def test_leaves_are_numbered_by_their_names_in_sorted_order(tmp_path):
    scalar = published.leaf((), "bfloat16", [()], [1])
    index = read_index(written(tmp_path, {"b": {"10": GOOD, "2": scalar, "empty": {}}, "a": GOOD}))
    assert [leaf.name for leaf in index.leaves] == ["a", "b/10", "b/2"]
    assert index.num_shards == 2
    assert index.tree["b"]["empty"] == {}
    assert index.tree["b"]["2"] is index.leaves[2]
    assert index.leaves[2].shape == ()
    assert index.leaves[2].dtype.name == "bfloat16"
    assert index.leaves[2].chunks == {(): 1}
    assert index.leaves[0].chunks == {((0, 2), (0, 3)): 0}


def test_what_is_packed_is_what_another_encoder_packs():
    leaf = Leaf(name="a/w", shape=(2, 3), dtype=np.dtype("int8"), chunks={((0, 2), (0, 1)): 1, ((0, 2), (1, 3)): 0})
    parts = [[(0, 2), (0, 1)], [(0, 2), (1, 3)]]
    expected = published.index({"a": {"w": published.leaf((2, 3), "int8", parts, [1, 0])}, "b": {}}, shard_count=2)
    assert pack_index(Index(num_shards=2, tree={"b": {}, "a": {"w": leaf}}, leaves=[leaf])) == expected


def deep(levels):
    tree = GOOD
    for _ in range(levels):
        tree = {"a": tree}
    return tree


BAD = {
    "no MessagePack": (b"\xc1", "is damaged, or no index of a checkpoint: its MessagePack cannot be read"),
    "empty": (b"", "is damaged, or no index of a checkpoint: its MessagePack cannot be read"),
    "ends early": (
        published.index({"w": GOOD})[:-3],
        "is damaged, or no index of a checkpoint: its MessagePack cannot be",
    ),
    "goes on": (
        published.index({"w": GOOD}) + b"a",
        "is damaged, or no index of a checkpoint: its MessagePack cannot be",
    ),
    "pickle": (pickle.dumps({"w": 1}), "looks like a Python pickle, which jmoe never loads, and not like an index."),
    "no map": (
        msgpack.packb([1, 2]),
        "is no index of a checkpoint: it should hold a map with 'index' and 'shard_count'.",
    ),
    "key twice": (
        b"\x82\xa1a\x01\xa1a\x02",
        "is damaged, or no index of a checkpoint: its MessagePack cannot be read (a key is there twice).",
    ),
    "no version": (
        msgpack.packb({"shard_count": 1, "index": {"w": GOOD}}),
        "has no version: it was written before 20220622 and does not say how its arrays are numbered. If it was saved "
        "from nothing but dictionaries, as parameters are, that is by sorted names: convert it with jmoe convert "
        "--unversioned.",
    ),
    "version": (published.index({}, version="20990101"), "has version '20990101'; jmoe reads version '20220622'."),
    "shard count": (published.index({}, shard_count=0), "has shard_count 0, which must be an integer of at least 1."),
    "no leaf": ({"a": {"w": 7}}, "has '7' at 'a/w', where an array should be described."),
    "type": (
        {"a": published.leaf((2,), "int8", [[(0, 2)]], [0], code=42)},
        "has the unknown extension type 42 at 'a'; an",
    ),
    "up": ({"a": {"..": GOOD}}, "in 'a', has the key '..', which cannot be a part of a parameter's name."),
    "absolute": ({"/etc/passwd": GOOD}, "in 'its tree', has the key '/etc/passwd', which cannot be a part of"),
    "no text": ({b"a": GOOD}, "in 'its tree', has the key \"b'a'\", which cannot be a part of"),
    "deep": (deep(100), "has maps within maps more than 64 deep; no model has."),
    "very deep": (deep(400), "has maps within maps more than 64 deep; no model has."),
    "leaf": (
        {"a": msgpack.ExtType(8, b"\x01")},
        "describes 'a' wrongly: it should be [shape and dtype, slices, shards], with",
    ),
    "leaf packing": ({"a": msgpack.ExtType(8, b"\xc1")}, "describes 'a' wrongly: its MessagePack cannot be read"),
    "shards": (
        {"a": published.leaf((2, 3), "int8", WHOLE, [0, 1])},
        "describes 'a' wrongly: it should be [shape and dtype,",
    ),
    "dtype": (
        {"a": published.leaf((2, 3), "float31", WHOLE, [0])},
        "describes 'a' wrongly: its dtype 'float31' is not known.",
    ),
    "object": (
        {"a": published.leaf((2, 3), "object", WHOLE, [0])},
        "describes 'a' wrongly: its dtype 'object' would have to be unpickled, which jmoe never does.",
    ),
    "negative": (
        {"a": published.leaf((-2, 3), "int8", WHOLE, [0])},
        "describes 'a' wrongly: it cannot have the shape (-2, 3).",
    ),
    "elements": (
        {"a": published.leaf((0, 3), "int8", [], [])},
        "describes 'a' wrongly: an array of no elements, (0, 3), cannot",
    ),
    "shape": (
        {"a": published.leaf(("x",), "int8", WHOLE, [0])},
        "describes 'a' wrongly: its shape and dtype cannot be read.",
    ),
    "no such shard": (
        {"a": published.leaf((2, 3), "int8", WHOLE, [2])},
        "describes 'a' wrongly: a part of it is in shard 2, but there are only 2, from 0.",
    ),
    "outside": (
        {"a": published.leaf((2, 2), "int8", WHOLE, [0])},
        "describes 'a' wrongly: its part [0:2, 0:3] is outside of its shape (2, 2).",
    ),
    "axes": (
        {"a": published.leaf((2, 3, 4), "int8", WHOLE, [0])},
        "describes 'a' wrongly: its part [0:2, 0:3] is outside of its shape (2, 3, 4).",
    ),
    "hole": (
        {"a": published.leaf((3, 3), "int8", WHOLE, [0])},
        "describes 'a' wrongly: its 1 parts do not cover its shape (3, 3): there is a hole.",
    ),
    "overlap": ({"a": published.leaf((2, 3), "int8", WHOLE * 2, [0, 1])}, "describes 'a' wrongly: its parts overlap."),
    "no slice": (
        {"a": msgpack.ExtType(8, msgpack.packb([msgpack.packb([[1], "int8", False, {}]), [7], [0]]))},
        "describes 'a' wrongly: a slice of it cannot be read.",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_index_is_refused_in_a_sentence(what, tmp_path):
    content, expected = BAD[what]
    with pytest.raises(UserError) as error:
        read_index(written(tmp_path, content))
    assert str(error.value).startswith(f"{tmp_path / 'x.index'}")
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_parts_are_disjoint_or_named():
    parts = [((0, 2), (0, 2)), ((2, 3), (0, 3)), ((0, 2), (2, 3))]
    leaf = Leaf(name="w", shape=(3, 3), dtype=np.dtype("int8"), chunks=dict.fromkeys(parts, 0))
    check_disjoint(leaf)
    parts[2] = ((1, 3), (1, 2))
    leaf = Leaf(name="w", shape=(3, 3), dtype=np.dtype("int8"), chunks=dict.fromkeys(parts, 0))
    with pytest.raises(ValueError, match=r"its part \[1:3, 1:2\] overlaps another"):
        check_disjoint(leaf)


def test_an_index_without_a_version_is_read_as_one_of_now_on_demand(tmp_path):
    old = msgpack.packb({"shard_count": 2, "index": {"b": GOOD, "a": GOOD}})
    assert [leaf.name for leaf in read_index(written(tmp_path, old), unversioned=True).leaves] == ["a", "b"]
    with pytest.raises(UserError, match="has version '7'; jmoe reads version '20220622'"):
        read_index(written(tmp_path, published.index({}, version="7")), unversioned=True)
