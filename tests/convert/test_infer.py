import dataclasses
import json
import pathlib

import numpy as np
import pytest

from jmoe import MoEConfig, Soft, TopK
from jmoe.convert.infer import check, count, infer, parameter_shapes
from jmoe.convert.names import to_ours
from jmoe.errors import UserError
from jmoe.models import vit
from jmoe.models.vit import ViTConfig

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
INVENTORY = json.loads((GOLDENS / "vit_shape_inventory.json").read_text())["models"]

TINY = ViTConfig(
    patch_size=3, width=8, depth=2, hidden_dim=10, num_heads=2, num_classes=5, image_size=(15, 15), channels=1
)
SPARSE = dataclasses.replace(TINY, depth=3, moe=MoEConfig(num_experts=6, layers=(1, 2), hidden_dim=7))
SHAPES = parameter_shapes(SPARSE)


def sentence(shapes):
    with pytest.raises(UserError) as error:
        infer(shapes, "x.npz")
    return str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"moe": MoEConfig(num_experts=6, layers=(1,), hidden_dim=7)},
        {"moe": MoEConfig(num_experts=6, layers=(0, 1))},  # no dense block
        {"moe": MoEConfig(num_experts=6, layers=(1,), router=Soft(slots_per_expert=4), images_per_group=1)},
        {"moe": MoEConfig(num_experts=6, layers=(1,), router=TopK(k=1), members=3)},
        {"moe": MoEConfig(num_experts=1, layers=(1,), router=TopK(k=1))},
        {"pool": "mean"},
        {"pool": "map", "qk_norm": True},
        {"pool": "map", "moe": MoEConfig(num_experts=6, layers=(0, 1), hidden_dim=7)},
        {"positions": "sincos2d", "image_size": (225, 225)},
        {"representation_dim": 11, "num_classes": 3},
        {"num_classes": None},
        {"image_size": (3, 3)},  # one patch
    ],
    ids=str,
)
def test_a_model_of_published_options_is_inferred_from_its_shapes(options):
    config = dataclasses.replace(TINY, **options)
    assert infer(parameter_shapes(config), "x.npz").config == config


@pytest.mark.parametrize("name", INVENTORY)
def test_the_published_models_are_inferred(name):
    shapes = to_ours({p["name"]: tuple(p["shape"]) for p in INVENTORY[name]["params"]}, name)
    inferred = infer(shapes, name)
    recorded, size = INVENTORY[name]["model_config"], INVENTORY[name]["image_size"]
    variant = "S/32" if "s32" in name else "B/16"
    options = {"num_classes": recorded["num_classes"], "image_size": (size, size)}
    moe = MoEConfig(layers=tuple(recorded["encoder"]["moe"]["layers"]), num_experts=8)
    expected = vit.variant(variant, moe=moe, **options, representation_dim=recorded["representation_size"])
    assert inferred.config == expected
    assert inferred.assumed == {
        "moe.router": TopK(k=2, capacity_factor=1.05),
        "moe.images_per_group": 8,
        "moe.exchange_dtype": None,
    }
    assert count(shapes) == INVENTORY[name]["total_params"]


def test_what_shapes_do_not_tell_is_said():
    inferred = infer(parameter_shapes(dataclasses.replace(SPARSE, pool="first", positions="none")), "x.npz")
    assert inferred.assumed == {
        "pool": "mean",
        "positions": "sincos2d",
        "image_size": (225, 225),  # the multiple of the patch that is nearest to 224
        "moe.router": TopK(k=2),
        "moe.images_per_group": 8,
        "moe.exchange_dtype": None,
    }
    assert infer(parameter_shapes(TINY), "x.npz").assumed == {}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"patches/kernel": None}, "x.npz has no 'patches/kernel', without which the model cannot be told."),
        (
            {"patches/kernel": (3, 3, 8)},
            "x.npz has 'patches/kernel' of shape (3, 3, 8), where one of 4 axes was expected.",
        ),
        (
            {"blocks/1/moe/gate/kernel": None},
            "x.npz has no 'blocks/1/moe/gate/kernel', without which the model cannot be",
        ),
        (
            {"norm/bias": None, "cls": (1, 1, 9)},
            "'cls' is (1, 1, 9) there and (1, 1, 8) in the model; it lacks 'norm/bias'.",
        ),
        ({"head/extra": (2,)}, "x.npz does not fit the model: the model has no 'head/extra'."),
        ({"blocks/9/norm_1/bias": (8,)}, "the model has no 'blocks/9/norm_1/bias'."),
        (
            {"blocks/2/moe/experts/w_in": (32, 8, 7)},
            "x.npz has 32 experts at 'blocks/2/moe/experts/w_in' (32, 8, 7); the",
        ),
        ({"positions": (1, 24, 8)}, "x.npz is not of square images: A table of 24 positions is no square grid"),
        ({"positions": (1, 25, 8)}, "x.npz has 25 positions, which are no square grid with pool='token'."),
        ({"patches/kernel": (3, 2, 1, 8)}, "'patches/kernel' is (3, 2, 1, 8) there and (3, 3, 1, 8) in the model."),
        (
            {"blocks/0/attention/query/kernel": (8, 3, 4)},
            "x.npz implies a model that cannot be: num_heads=3 does not divide",
        ),
        (
            {"blocks/1/moe/gate/kernel": (8, 4, 2)},
            "x.npz implies a model that cannot be: An ensemble of members=4 wants",
        ),
    ],
)
def test_parameters_that_do_not_fit_are_named(change, expected):
    shapes = {name: shape for name, shape in (SHAPES | change).items() if shape is not None}
    assert expected in sentence(shapes)
    assert sentence(shapes).count("x.npz") == 1


def test_experts_of_another_number_are_counted():
    with pytest.raises(UserError) as error:
        check(SHAPES, dataclasses.replace(SPARSE, moe=dataclasses.replace(SPARSE.moe, num_experts=8)), "ckpt/x")
    assert str(error.value) == (
        "ckpt/x has 6 experts at 'blocks/1/moe/experts/b_in' (6, 7); the model has num_experts=8."
    )


def test_many_differences_are_counted():
    with pytest.raises(UserError, match="'blocks/0/attention/out/kernel' is .* and [0-9]+ more differ"):
        check(SHAPES, dataclasses.replace(SPARSE, width=16), "x")


def test_shapes_are_those_of_the_model():
    assert SHAPES["blocks/1/moe/experts/w_in"] == (6, 8, 7)
    assert SHAPES["blocks/0/mlp/w_in"] == (8, 10)
    assert SHAPES["positions"] == (1, 26, 8)
    assert count({"a": (2, 3), "b": ()}) == 7
    assert all(type(side) is int for shape in SHAPES.values() for side in np.ravel(shape).tolist())
