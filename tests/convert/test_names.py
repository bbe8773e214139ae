import json
import pathlib

import numpy as np
import pytest

from jmoe.convert.names import flatten, nest, our_name, reference_name, to_ours, to_reference
from jmoe.errors import UserError

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"


def recorded_names():
    """Every parameter name of the reference that was recorded, of tiny networks of all kinds and the published ones."""
    names = set()
    for path in GOLDENS.glob("vit_*.npz"):
        with np.load(path, allow_pickle=False) as golden:
            names |= {name.removeprefix("params/") for name in golden.files if name.startswith("params/")}
    for model in json.loads((GOLDENS / "vit_shape_inventory.json").read_text())["models"].values():
        names |= {parameter["name"] for parameter in model["params"]}
    return sorted(names)


def test_every_recorded_name_has_one_of_ours_and_comes_back():
    names = recorded_names()
    assert len(names) > 200
    ours = [our_name(name) for name in names]
    assert None not in ours
    assert len(set(ours)) == len(names)
    assert [reference_name(name) for name in ours] == names


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("Encoder/encoderblock_11/Moe/Mlp/Dense_1/kernel", "blocks/11/moe/experts/w_out"),
        ("Encoder/encoderblock_0/SelfAttention/key_ln/scale", "blocks/0/attention/key_ln/scale"),
        ("Encoder/encoderblock_5/Moe/Router/dense/kernel", "blocks/5/moe/gate/kernel"),
        ("Encoder/encoder_norm/bias", "norm/bias"),
        ("MapHead/Mlp/Dense_0/bias", "pool/mlp/b_in"),
        ("cls", "cls"),
    ],
)
def test_names_by_hand(theirs, ours):
    assert our_name(theirs) == ours
    assert reference_name(ours) == theirs


@pytest.mark.parametrize(
    "name",
    ["", "kernel", "cls/x", "Encoder/encoderblock_01/Mlp/Dense_0/bias", "../head/bias", "head/bias\n", "head/a/b"],
)
def test_other_names_have_none(name):
    assert our_name(name) is None


def test_what_does_not_match_is_listed_by_name():
    with pytest.raises(UserError) as error:
        to_ours({"cls": 0, "conv_root/kernel": 1, "opt/step": 2}, "a.npz")
    assert str(error.value) == (
        "a.npz has arrays that are no parameters of a vision transformer of jmoe: 'conv_root/kernel', 'opt/step'."
    )
    with pytest.raises(UserError, match="The published layout has no place for the parameters: 'blocks/0/bank'."):
        to_reference({"cls": 0, "blocks/0/bank": 1})
    with pytest.raises(UserError, match=r"'x29' and 2 more\.$"):
        to_ours({f"x{i}": i for i in range(32)}, "a.npz")


def test_nesting_is_undone_by_flattening():
    flat = {"a/b/c": 1, "a/d": 2, "e": 3}
    assert nest(flat) == {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
    assert flatten(nest(flat)) == flat
    assert flatten({"blocks": {5: {"w": 1}}, "empty": {}}) == {"blocks/5/w": 1}
