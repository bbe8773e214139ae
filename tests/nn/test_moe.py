import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jmoe
from jmoe.nn import Mlp
from jmoe.nn.moe import MoEConfig, MoEMlp
from jmoe.routing import ExpertChoice, Gating, Importance, Routing, Soft, TopK, ZLoss
from tests.drawn import drawn, normal
from tests.routing import oracle
from tests.tolerance import tolerance

B, T, D, F, E = 3, 7, 6, 10, 5
S = 8  # per group; three groups, the last with three tokens of padding
DROPPING = TopK(k=2, capacity_factor=0.6, multiple=1, batch_priority=True)
TINY = MoEConfig(num_experts=E, hidden_dim=F, router=DROPPING, group_size=S)


def make(config=TINY, D=D, **options):
    return drawn(functools.partial(MoEMlp, config, D, **options))


def change(**options):
    return dataclasses.replace(TINY, **options)


@nnx.jit
def apply(layer, x, mask=None, key=None):
    return layer(x, mask=mask, key=key)


@nnx.jit
def differentiate(layer, x, mask=None, key=None):
    """The output, and the gradients with respect to the parameters and x of a sum that weighs every output."""

    def total(layer, x):
        output = layer(x, mask=mask, key=key)
        weights = jnp.cos(jnp.arange(x.size, dtype=jnp.float32)).reshape(x.shape)
        return jnp.sum(weights * output.y.astype(jnp.float32)) + sum(output.losses.values()), output

    (_, output), (parameters, tokens) = nnx.value_and_grad(total, argnums=(0, 1), has_aux=True)(layer, x)
    return output, nnx.to_pure_dict(parameters) | {"x": tokens}


# Against loops


def slow_mlp(x, e, experts):
    hidden = x @ experts["w_in"][e] + experts["b_in"][e]
    hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    return hidden @ experts["w_out"][e] + experts["b_out"][e]


def softmax(x, axis):
    x = np.exp(x - x.max(axis=axis, keepdims=True))
    return x / x.sum(axis=axis, keepdims=True)


def slow_layer(parameters, router, capacity, x, mask):
    """y in float64, token by token; the groups of S tokens follow one another, the last is shorter."""
    tokens, real = x.reshape(-1, D), mask.reshape(-1)
    y = np.zeros_like(tokens)
    for start in range(0, len(tokens), S):
        group, here = tokens[start : start + S], real[start : start + S]
        route = slow_soft if isinstance(router, Soft) else slow_hard
        y[start : start + S] = route(parameters, router, capacity, group, here)
    return y.reshape(x.shape)


def slow_hard(parameters, router, capacity, group, real):
    gates = softmax(group @ parameters["gate"]["kernel"], axis=-1)[None]
    if isinstance(router, ExpertChoice):
        kept = oracle.expert_choice(gates, capacity, real[None])
    else:
        kept, _ = oracle.top_k(gates, router.k, capacity, router.batch_priority, mask=real[None])
    y = np.zeros_like(group)
    for (_, e, _, s), weight in kept.items():
        y[s] += weight * slow_mlp(group[s], e, parameters["experts"])
    return y


def slow_soft(parameters, router, capacity, group, real):
    def unit(v, axis):
        return v / np.sqrt((v**2).sum(axis=axis, keepdims=True) + 1e-6)

    x, mu = group[real], parameters["gate"]["mu"].reshape(D, -1)
    logits = parameters["gate"]["scale"] * unit(x, 1) @ unit(mu, 0)  # [tokens, E * P]
    slots = softmax(logits, axis=0).T @ x
    outputs = np.stack([slow_mlp(row, i // capacity, parameters["experts"]) for i, row in enumerate(slots)])
    y = np.zeros_like(group)
    y[real] = softmax(logits, axis=1) @ outputs
    return y


@pytest.mark.parametrize(
    ("router", "capacity"),
    [
        (dataclasses.replace(DROPPING, batch_priority=False), 2),  # ceil(8 * 2 * 0.6 / 5)
        (DROPPING, 2),
        (TopK(k=E, capacity_factor=None), S),  # dropless, every token to every expert
        (ExpertChoice(capacity_factor=1.5), 3),  # ceil(8 * 1.5 / 5)
        (Soft(slots_per_expert=2), 2),
    ],
    ids=["in order", "batch priority", "dropless", "expert choice", "soft"],
)
def test_layer_equals_loops_in_values_and_gradients(router, capacity):
    layer, x = make(change(router=router, losses=())), normal(B, T, D)
    mask = np.arange(B * T).reshape(B, T) % 6 != 4
    output, gradients = differentiate(layer, x, jnp.asarray(mask))

    point = nnx.to_pure_dict(nnx.state(layer, nnx.Param)) | {"x": x}
    point = jax.tree.map(lambda a: np.asarray(a, np.float64), point)
    weights = np.cos(np.arange(x.size)).reshape(x.shape)

    def slow(point):
        return slow_layer(point, router, capacity, point["x"], mask)

    np.testing.assert_allclose(output.y, slow(point), **tolerance(jnp.float32))
    leaves, tree = jax.tree.flatten(point)
    draw, step = np.random.default_rng(2), 1e-6
    for i, gradient in enumerate(jax.tree.leaves(gradients)):  # along a random direction of each array in turn
        direction = draw.normal(size=leaves[i].shape)
        ahead, back = (
            slow(jax.tree.unflatten(tree, [*leaves[:i], leaves[i] + sign * step * direction, *leaves[i + 1 :]]))
            for sign in (1, -1)
        )
        expected = (weights * (ahead - back)).sum() / (2 * step)
        size = np.abs(np.asarray(gradient) * direction).sum()
        np.testing.assert_allclose((gradient * direction).sum(), expected, rtol=1e-4, atol=1e-5 * size)


# Methods


@pytest.mark.parametrize(
    ("router", "dtype"),
    [(DROPPING, "float32"), (DROPPING, "bfloat16"), (TopK(k=3, capacity_factor=None), "float32")],
    ids=["dropping, float32", "dropping, bfloat16", "dropless, float32"],
)
def test_methods_agree_in_values_and_gradients(router, dtype):
    x, mask = normal(B, T, D, dtype=dtype), jnp.arange(B * T).reshape(B, T) % 6 != 4
    expected, expected_gradients = differentiate(make(change(router=router, method="einsum")), x, mask)
    assert expected.y.dtype == x.dtype
    for options in ({"method": "gather"}, {"method": "ragged"}, {"method": "auto"}, {"fused": True}):
        output, gradients = differentiate(make(change(router=router, **options)), x, mask)
        assert output.y.dtype == x.dtype
        close = functools.partial(assert_close, dtype=dtype, message=str(options))
        jax.tree.map(close, (output, gradients), (expected, expected_gradients))


def assert_close(actual, expected, dtype, message=""):
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    bounds = tolerance(dtype, np.abs(expected).max())
    if dtype == "bfloat16":
        bounds["atol"] *= 4  # a sum over tokens of values that were each rounded a few times
    np.testing.assert_allclose(actual, expected, **bounds, err_msg=message)


# Groups and padding


@pytest.mark.parametrize("garbage", [1e4, np.nan])
def test_padded_tokens_come_back_zero_and_change_nothing(garbage):
    layer, x, key = make(), normal(B, T, D), jax.random.key(0)
    mask = jnp.arange(B * T).reshape(B, T) % 6 != 4
    expected, expected_gradients = differentiate(layer, x, mask, key)
    output, gradients = differentiate(layer, jnp.where(mask[..., None], x, garbage), mask, key)
    for padding in (output.y, gradients["x"]):
        assert not np.asarray(padding)[~np.asarray(mask)].any()
    jax.tree.map(functools.partial(assert_close, dtype="float32"), (output, gradients), (expected, expected_gradients))


def test_a_batch_of_padding_is_all_zero():
    output, gradients = differentiate(make(), normal(B, T, D), jnp.zeros((B, T), bool), jax.random.key(0))
    for array in jax.tree.leaves((output.y, output.losses, gradients)):
        assert not np.asarray(array).any()
    assert all(np.isfinite(metric).all() for metric in jax.tree.leaves(output.metrics))


def test_a_last_group_with_padding_is_routed_like_a_smaller_one():
    layer = make(change(router=TopK(k=2, capacity_factor=None, capacity=2)))
    x = normal(1, 2 * S + 5, D)
    whole = apply(layer, x)
    parts = [apply(layer, x[:, start : start + S]) for start in (0, S, 2 * S)]
    assert float(whole.metrics["dropped_assignments"]) > 0
    np.testing.assert_allclose(whole.y, np.concatenate([part.y for part in parts], axis=1), **tolerance(jnp.float32))
    mean = np.mean([part.losses["importance"] for part in parts])
    np.testing.assert_allclose(whole.losses["importance"], mean, rtol=1e-5)


def test_groups_do_not_know_each_other():
    layer, x = make(change(group_size=T)), normal(B, T, D)
    one, other = apply(layer, x).y, apply(layer, x.at[1].set(normal(T, D, seed=2))).y
    np.testing.assert_array_equal(one[::2], other[::2])
    assert not np.allclose(one[1], other[1], atol=1e-2)


def test_a_group_is_at_most_the_batch():
    x = normal(B, T, D)
    larger, exact = (apply(make(change(group_size=None, images_per_group=n)), x) for n in (8, B))
    jax.tree.map(np.testing.assert_array_equal, larger, exact)
    assert larger.decision.group_size == B * T


# Randomness


def test_without_a_key_there_is_neither_noise_nor_dropout():
    x = normal(B, T, D)
    noisy = make(change(dropout=0.5, router=dataclasses.replace(DROPPING, noise_std=3.0)))
    quiet = make(change(dropout=0.0, router=dataclasses.replace(DROPPING, noise_std=0.0)))
    output = apply(noisy, x)
    np.testing.assert_array_equal(output.y, apply(quiet, x).y)
    assert output.losses["load"] == 0  # it is not defined without noise


def test_training_is_random_by_key_alone():
    x = normal(B, T, D)
    for config in (change(dropout=0.5, router=dataclasses.replace(DROPPING, noise_std=0.0)), TINY):
        layer = make(config)
        first, same, other = (apply(layer, x, key=jax.random.key(k)) for k in (0, 0, 1))
        jax.tree.map(np.testing.assert_array_equal, first, same)
        assert not np.allclose(first.y, other.y, atol=1e-3)


# Cases that are known


def test_a_single_expert_is_the_dense_perceptron():
    layer, x = make(change(num_experts=1, router=TopK(k=1, capacity_factor=None))), normal(B, T, D)
    mlp = nnx.eval_shape(lambda: Mlp(D, F, rngs=nnx.Rngs(0)))
    for name in ("w_in", "b_in", "w_out", "b_out"):
        setattr(mlp, name, nnx.Param(getattr(layer.experts, name)[0]))
    np.testing.assert_allclose(apply(layer, x).y, mlp(x), **tolerance(jnp.float32))


def test_identical_experts_start_as_one_perceptron_weighted_by_the_chosen_gates():
    config = change(router=TopK(k=E, capacity_factor=None))
    layer = nnx.jit(lambda: MoEMlp(config, D, rngs=nnx.Rngs(0)))()
    mlp = nnx.eval_shape(lambda: Mlp(D, F, rngs=nnx.Rngs(0)))
    for name in ("w_in", "b_in", "w_out", "b_out"):
        setattr(mlp, name, nnx.Param(getattr(layer.experts, name)[E - 1]))
    x = normal(B, T, D)
    np.testing.assert_allclose(apply(layer, x).y, mlp(x), **tolerance(jnp.float32))  # all gates sum to 1


def test_the_decision_is_made_in_float32():
    x = normal(B, T, D, dtype=jnp.bfloat16)
    full, half = apply(make(), x.astype(jnp.float32)), apply(make(dtype=jnp.bfloat16), x)
    computed = apply(make(dtype=jnp.bfloat16), x.astype(jnp.float32))
    assert (full.y.dtype, half.y.dtype, computed.y.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    for other in (half, computed):
        jax.tree.map(np.testing.assert_array_equal, full.decision, other.decision)
        jax.tree.map(np.testing.assert_array_equal, (full.losses, full.metrics), (other.losses, other.metrics))
        assert_close(other.y, full.y, "bfloat16")


# Parts of one's own


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoundRobin:
    """Token s goes to expert s mod E, and the last token nowhere; what a user would write in a file of their own."""

    noise_std: float = 0.0
    losses: tuple = (ZLoss(),)
    batch_invariant: bool = True

    def __call__(self, gates, *, mask=None):
        G, S, E = gates.shape
        C = -(-S // E)
        token = jnp.broadcast_to(jnp.arange(S)[::-1][None], (G, S))  # in no order that dispatch could know
        expert = token % E
        weight = jnp.take_along_axis(gates, expert[..., None], axis=-1)[..., 0]  # of another token, which is allowed
        return Routing(
            token=token,
            expert=expert,
            slot=jnp.where(token == S - 1, C, token // E),
            weight=weight,
            group_size=S,
            num_experts=E,
            capacity=C,
        )


def test_a_router_of_ones_own_is_one_class():
    layer, x = make(change(router=RoundRobin(), group_size=T)), normal(B, T, D)
    output, gradients = differentiate(layer, x)
    parameters = jax.tree.map(lambda a: np.asarray(a, np.float64), nnx.to_pure_dict(nnx.state(layer, nnx.Param)))
    tokens = np.asarray(x, np.float64)
    gates = softmax(tokens @ parameters["gate"]["kernel"], axis=-1)
    for b in range(B):
        for s in range(T):
            weight = gates[b, T - 1 - s, s % E] if s < T - 1 else 0.0
            expected = weight * slow_mlp(tokens[b, s], s % E, parameters["experts"])
            np.testing.assert_allclose(output.y[b, s], expected, **tolerance(jnp.float32))
    assert set(output.losses) == {"z"}
    np.testing.assert_allclose(output.metrics["dropped_tokens"], 1 / T, rtol=1e-6)
    _, expected = differentiate(make(change(router=RoundRobin(), group_size=T, method="einsum")), x)
    jax.tree.map(functools.partial(assert_close, dtype="float32"), gradients, expected)


class DropEverything(RoundRobin):
    def __call__(self, gates, *, mask=None):
        routing = super().__call__(gates, mask=mask)
        return dataclasses.replace(routing, slot=jnp.full_like(routing.slot, routing.capacity))


@pytest.mark.parametrize("method", ["gather", "einsum", "ragged"])
def test_a_layer_that_drops_every_token_is_zero(method):
    layer = make(change(router=DropEverything(losses=()), method=method))
    output, gradients = differentiate(layer, normal(B, T, D))
    assert not any(np.asarray(array).any() for array in jax.tree.leaves((output.y, gradients)))
    assert float(output.metrics["dropped_tokens"]) == 1.0


class ByPosition(nnx.Module):
    """A gate of one's own: it knows the place of a token, and nothing else."""

    def __init__(self, D, num_experts, *, rngs):
        self.table = nnx.Param(jnp.zeros((S, num_experts)))

    def __call__(self, tokens, *, mask=None, key=None):
        logits = jnp.broadcast_to(self.table[...][None], (*tokens.shape[:2], self.table.shape[1]))
        return Gating(logits=logits, noisy_logits=logits, mask=mask)


def test_a_gate_of_ones_own_is_one_class():
    layer = make(change(gate=ByPosition, router=TopK(k=1, capacity_factor=None)))
    output, gradients = differentiate(layer, normal(B, T, D))
    best = np.argmax(layer.gate.table, axis=-1)
    np.testing.assert_array_equal(output.decision.expert, np.broadcast_to(best, (3, S)))
    assert np.abs(gradients["gate"]["table"]).max() > 0


# JAX


def test_it_compiles_differentiates_and_maps():
    layer, x = make(), normal(2, B, T, D)
    graph, parameters = nnx.split(layer)

    def total(parameters, x):
        output = nnx.merge(graph, parameters)(x)
        return jnp.sum(jnp.square(output.y)) + sum(output.losses.values()), output

    function = jax.value_and_grad(total, has_aux=True)
    mapped = jax.jit(jax.vmap(function, in_axes=(None, 0)))(parameters, x)
    jax.tree.map(lambda many, one: assert_close(many[1], one, "float32"), mapped, jax.jit(function)(parameters, x[1]))


def test_an_output_is_a_pytree():
    output = jmoe.MoEOutput(
        y=normal(B, T, D), decision=DROPPING(normal(1, B * T, E)), losses={"z": jnp.ones(())}, metrics={}
    )
    doubled = jax.tree.map(lambda a: 2 * a, output)
    np.testing.assert_array_equal(doubled.y, 2 * output.y)
    assert doubled.decision.capacity == output.decision.capacity


# Options


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 0}, "MoEConfig wants num_experts of at least 1; it got 0."),
        ({"hidden_dim": 0}, "MoEConfig wants hidden_dim of at least 1; it got 0."),
        ({"images_per_group": 0}, "MoEConfig wants images_per_group of at least 1; it got 0."),
        ({"exchange_chunks": 0}, "MoEConfig wants exchange_chunks of at least 1; it got 0."),
        ({"group_size": -1}, "MoEConfig wants group_size of at least 1; it got -1."),
        ({"dropout": 1.0}, "MoEConfig wants a dropout rate from 0 to below 1; it got 1.0."),
        ({"expert_init": "zero"}, "MoEConfig wants expert_init 'identical' or 'independent'; it got 'zero'."),
        ({"method": "x"}, "MoEConfig wants method 'auto', 'einsum', 'gather' or 'ragged'; it got 'x'."),
        ({"implementation": "cuda"}, "MoEConfig wants implementation 'pallas', 'xla' or None; it got 'cuda'."),
        (
            {"fused": True, "method": "ragged"},
            "MoEConfig(fused=True) is for method 'gather' (or 'auto') and experts without dropout; it got method "
            "'ragged' and dropout=0.0.",
        ),
        (
            {"fused": True, "dropout": 0.1},
            "MoEConfig(fused=True) is for method 'gather' (or 'auto') and experts without dropout; it got method "
            "'auto' and dropout=0.1.",
        ),
        (
            {"fused": True, "router": Soft()},
            "MoEConfig(fused=True) wants a router that sends tokens to slots; Soft mixes them.",
        ),
        (
            {"method": "einsum", "implementation": "pallas"},
            "MoEConfig(implementation='pallas') is for methods 'gather' and 'ragged'; it got method 'einsum'.",
        ),
        ({"router": TopK(k=6)}, "TopK has k=6, but there are only num_experts=5. Choose k from 1 to 5."),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        change(**options)


def test_a_soft_router_has_no_ragged_form():
    layer = make(change(router=Soft(), method="ragged"))
    with pytest.raises(ValueError, match="^A soft router mixes tokens in fixed slots, which 'ragged' does not have"):
        layer(normal(B, T, D))


def test_experts_are_four_times_as_wide_as_the_model_unless_told():
    assert make(change(hidden_dim=None)).experts.w_in.shape == (E, D, 4 * D)


def test_losses_of_one_name_are_added():
    x = normal(2, 8, 6)
    group, everywhere = Importance(weight=1.0), Importance(weight=1.0, scope="global")

    def importance(*losses):
        config = MoEConfig(num_experts=3, hidden_dim=4, images_per_group=1, losses=losses)
        return MoEMlp(config, 6, rngs=nnx.Rngs(0))(x).losses["importance"]

    np.testing.assert_allclose(importance(group, everywhere), importance(group) + importance(everywhere), rtol=1e-6)


def test_what_is_no_router_is_told_what_it_lacks(untyped):
    with pytest.raises(ValueError, match="wants a router with noise_std, losses, batch_invariant and a call"):
        MoEConfig(router=dataclasses.make_dataclass("Half", [("noise_std", float, 0.0)], frozen=True)())


def test_a_loss_of_experts_is_refused_for_a_soft_router():
    soft = MoEConfig(num_experts=2, hidden_dim=4, router=Soft(), losses=(Importance(),))
    with pytest.raises(ValueError, match="A soft router has a logit per slot"):
        MoEMlp(soft, 6, rngs=nnx.Rngs(0))(normal(2, 8, 6))


def test_a_named_implementation_is_that_of_every_op_of_the_layer():
    x = normal(B, T, D)
    for method in ("gather", "ragged"):
        plain, gradients = differentiate(make(change(method=method)), x)
        named, named_gradients = differentiate(make(change(method=method, implementation="xla")), x)
        jax.tree.map(np.testing.assert_array_equal, (named.y, named_gradients), (plain.y, gradients))
    for options in ({"method": "gather"}, {"method": "ragged"}, {"fused": True}):
        with pytest.raises(NotImplementedError, match="cannot run as 'pallas'"):
            apply(make(change(implementation="pallas", **options)), x)


def test_a_soft_router_has_no_kernels():
    with pytest.raises(NotImplementedError, match="A soft router mixes tokens by matrix multiplies; 'pallas' is"):
        apply(make(change(router=Soft(), implementation="pallas")), normal(B, T, D))


def test_fused_experts_keep_less_for_the_gradient():
    config = change(hidden_dim=64 * D, fused=True)
    x = jax.ShapeDtypeStruct((B, T, D), jnp.float32)

    def kept(config):
        graph, state = nnx.split(make(config))
        _, back = jax.eval_shape(
            lambda state, x: jax.vjp(lambda *a: nnx.merge(graph, a[0])(a[1]).y, state, x), state, x
        )
        return sum(leaf.size for leaf in jax.tree.leaves(back))

    assert kept(config) < kept(change(hidden_dim=64 * D, method="gather")) - 24 * 64 * D
