"""Efficient ensembles: a layer of M members is M layers, each with its own part of the experts."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmoe.models.vit import VisionTransformer, ViTConfig
from jmoe.nn.gate import LinearGate
from jmoe.nn.moe import MoEConfig, MoEMlp
from jmoe.routing import Balance, ExpertChoice, Importance, Soft, TopK, Transport, ZLoss
from jmoe.routing.members import interleave_members, separate_members
from tests.drawn import drawn, normal
from tests.tolerance import tolerance

B, M, T, D, F, E = 3, 2, 7, 5, 4, 6
MEMBERS = MoEConfig(
    num_experts=E,
    hidden_dim=F,
    router=TopK(k=2, capacity_factor=None),  # dropless: then members cannot take each other's place
    group_size=T * M,  # an image and its copies
    losses=(Importance(), Importance(scope="global"), ZLoss(), Balance(choices="all")),
    members=M,
)
ONE = dataclasses.replace(MEMBERS, num_experts=E // M, group_size=T, members=1)


def member_of(layer, m):
    """A single network with the gate and the experts of one member."""
    alone = drawn(functools.partial(MoEMlp, ONE, D))
    parameters = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    own = slice(m * E // M, (m + 1) * E // M)
    experts = {name: p[own] for name, p in parameters["experts"].items()}
    state = nnx.state(alone, nnx.Param)
    nnx.replace_by_pure_dict(state, {"gate": {"kernel": parameters["gate"]["kernel"][:, m]}, "experts": experts})
    nnx.update(alone, state)
    return alone


@nnx.jit
def differentiate(layer, x, mask):
    def total(layer, x):
        output = layer(x, mask=mask)
        weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
        return jnp.sum(weights * output.y) + sum(output.losses.values()), output

    (_, output), gradient = nnx.value_and_grad(total, argnums=1, has_aux=True)(layer, x)
    return output, gradient


def test_a_layer_of_members_is_so_many_layers():
    layer, x = drawn(functools.partial(MoEMlp, MEMBERS, D)), normal(B * M, T, D)
    image_mask = jnp.arange(B * T).reshape(B, T) % 5 != 3
    mask = jnp.repeat(image_mask, M, axis=0)
    output, gradient = differentiate(layer, x, mask)
    weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)

    alone = [member_of(layer, m) for m in range(M)]

    @jax.jit
    def together(x):
        outputs = [one(x[m::M], mask=image_mask) for m, one in enumerate(alone)]
        y = jnp.stack([o.y for o in outputs], axis=1).reshape(x.shape)
        losses = {name: sum(o.losses[name] for o in outputs) / M for name in outputs[0].losses}
        loads = jnp.concatenate([o.metrics["expert_load"] for o in outputs]) / M
        entropy = sum(o.metrics["entropy"] for o in outputs) / M
        return jnp.sum(weights * y) + sum(losses.values()), (y, losses, loads, entropy)

    expected_gradient, (y, losses, loads, entropy) = jax.grad(together, has_aux=True)(x)
    np.testing.assert_allclose(output.y, y, **tolerance("float32"))
    np.testing.assert_allclose(gradient, expected_gradient, **tolerance("float32", np.abs(expected_gradient).max()))
    assert output.losses.keys() == losses.keys()
    for name, loss in losses.items():
        np.testing.assert_allclose(output.losses[name], loss, rtol=1e-5, err_msg=name)
    np.testing.assert_allclose(output.metrics["expert_load"], loads, rtol=1e-5)
    np.testing.assert_allclose(output.metrics["entropy"], entropy, rtol=1e-5)
    assert output.metrics["dropped_tokens"] == 0


@pytest.mark.slow
def test_members_compete_for_no_expert_of_another():
    layer = drawn(functools.partial(MoEMlp, dataclasses.replace(MEMBERS, router=TopK(k=3)), D))
    routing = layer(normal(B * M, T, D)).decision
    np.testing.assert_array_equal(routing.expert // (E // M), routing.token % M)


def test_noise_is_in_units_of_the_experts_of_a_member():
    layer = drawn(functools.partial(MoEMlp, MEMBERS, D))
    gating = layer.gate(normal(400, T * M, D), key=jax.random.key(0))
    assert gating.sigma == pytest.approx(M / E)
    assert np.std(gating.noisy_logits - gating.logits) == pytest.approx(M / E, rel=0.05)


def test_copies_of_a_token_follow_each_other_in_a_group():
    rows = jnp.arange(4 * 2).reshape(4, 2)  # image 0 of members 0 and 1, then image 1; two tokens each
    together = interleave_members(rows, 2)
    np.testing.assert_array_equal(together, [[0, 2, 1, 3], [4, 6, 5, 7]])
    np.testing.assert_array_equal(separate_members(together, 2), rows)


CONFIG = ViTConfig(
    patch_size=2,
    width=8,
    depth=3,
    hidden_dim=6,
    num_heads=2,
    num_classes=4,
    image_size=(4, 4),
    channels=1,
    moe=MoEConfig(num_experts=4, router=TopK(k=1, capacity_factor=None), layers=(1, 2), images_per_group=2, members=2),
)


class Counting:
    """Notes of how many images a block is given the tokens."""

    def __init__(self, attention, rows):
        self.attention, self.rows = attention, rows

    def __call__(self, x, **options):
        self.rows.append(len(x))
        return self.attention(x, **options)


@pytest.mark.slow
def test_images_are_copied_before_the_first_sparse_block_only():
    model = drawn(functools.partial(VisionTransformer, CONFIG))
    rows = []
    for block in model.blocks:
        block.attention = Counting(block.attention, rows)
    output = model(normal(B, 4, 4, 1))
    assert rows == [B, B * 2, B * 2]
    assert output.logits.shape == (B * 2, 4)
    assert not np.allclose(output.logits[::2], output.logits[1::2])  # members differ by their experts


def test_members_with_the_same_experts_say_the_same():
    model = drawn(functools.partial(VisionTransformer, CONFIG))
    for block in model.blocks[1:]:
        gate, experts = block.moe.gate, block.moe.experts
        gate.kernel[...] = jnp.repeat(gate.kernel[...][:, :1], 2, axis=1)
        for name in ("w_in", "b_in", "w_out", "b_out"):
            p = getattr(experts, name)
            p[...] = jnp.concatenate([p[...][:2]] * 2)
    logits = model(normal(B, 4, 4, 1), mask=jnp.array([True, False, True])).logits
    np.testing.assert_allclose(logits[::2], logits[1::2], **tolerance("float32"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"members": 4},
            "An ensemble of members=4 wants as many experts for each: num_experts=6 is not a multiple of 4.",
        ),
        (
            {"router": TopK(k=4)},
            "TopK has k=4, but there are only num_experts=6, 3 for each of members=2. Choose k from 1 to 3.",
        ),
        ({"members": 0}, "MoEConfig wants members of at least 1; it got 0."),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        dataclasses.replace(MEMBERS, **options)


@pytest.mark.parametrize("router", [Soft(), ExpertChoice(), Transport()], ids=["soft", "expert choice", "transport"])
def test_routers_in_which_tokens_do_not_choose_are_refused(router):
    with pytest.raises(ValueError, match="An ensemble wants a router in which every token chooses among the experts"):
        dataclasses.replace(MEMBERS, router=router, losses=None)


def test_groups_must_hold_all_copies_of_a_token():
    layer = drawn(functools.partial(MoEMlp, dataclasses.replace(MEMBERS, group_size=T), D))
    with pytest.raises(ValueError, match="An ensemble of 2 members wants 2 copies of every image, and whole tokens"):
        layer(normal(B * M, T, D))


def test_a_gate_that_does_not_know_of_members_is_refused():
    config = dataclasses.replace(MEMBERS, gate=LinearGate)
    with pytest.raises(ValueError, match=r"^The gate is for members=1 and MoEConfig has members=2: LinearGate must"):
        drawn(functools.partial(MoEMlp, config, D))(normal(B * M, T, D))
    knowing = dataclasses.replace(config, gate=functools.partial(LinearGate, members=M))
    layer, expected = (drawn(functools.partial(MoEMlp, c, D)) for c in (knowing, MEMBERS))
    x = normal(B * M, T, D)
    np.testing.assert_array_equal(layer(x).y, expected(x).y)
