import jax
import jax.numpy as jnp
import numpy as np

from jmoe.routing import add_noise, gating
from tests.tolerance import tolerance

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5)), jnp.float32)


def test_noise_is_scaled_by_sigma_and_kept_apart():
    noise = jnp.ones((2, 3, 5))
    gate = add_noise(LOGITS, noise, 0.25)
    np.testing.assert_array_equal(gate.logits, LOGITS)
    np.testing.assert_allclose(gate.noisy_logits, LOGITS + 0.25, **tolerance(jnp.float32))
    assert gate.sigma == 0.25


def test_gates_are_softmax_over_experts_of_what_was_routed_on():
    gate = add_noise(LOGITS, jnp.cos(LOGITS), 0.5)
    for gates, logits in ((gate.gates, gate.noisy_logits), (gate.clean_gates, LOGITS)):
        exp = np.exp(np.asarray(logits, np.float64))
        np.testing.assert_allclose(gates, exp / exp.sum(axis=-1, keepdims=True), **tolerance(jnp.float32))


def test_drawn_noise_has_the_standard_deviation_asked_for():
    gate = gating(jnp.zeros((3, 1000, 7)), sigma=0.5, key=jax.random.key(0))
    draws = np.asarray(gate.noisy_logits)
    assert abs(draws.std() - 0.5) < 0.01  # 21,000 draws: the standard error is 0.0024
    assert abs(draws.mean()) < 0.02  # and 0.0035
    assert gate.sigma == 0.5


def test_there_is_no_noise_without_a_key_or_with_sigma_0():
    mask = jnp.array([[True, False, True]] * 2)
    for gate in (gating(LOGITS, sigma=0.5, mask=mask), gating(LOGITS, key=jax.random.key(0), mask=mask)):
        assert gate.noisy_logits is LOGITS
        assert gate.sigma == 0.0  # so that no load loss is computed
        assert gate.mask is mask


def test_vmap_maps_a_gating():
    gate = jax.vmap(lambda logits: gating(logits, sigma=0.0))(LOGITS[:, None])
    assert gate.gates.shape == (2, 1, 3, 5)
