import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jmoe
from tests.drawn import drawn, normal
from tests.tolerance import tolerance

B, T, D = 3, 7, 6
ROUTERS = [
    jmoe.TopK(k=2, capacity_factor=0.6, multiple=1),
    jmoe.Switch(),
    jmoe.ExpertChoice(),
    jmoe.Soft(slots_per_expert=2),
]


def config_of(router):
    return jmoe.MoEConfig(num_experts=5, hidden_dim=10, router=router, images_per_group=1, dropout=0.25)


def total(output):
    return jnp.sum(jnp.sin(output.y)) + sum(output.losses.values())


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, **tolerance(jnp.float32, np.abs(expected).max()))


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: type(router).__name__)
def test_the_same_parameters_give_the_same_numbers_and_gradients(router):
    config, x = config_of(router), normal(B, T, D)
    layer = drawn(functools.partial(jmoe.MoEMlp, config, D))
    graph, state = nnx.split(layer)
    parameters = nnx.to_pure_dict(state)

    def by_nnx(parameters, x):
        values = nnx.clone(state)
        nnx.replace_by_pure_dict(values, parameters)
        output = nnx.merge(graph, values)(x)
        return total(output), output

    def by_linen(parameters, x):
        output = jmoe.linen.MoEMlp(config).apply({"params": parameters}, x)
        return total(output), output

    ours, expected = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(parameters, x) for f in (by_linen, by_nnx)
    )
    jax.tree.map(assert_close, ours, expected)


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: type(router).__name__)
def test_parameters_are_made_with_the_shapes_of_the_nnx_module(router):
    config = config_of(router)
    # A batch of one image is enough; groups and capacities are those of the batch that comes later.
    made = jax.eval_shape(jmoe.linen.MoEMlp(config).init, jax.random.key(0), normal(1, T, D))
    layer = nnx.eval_shape(lambda: jmoe.MoEMlp(config, D, rngs=nnx.Rngs(0)))
    expected = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    assert jax.tree.map(jnp.shape, made) == {"params": jax.tree.map(jnp.shape, expected)}


class Network(linen.Module):
    """A user's network."""

    config: jmoe.MoEConfig

    @linen.compact
    def __call__(self, x, *, deterministic=True):
        x = linen.Dense(D)(x)
        first = jmoe.linen.MoEMlp(self.config)(x, deterministic=deterministic)
        x = linen.LayerNorm()(x + first.y)
        second = jmoe.linen.MoEMlp(self.config, name="last")(x, deterministic=deterministic)
        return x + second.y, sum(first.losses.values()) + sum(second.losses.values())


def test_it_trains_inside_a_network():
    network, x = Network(config_of(ROUTERS[0])), normal(B, T, D)
    variables = jax.jit(network.init)(jax.random.key(0), x[:1])
    assert set(variables) == {"params"}
    assert set(variables["params"]) == {"Dense_0", "LayerNorm_0", "MoEMlp_0", "last"}
    first, last = (variables["params"][name]["gate"]["kernel"] for name in ("MoEMlp_0", "last"))
    assert not np.allclose(first, last)  # each layer draws its own

    @jax.jit
    def step(variables, key):
        def loss(variables):
            y, auxiliary = network.apply(variables, x, deterministic=False, rngs={"gating": key})
            return jnp.mean(jnp.square(y - 1)) + auxiliary

        value, gradients = jax.value_and_grad(loss)(variables)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, variables, gradients)

    start, _ = step(variables, jax.random.key(1))
    for i in range(20):
        value, variables = step(variables, jax.random.key(i))
    assert value < 0.9 * start


def test_training_is_random_by_the_stream_gating_alone():
    layer, x = jmoe.linen.MoEMlp(config_of(ROUTERS[0])), normal(B, T, D)
    parameters = nnx.to_pure_dict(nnx.split(drawn(functools.partial(jmoe.MoEMlp, layer.config, D)))[1])

    @jax.jit
    def train(key):
        return layer.apply({"params": parameters}, x, deterministic=False, rngs={"gating": key})

    first, same, other = (train(jax.random.key(k)) for k in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, same)
    assert not np.allclose(first.y, other.y, atol=1e-3)
    assert float(first.losses["load"]) > 0  # which is defined with noise only


def test_a_mask_and_a_dtype_pass_through():
    layer = jmoe.linen.MoEMlp(dataclasses.replace(config_of(ROUTERS[0]), dropout=0.0), dtype=jnp.bfloat16)
    nnx_layer = drawn(functools.partial(jmoe.MoEMlp, layer.config, D, dtype=jnp.bfloat16))
    x, mask = normal(B, T, D), jnp.arange(B * T).reshape(B, T) % 4 != 1
    variables = {"params": nnx.to_pure_dict(nnx.split(nnx_layer)[1])}
    ours = jax.jit(layer.apply)(variables, x, mask=mask)
    assert not np.asarray(ours.y)[~np.asarray(mask)].any()
    jax.tree.map(assert_close, ours, nnx.jit(lambda layer: layer(x, mask=mask))(nnx_layer))
