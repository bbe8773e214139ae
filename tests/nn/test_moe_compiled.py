"""What the compiled layer holds: no array with an entry for every token and slot, except by one-hot masks."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jmoe import MoEConfig, MoEMlp, TopK
from jmoe.analysis.bound import array_elements
from tests.aot import compile_for

D, B, T, E, K = 128, 8, 53, 4, 2


def compiled_layer(platform, method, images=B):
    """Value and gradient; images of one group."""
    config = MoEConfig(
        num_experts=E, hidden_dim=128, router=TopK(k=K, capacity_factor=1.05), method=method, images_per_group=images
    )
    graph, state = nnx.split(nnx.eval_shape(lambda: MoEMlp(config, D, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))

    def loss(state, x):
        return jnp.sum(jnp.square(nnx.merge(graph, state)(x).y.astype(jnp.float32)))

    x = jax.ShapeDtypeStruct((B, T, D), jnp.bfloat16)
    function = jax.grad(loss, argnums=(0, 1))
    if platform == "cpu":
        return jax.jit(function).lower(state, x).compile()
    return compile_for(platform, function, state, x)


@pytest.mark.parametrize("platform", ["cpu", "v5e", "v5p"])
def test_gathers_need_no_array_of_tokens_by_slots(platform):
    S = B * T
    C = math.ceil(math.ceil(S * K * 1.05 / E) / 4) * 4
    assert S * E * C in array_elements(compiled_layer(platform, "einsum").as_text())  # so that the test can fail
    gather = array_elements(compiled_layer(platform, "gather").as_text())
    assert S * E * C not in gather
    assert max(gather) < S * E * C / 2
