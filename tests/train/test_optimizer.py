import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jmoe.errors import UserError
from jmoe.train.optimizer import SGD, Adafactor, AdamW
from jmoe.train.schedule import Constant


def trajectory(optimizer, params, grads, total_steps=10):
    transformation = optimizer.build(params, total_steps)
    state = transformation.init(params)
    update = jax.jit(transformation.update)
    for gradient in grads:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        yield params


class Block(nnx.Module):
    def __init__(self, rngs):
        self.moe = nnx.Linear(2, 3, rngs=rngs)
        self.norm = nnx.LayerNorm(3, rngs=rngs)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.blocks = nnx.List([Block(rngs), Block(rngs)])
        self.head = nnx.Linear(3, 5, rngs=rngs)


EVERYTHING = {
    "peak_lr": 0.1,
    "warmup_steps": 1,
    "weight_decay": (("head/", 0.0), ("kernel$", 0.3)),
    "clip_norm": 0.7,
    "gradient_scale": (("blocks/1/", 2.0),),
    "frozen": "norm/scale",
}


@pytest.mark.parametrize("kind", [AdamW, SGD, Adafactor])
def test_an_nnx_state_is_updated_like_a_plain_dict(kind):
    state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    plain = nnx.to_pure_dict(state)
    grads, state_grads = ([jax.tree.map(lambda x, t=t: jnp.sin(x + t), p) for t in range(3)] for p in (plain, state))
    optimizer = kind(**EVERYTHING)
    for expected, actual in zip(
        trajectory(optimizer, plain, grads), trajectory(optimizer, state, state_grads), strict=True
    ):
        assert isinstance(actual["blocks"][0]["moe"]["kernel"], nnx.Param)
        jax.tree.map(np.testing.assert_array_equal, expected, nnx.to_pure_dict(actual))


def test_frozen_parameters_stay_bit_for_bit_and_their_gradients_may_be_anything():
    params = {"router": jnp.ones(3), "head": jnp.ones(2)}
    grads = {"router": jnp.full(3, jnp.inf), "head": jnp.ones(2)}
    (after,) = trajectory(SGD(peak_lr=0.1, frozen="router", weight_decay=0.1), params, [grads])
    np.testing.assert_array_equal(after["router"], params["router"])
    assert (after["head"] < 1).all()


def test_frozen_parameters_count_in_the_clipped_norm():
    params = {"router": jnp.zeros(1), "head": jnp.zeros(1)}
    grads = {"router": jnp.array([4.0]), "head": jnp.array([3.0])}  # norm 5
    (after,) = trajectory(
        SGD(peak_lr=1.0, decay=Constant(), momentum=0.0, clip_norm=1.0, frozen="router"), params, [grads]
    )
    np.testing.assert_allclose(after["head"], [-3 / 5], rtol=1e-6)


def test_entries_are_clipped_by_value_after_the_scaling():
    params = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
    grads = {"a": jnp.array([0.1, -0.3, 9.0]), "b": jnp.array([0.1, -0.3, 9.0])}
    optimizer = SGD(
        peak_lr=1.0, decay=Constant(), momentum=0.0, clip_value=0.5, gradient_scale=(("a", 4.0), ("^", 1.0))
    )
    (after,) = trajectory(optimizer, params, [grads])
    np.testing.assert_allclose(after["a"], [-0.4, 0.5, -0.5], rtol=1e-6)
    np.testing.assert_allclose(after["b"], [-0.1, 0.3, -0.5], rtol=1e-6)


def test_only_trainable_parameters_change():
    params = {"router": jnp.ones(3), "head": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}
    (after,) = trajectory(SGD(peak_lr=0.1, trainable="head/kernel", weight_decay=0.1), params, [params])
    assert (after["head"]["kernel"] < 1).all()
    np.testing.assert_array_equal(after["router"], params["router"])
    np.testing.assert_array_equal(after["head"]["bias"], params["head"]["bias"])


def test_first_matching_expression_gives_the_decay_and_others_none():
    params = {"a": {"kernel": jnp.ones(1), "bias": jnp.ones(1)}, "head": {"kernel": jnp.ones(1)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    optimizer = SGD(peak_lr=0.5, decay=Constant(), weight_decay=(("head", 0.2), ("kernel", 0.1)))
    (after,) = trajectory(optimizer, params, [zeros])
    np.testing.assert_allclose(after["head"]["kernel"], [1 - 0.5 * 0.2], rtol=1e-6)
    np.testing.assert_allclose(after["a"]["kernel"], [1 - 0.5 * 0.1], rtol=1e-6)
    np.testing.assert_array_equal(after["a"]["bias"], [1.0])


@pytest.mark.parametrize("kind", [AdamW, SGD, Adafactor])
def test_mu_dtype_is_what_the_mean_of_gradients_is_kept_in(kind):
    params = {"w": jnp.ones((37, 41))}
    state = kind(peak_lr=0.1, mu_dtype="bfloat16").build(params, 10).init(params)
    kept = [leaf.dtype for leaf in jax.tree.leaves(state) if leaf.shape == (37, 41)]
    assert jnp.bfloat16 in kept


def test_bfloat16_mean_follows_the_published_rounding():
    # Worked in NumPy: m is rounded when stored, and b1 * m is a bfloat16 product in which b1 = 0.8984375.
    bf16 = jnp.bfloat16
    g = np.float32(0.3)
    m, v, w = np.zeros((), bf16), 0.0, 1.0
    for t in range(1, 4):
        mean = np.float32(bf16(0.9) * m) + np.float32(0.1) * g
        v = 0.999 * v + 0.001 * g**2
        w -= 0.1 * (mean / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        m = mean.astype(bf16)
    optimizer = AdamW(peak_lr=0.1, decay=Constant(), mu_dtype="bfloat16")
    *_, after = trajectory(optimizer, {"w": jnp.ones(1)}, [{"w": jnp.full(1, g)}] * 3)
    np.testing.assert_allclose(after["w"], w, rtol=2e-4)


def test_the_optimizer_state_keeps_its_names_whatever_the_options():
    params = {"w": jnp.ones((2, 3))}
    plain = AdamW(peak_lr=0.1).build(params, 10).init(params)
    full = AdamW(peak_lr=0.1, weight_decay=0.1, clip_norm=1.0, frozen="w").build(params, 10).init(params)
    assert jax.tree.structure(plain) == jax.tree.structure(full)
    assert set(plain) == {"scale", "clip", "direction", "decay", "learning_rate", "freeze"}


def test_names_are_all_that_build_needs_of_the_parameters():
    shapes = jax.eval_shape(lambda: {"w": jnp.ones((2, 3))})
    AdamW(peak_lr=0.1, frozen="w").build(shapes, 10)


@pytest.mark.parametrize("option", ["weight_decay", "gradient_scale"])
def test_an_expression_that_matches_nothing_is_refused_with_the_nearest_names(option):
    params = {"blocks": {"moe": {"kernel": jnp.ones(1)}}, "head": {"bias": jnp.ones(1)}}
    with pytest.raises(UserError, match=rf"{option} has 'moe/kernal', which matches no parameter.*'blocks/moe/kernel'"):
        AdamW(peak_lr=0.1, **{option: (("head", 0.1), ("moe/kernal", 0.1))}).build(params, 10)


def test_a_frozen_expression_that_matches_nothing_is_refused():
    with pytest.raises(UserError, match=r"frozen has 'gate', which matches no parameter\. The nearest names are 'w'"):
        SGD(peak_lr=0.1, frozen="gate").build({"w": jnp.ones(1)}, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_norm": 1.0, "clip_value": 0.5}, "SGD takes clip_norm or clip_value, not both; it got 1.0 and 0.5."),
        ({"frozen": "a", "trainable": "b"}, "SGD takes frozen or trainable, not both; it got 'a' and 'b'."),
        ({"clip_value": 0.0}, "SGD wants a clip_value above 0, or None; it got 0.0."),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        SGD(peak_lr=0.1, **options)


def test_a_broken_expression_is_refused():
    with pytest.raises(UserError, match=r"frozen has '\(', which is not a regular expression"):
        SGD(peak_lr=0.1, frozen="(").build({"w": jnp.ones(1)}, 10)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(UserError, match="mu_dtype='bf16' is not a dtype; use 'bfloat16'"):
        AdamW(peak_lr=0.1, mu_dtype="bf16").build({"w": jnp.ones(1)}, 10)
