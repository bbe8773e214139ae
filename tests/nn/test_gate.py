import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmoe.nn.gate import LinearGate, SlotGate, default_gate
from jmoe.routing import ExpertChoice, Soft, Switch, TopK
from tests.drawn import drawn, normal
from tests.tolerance import tolerance

G, S, D, E, P = 2, 30, 5, 4, 3


def test_a_linear_gate_is_a_product_without_bias():
    gate, tokens = drawn(functools.partial(LinearGate, D, E)), normal(G, S, D)
    gating = gate(tokens)
    expected = np.asarray(tokens, np.float64) @ np.asarray(gate.kernel, np.float64)
    np.testing.assert_allclose(gating.logits, expected, **tolerance(jnp.float32))
    assert gating.noisy_logits is gating.logits
    assert (gating.sigma, gating.mask) == (0.0, None)


def test_noise_has_the_stated_deviation_over_the_number_of_experts():
    gate = drawn(functools.partial(LinearGate, D, E, noise_std=2.0))
    gating = gate(normal(G, 1000, D), key=jax.random.key(0))
    assert gating.sigma == 0.5
    noise = np.asarray(gating.noisy_logits - gating.logits)
    assert noise.std() == pytest.approx(0.5, rel=5 / np.sqrt(2 * noise.size))
    assert noise.mean() == pytest.approx(0.0, abs=5 * 0.5 / np.sqrt(noise.size))


def test_a_gate_computes_in_float32_whatever_the_tokens_are():
    tokens = normal(G, S, D, dtype=jnp.bfloat16)
    for gate in (LinearGate, functools.partial(SlotGate, slots_per_expert=P)):
        gate = drawn(functools.partial(gate, D, E))
        half, full = gate(tokens).logits, gate(tokens.astype(jnp.float32)).logits
        assert half.dtype == jnp.float32
        np.testing.assert_array_equal(half, full)


def test_jitter_multiplies_the_tokens_in_training_only():
    gate, tokens = drawn(functools.partial(LinearGate, D, E, noise_std=0.0, jitter=0.1)), normal(G, S, D)
    gate.kernel[...] = jnp.eye(D, E)  # then the logits are the first tokens' entries
    ratio = np.asarray(gate(tokens, key=jax.random.key(0)).logits / tokens[..., :E])
    assert 0.9 - 1e-5 <= ratio.min() < 0.92 < 1.08 < ratio.max() <= 1.1 + 1e-5
    np.testing.assert_allclose(gate(tokens).logits, tokens[..., :E], rtol=1e-6)


def test_a_slot_gate_is_a_scaled_cosine():
    gate, tokens = drawn(functools.partial(SlotGate, D, E, slots_per_expert=P)), normal(G, S, D)
    x, mu, scale = (np.asarray(a, np.float64) for a in (tokens, gate.mu, gate.scale))
    norms = np.linalg.norm(x, axis=-1)[..., None, None] * np.linalg.norm(mu, axis=0)
    expected = scale * np.einsum("gsd,dep->gsep", x, mu) / norms
    np.testing.assert_allclose(gate(tokens).logits, expected, rtol=1e-4, atol=1e-5)  # 1e-6 under the root
    assert np.isfinite(gate(jnp.zeros((G, S, D))).logits).all()


def test_the_gate_of_a_router_is_the_published_one():
    def gate_of(router):
        return nnx.eval_shape(lambda: default_gate(router, D, E, rngs=nnx.Rngs(0)))

    assert gate_of(TopK(noise_std=2.0)).sigma == 2.0 / E
    assert gate_of(ExpertChoice()).sigma == 1.0 / E
    switch = gate_of(Switch(jitter=0.2))
    assert (switch.jitter, switch.sigma) == (0.2, 0.0)
    soft = gate_of(Soft(slots_per_expert=P, noise_std=0.5))
    assert (soft.mu.shape, soft.scale.shape, soft.sigma) == ((D, E, P), (), 0.5)  # not divided by E
