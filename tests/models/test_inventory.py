"""The parameters of every published network: names, shapes, and how many.

tests/goldens/README.md says where the recorded inventories and the published counts come from.
"""

import json
import math
import pathlib

import jax
import pytest
from flax import nnx

import jmoe
from jmoe.convert.names import flatten, to_reference
from jmoe.models.vit import VisionTransformer, variant
from tests.published import PUBLISHED, num_classes, soft_config, vmoe_config

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"
RECORDED = json.loads((GOLDENS / "vit_shape_inventory.json").read_text())["models"]


# Tracing the others takes seconds each; `tests/analysis/test_cost.py` counts all of them by formula.
QUICK = {"ViT-S/32", "V-MoE-S/32 Last-2", "V-MoE-S/32 Every-2", "V-MoE-B/16 Every-2", "Soft MoE S/16 128E"}


def rows(family):
    """The published networks of a family, as parameters of pytest."""
    return [
        pytest.param(row, id=row["name"], marks=[] if row["name"] in QUICK else pytest.mark.slow)
        for row in PUBLISHED[family]
    ]


def shapes_of(config):
    """{name of the reference: shape} of the parameters, without making them."""
    model = nnx.eval_shape(lambda: VisionTransformer(config, rngs=nnx.Rngs(0)))
    shapes = jax.tree.map(lambda p: p.shape, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    return to_reference(flatten(shapes))


def count(shapes):
    return sum(math.prod(shape) for shape in shapes.values())


def expected_shapes(*, hidden, mlp_dim, heads, layers, patch, tokens, classes, pre_logits, sparse, experts):
    """The same, spelled out from the sizes of a network with a class token."""
    shapes = {
        "embedding/kernel": (patch, patch, 3, hidden),
        "embedding/bias": (hidden,),
        "cls": (1, 1, hidden),
        "Encoder/posembed_input/pos_embedding": (1, tokens, hidden),
        "Encoder/encoder_norm/scale": (hidden,),
        "Encoder/encoder_norm/bias": (hidden,),
        "head/kernel": (hidden, classes),
        "head/bias": (classes,),
    }
    if pre_logits:
        shapes |= {"pre_logits/kernel": (hidden, hidden), "pre_logits/bias": (hidden,)}
    head = hidden // heads
    for i in range(layers):
        block = {f"LayerNorm_{n}/{leaf}": (hidden,) for n in (0, 1) for leaf in ("scale", "bias")}
        for name in ("query", "key", "value"):
            block |= {
                f"SelfAttention/{name}/kernel": (hidden, heads, head),
                f"SelfAttention/{name}/bias": (heads, head),
            }
        block |= {"SelfAttention/out/kernel": (heads, head, hidden), "SelfAttention/out/bias": (hidden,)}
        mlp = {
            "Mlp/Dense_0/kernel": (hidden, mlp_dim),
            "Mlp/Dense_0/bias": (mlp_dim,),
            "Mlp/Dense_1/kernel": (mlp_dim, hidden),
            "Mlp/Dense_1/bias": (hidden,),
        }
        if i in sparse:
            mlp = {f"Moe/{name}": (experts, *shape) for name, shape in mlp.items()}
            mlp["Moe/Router/dense/kernel"] = (hidden, experts)
        shapes |= {f"Encoder/encoderblock_{i}/{name}": shape for name, shape in (block | mlp).items()}
    return shapes


@pytest.mark.parametrize("name", RECORDED)
def test_published_configurations_have_the_recorded_parameters(name):
    recorded = RECORDED[name]
    model, encoder = recorded["model_config"], recorded["model_config"]["encoder"]
    config = variant(
        "S/32" if "s32" in name else "B/16",
        num_classes=model["num_classes"],
        image_size=(recorded["image_size"],) * 2,
        representation_dim=model["representation_size"],
        moe=jmoe.MoEConfig(num_experts=8, layers="last-2" if "s32" in name else "every-2"),
    )
    shapes = {p["name"]: tuple(p["shape"]) for p in recorded["params"]}
    assert shapes_of(config) == shapes
    assert count(shapes) == recorded["total_params"]
    assert config.moe_layers == tuple(encoder["moe"]["layers"])
    assert config.moe.images_per_group * config.tokens == encoder["moe"]["group_size"]
    (published,) = (row for row in PUBLISHED["released"] if row["name"] == name.split()[0])
    assert count(shapes) / 1e6 == pytest.approx(published["params_m"], abs=0.01)
    assert shapes == expected_shapes(  # so that what is spelled out there is right
        hidden=model["hidden_size"],
        mlp_dim=encoder["mlp_dim"],
        heads=encoder["num_heads"],
        layers=encoder["num_layers"],
        patch=model["patch_size"][0],
        tokens=config.tokens,
        classes=model["num_classes"],
        pre_logits=model["representation_size"],
        sparse=encoder["moe"]["layers"],
        experts=encoder["moe"]["num_experts"],
    )


def test_all_published_networks_are_in_the_tables():
    assert len(RECORDED) == len(PUBLISHED["released"]) == 4
    assert len(PUBLISHED["vmoe"]) == 19
    assert len(PUBLISHED["softmoe"]) == 10


@pytest.mark.parametrize("row", rows("vmoe"))
def test_variants_have_the_published_names_shapes_and_number_of_parameters(row):
    shapes, moe = shapes_of(vmoe_config(row)), row["moe"]
    assert shapes == expected_shapes(
        **{key: row[key] for key in ("hidden", "mlp_dim", "heads", "layers", "patch")},
        tokens=row["tokens_224"],
        classes=num_classes(row),
        pre_logits=row["name"] != "V-MoE-15B",
        sparse=moe["layers_zero_based"] if moe else (),
        experts=moe["experts"] if moe else 0,
    )
    assert round(count(shapes) / 1e6, 1) == row["params_m"]


@pytest.mark.parametrize("row", rows("softmoe"))
def test_variants_of_the_soft_family_have_the_published_number_of_parameters(row):
    parameters = count(shapes_of(soft_config(row)))
    digits, unit = row["params"][:-1], {"M": 1e6, "B": 1e9}[row["params"][-1]]
    last = unit / 10 ** len(digits.partition(".")[2])  # one of the last digit printed, which is not always rounded
    assert parameters == pytest.approx(float(digits) * unit, abs=last)
