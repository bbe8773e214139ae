import dataclasses
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jmoe
from jmoe.models.vit import VisionTransformer, ViTConfig, place, variant
from jmoe.nn.patches import sincos2d
from tests.goldens.replays.networks import to_ours
from tests.tolerance import tolerance

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"
TINY = ViTConfig(
    patch_size=4,
    width=24,
    depth=2,
    hidden_dim=40,
    num_heads=2,
    num_classes=7,
    image_size=(8, 12),
    moe=jmoe.MoEConfig(num_experts=5, router=jmoe.TopK(k=2, capacity_factor=0.5), layers=(1,)),
)
B = 5  # images in every test, so that each model is compiled once


def build(config):
    """A model with parameters that are not special, such as zero, drawn without compiling its initialisation."""
    draw = np.random.default_rng(0)
    graph, state = nnx.split(nnx.eval_shape(lambda: VisionTransformer(config, rngs=nnx.Rngs(0))))
    state = jax.tree.map(lambda p: jnp.asarray(draw.normal(scale=0.3, size=p.shape), p.dtype), state)
    return nnx.merge(graph, state)


def some_images(seed=1):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, *TINY.image_size, 3)), jnp.float32)


@nnx.jit
def apply(model, images, mask=None, key=None):
    return model(images, mask=mask, key=key)


# Initial values


@pytest.mark.parametrize("which", ["token", "map", "gap"])
def test_initial_values_are_distributed_as_recorded(which):
    models = json.loads((GOLDENS / "vit_init_stats.json").read_text())["models"]
    recorded = next(value for key, value in models.items() if key.startswith(which))
    model, encoder = recorded["model_config"], recorded["model_config"]["encoder"]
    config = ViTConfig(
        patch_size=8,
        width=128,
        depth=2,
        hidden_dim=256,
        num_heads=4,
        num_classes=100,
        image_size=(recorded["image_size"],) * 2,
        pool={"gap": "mean"}.get(which, which),
        representation_dim=model.get("representation_size"),
        head_bias=model.get("head_bias_init", 0.0),
        head_zero=model.get("head_kernel_zero_init", True),
        qk_norm=encoder.get("attention_qk_norm", False),
        moe=jmoe.MoEConfig(
            num_experts=8,
            layers=(1,),
            router=jmoe.Soft(slots_per_expert=2) if which == "gap" else jmoe.TopK(),
            expert_init="independent" if encoder["moe"].get("split_rngs", False) else "identical",
        ),
    )
    key = jax.random.key(0, impl="unsafe_rbg")  # a generator that compiles in no time
    values = jax.jit(lambda: nnx.to_pure_dict(nnx.state(VisionTransformer(config, rngs=nnx.Rngs(key)), nnx.Param)))()
    expected = to_ours({p["name"]: Recorded(p) for p in recorded["params"]})
    assert jax.tree.structure(values) == jax.tree.structure(expected)
    jax.tree_util.tree_map_with_path(check_statistics, values, expected)


class Recorded(dict):
    """The recorded statistics of one parameter; a leaf for jax.tree, unlike a dict."""


def check_statistics(path, values, recorded):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    values = np.asarray(values, np.float64)
    assert values.shape == tuple(recorded["shape"]), name
    independent = values.size
    if "all_experts_equal_at_init" in recorded:
        identical = bool((values == values[:1]).all())
        assert identical == recorded["all_experts_equal_at_init"], name
        independent //= len(values) if identical else 1
    if recorded["std"] == 0:
        np.testing.assert_allclose(values, recorded["mean"], rtol=1e-6, err_msg=name)
        return
    # Both sides are samples: five standard errors of a difference. 1 / (2n) is the relative variance of a normal
    # sample's std, and more than that of the other distributions here.
    std = recorded["std"]
    assert abs(values.mean() - recorded["mean"]) < 5 * std * math.sqrt(2 / independent), name
    assert abs(values.std() / std - 1) < 5 * math.sqrt(1 / independent), name
    if not (re.search(r"/b_(in|out)$", name) or name == "positions"):  # all but these, which are normal, are bounded
        np.testing.assert_allclose(
            np.abs(values).max(), max(recorded["max"], -recorded["min"]), rtol=0.05, err_msg=name
        )


def test_the_head_starts_at_the_prior_of_a_class():
    config = dataclasses.replace(TINY, depth=1, num_classes=4, pool="first", positions="none", moe=None)
    head = nnx.jit(lambda: VisionTransformer(config, rngs=nnx.Rngs(0)).head)()
    np.testing.assert_allclose(head.bias, np.full(4, -math.log(4)), rtol=1e-6)
    np.testing.assert_array_equal(head.kernel, np.zeros((24, 4)))


# Placement


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [
        ("last-2", 8, (5, 7)),  # S/32: the last two odd blocks, not the last two
        ("last-2", 24, (21, 23)),  # L/16
        ("last-5", 32, (23, 25, 27, 29, 31)),  # H/14
        ("last-2", 7, (3, 5)),
        ("every-2", 8, (1, 3, 5, 7)),
        ("every-3", 8, (2, 5)),
        ("every-1", 3, (0, 1, 2)),
        ((4, 0, 4), 5, (0, 4)),
    ],
)
def test_sparse_blocks_are_placed_as_published(layers, depth, expected):
    assert place(layers, depth) == expected


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("last2", "layers='last2' must be 'last-n', 'every-n' or a tuple of blocks, such as 'last-2' or (5, 7)."),
        ("last-0", "layers='last-0' must be 'last-n', 'every-n' or a tuple of blocks, such as 'last-2' or (5, 7)."),
        ("last-4", "layers='last-4' asks for blocks that 6 blocks do not have (3 are odd)."),
        ("every-7", "layers='every-7' asks for blocks that 6 blocks do not have (3 are odd)."),
        ((5, 6), "layers=(5, 6) must name blocks from 0 to 5, at least one."),
        ((-1,), "layers=(-1,) must name blocks from 0 to 5, at least one."),
        ((), "layers=() must name blocks from 0 to 5, at least one."),
    ],
)
def test_a_placement_that_makes_no_sense_is_refused(layers, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        place(layers, 6)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):  # already where it is written
        dataclasses.replace(TINY, depth=6, moe=jmoe.MoEConfig(layers=layers))


def test_only_the_placed_blocks_are_sparse():
    output = apply(build(TINY), some_images())
    assert set(output.routing) == set(output.metrics) == {"1"}
    dense = apply(build(dataclasses.replace(TINY, moe=None)), some_images())
    assert dense.routing == dense.metrics == dense.losses == {}


# Behaviour


@nnx.jit
def loss_and_gradients(model, images, key):
    def loss(model):
        output = model(images, key=key)
        return jnp.sum(jnp.square(output.logits)) + sum(output.losses.values()), output

    (_, output), gradients = nnx.value_and_grad(loss, has_aux=True)(model)
    return output, nnx.to_pure_dict(gradients)


def test_remat_changes_neither_values_nor_gradients():
    images, key = some_images(), jax.random.key(2)
    config = dataclasses.replace(TINY, dropout=0.3)
    plain = loss_and_gradients(build(config), images, key)
    again = loss_and_gradients(build(dataclasses.replace(config, remat=True)), images, key)
    # It is the same arithmetic, though not compiled alike.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance(jnp.float32, np.abs(a).max())), again, plain)


def test_bfloat16_computes_nearly_the_same_and_returns_float32():
    # Every token goes to every expert: where it has a choice, rounding may change it.
    moe = dataclasses.replace(TINY.moe, router=jmoe.TopK(k=5, capacity_factor=None))
    config = dataclasses.replace(TINY, moe=moe)
    full, half = build(config), build(dataclasses.replace(config, dtype="bfloat16"))
    assert {p.dtype for p in jax.tree.leaves(nnx.state(half, nnx.Param))} == {jnp.dtype("float32")}
    full, half = apply(full, some_images()), apply(half, some_images())
    assert half.features.dtype == jnp.bfloat16
    assert half.logits.dtype == half.routing["1"].weight.dtype == jnp.float32
    assert all(loss.dtype == jnp.float32 for loss in half.losses.values())
    np.testing.assert_allclose(half.logits, full.logits, rtol=0, atol=0.03 * np.abs(full.logits).max())


@pytest.mark.parametrize(
    ("pool", "positions", "tells"),
    [
        ("token", "learned", True),
        ("token", "none", False),
        ("mean", "sincos2d", True),
        ("mean", "none", False),
        ("map", "sincos2d", True),
        ("map", "none", False),
        ("first", "none", True),  # it reads another patch
    ],
)
def test_the_order_of_patches_matters_where_there_are_positions(pool, positions, tells):
    model = build(dataclasses.replace(TINY, depth=1, pool=pool, positions=positions, moe=None))
    patches = some_images().reshape(B, 2, 4, 3, 4, 3)
    other_order = patches[:, ::-1, :, ::-1]
    one, other = (apply(model, x.reshape(B, 8, 12, 3)).logits for x in (patches, other_order))
    assert np.allclose(one, other, atol=1e-4) != tells


def test_fixed_positions_are_not_added_to_the_class_token():
    config = dataclasses.replace(TINY, positions="sincos2d", moe=None)
    model = build(config)
    tokens = nnx.jit(VisionTransformer._tokens)(model, jnp.zeros((B, *config.image_size, 3)))
    np.testing.assert_array_equal(tokens[0, 0], model.cls[0, 0])
    expected = model.patches.bias[...] + sincos2d(*config.grid, config.width)[1]
    np.testing.assert_allclose(tokens[0, 2], expected, **tolerance(jnp.float32))


def test_without_a_head_the_logits_are_the_features():
    output = apply(build(dataclasses.replace(TINY, num_classes=None, representation_dim=11)), some_images())
    assert output.logits.shape == (B, 11)
    np.testing.assert_array_equal(output.logits, output.features)
    assert np.abs(output.features).max() <= 1  # of the tanh


def test_padded_images_change_nothing_for_the_others():
    model = build(TINY)  # at a capacity that drops tokens, so that a slot taken by padding would be missed
    images, mask, key = some_images(), jnp.array([True, True, False, True, False]), jax.random.key(3)
    garbage = jnp.where(mask[:, None, None, None], images, 1e3 * some_images(seed=2))
    one, other = (apply(model, x, mask, key) for x in (images, garbage))
    real = np.asarray(mask)
    np.testing.assert_allclose(one.logits[real], other.logits[real], **tolerance(jnp.float32))
    for name in ("losses", "metrics"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, **tolerance(jnp.float32)),
            getattr(one, name),
            getattr(other, name),
        )
    unmasked = apply(model, images, jnp.ones_like(mask), key)
    assert not np.allclose(one.logits[real], unmasked.logits[real], atol=1e-3)


def test_training_is_random_by_key_alone():
    model, images = build(dataclasses.replace(TINY, dropout=0.5)), some_images()
    first, same, other = (apply(model, images, key=jax.random.key(k)).logits for k in (0, 0, 1))
    np.testing.assert_array_equal(first, same)
    assert not np.allclose(first, other, atol=1e-3)


def test_a_variant_takes_further_options():
    config = variant("Ti/16", num_classes=None, image_size=(32, 64), dropout=0.1, representation_dim=None)
    assert (config.width, config.depth, config.num_heads) == (192, 12, 3)
    assert (config.grid, config.tokens, config.dropout) == ((2, 4), 9, 0.1)
    soft = variant("S/16", family="softmoe")
    assert (soft.width, soft.depth, soft.pool, soft.positions, soft.qk_norm) == (384, 12, "mean", "sincos2d", True)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": 0}, "ViTConfig wants patch_size of at least 1; it got 0."),
        ({"num_classes": 0}, "ViTConfig wants num_classes of at least 1, or None; it got 0."),
        ({"dropout": 1.0}, "ViTConfig wants a dropout rate from 0 to below 1; it got 1.0."),
        ({"num_heads": 5}, "num_heads=5 does not divide width=24."),
        ({"pool": "max"}, "ViTConfig wants pool to be one of 'token', 'mean', 'map', 'first'; it got 'max'."),
        ({"positions": "x"}, "ViTConfig wants positions to be one of 'learned', 'sincos2d', 'none'; it got 'x'."),
        (
            {"patch_size": 5},
            "patch_size=5 does not divide images of 8 by 12 pixels. Use images of 10 by 10, or another patch_size.",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(change, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        dataclasses.replace(TINY, **change)


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("name", "family", "message"),
    [
        ("M/16", "vmoe", "There is no variant 'M/16' in family 'vmoe'; use Ti, S, B, L, H, g, 15B with a patch"),
        ("15B/14", "softmoe", "There is no variant '15B/14' in family 'softmoe'; use Ti, S, B, L, H, g with a patch"),
        (
            "B16",
            "vmoe",
            "There is no variant 'B16' in family 'vmoe'; use Ti, S, B, L, H, g, 15B with a patch, as 'B/16'",
        ),
        ("B/16", "vit", "There is no family 'vit'; use one of 'vmoe', 'softmoe'."),
    ],
)
def test_unknown_variants_are_refused(name, family, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        variant(name, family=family)


def test_images_of_another_shape_are_refused():
    model = nnx.eval_shape(lambda: VisionTransformer(TINY, rngs=nnx.Rngs(0)))
    message = (
        "The model takes images of (8, 12, 3) (height, width, channels); it got (12, 8, 3). Resize them, or set "
        "image_size and channels in ViTConfig."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model(jnp.zeros((2, 12, 8, 3)))
