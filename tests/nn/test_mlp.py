import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmoe.nn.mlp import ExpertMlp, Mlp, drop
from tests.drawn import drawn, normal
from tests.tolerance import tolerance

E, N, D, F = 3, 5, 4, 7


def slow_mlp(x, w_in, b_in, w_out, b_out):
    x, w_in, b_in, w_out, b_out = (np.asarray(a, np.float64) for a in (x, w_in, b_in, w_out, b_out))
    hidden = x @ w_in + b_in
    hidden = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    return hidden @ w_out + b_out


def parameters(mlp):
    return [getattr(mlp, name)[...] for name in ("w_in", "b_in", "w_out", "b_out")]


def test_a_perceptron_applies_tanh_gelu_between_two_layers():
    mlp, x = drawn(functools.partial(Mlp, D, F)), normal(2, N, D)
    np.testing.assert_allclose(mlp(x), slow_mlp(x, *parameters(mlp)), **tolerance(jnp.float32))


def test_each_expert_has_its_own_parameters_and_tokens():
    experts, x = drawn(functools.partial(ExpertMlp, E, D, F)), normal(E, N, D)
    expected = [slow_mlp(x[e], *(p[e] for p in parameters(experts))) for e in range(E)]
    np.testing.assert_allclose(experts(x), expected, **tolerance(jnp.float32))


def test_the_ragged_form_gives_each_expert_its_rows():
    experts, rows = drawn(functools.partial(ExpertMlp, E, D, F)), normal(N + 2, D)
    sizes = jnp.array([4, 0, 1])  # an expert without rows, and two rows of nobody
    y = jax.jit(experts.ragged)(rows, sizes)
    expected = [slow_mlp(rows[i], *(p[e] for p in parameters(experts))) for i, e in enumerate([0, 0, 0, 0, 2])]
    np.testing.assert_allclose(y[:5], expected, **tolerance(jnp.float32))
    assert np.isfinite(y).all()


def test_computation_is_in_the_dtype_asked_for():
    x = normal(E, N, D)
    assert drawn(functools.partial(ExpertMlp, E, D, F, dtype=jnp.bfloat16))(x).dtype == jnp.bfloat16
    assert drawn(functools.partial(ExpertMlp, E, D, F))(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("init", ["identical", "independent"])
def test_experts_start_alike_and_share_dropout_only_if_identical(init):
    alike = init == "identical"
    experts = nnx.jit(lambda: ExpertMlp(E, D, F, dropout=0.5, init=init, rngs=nnx.Rngs(0)))()
    for parameter in parameters(experts):
        assert bool((parameter == parameter[:1]).all()) == alike
    for name, parameter in zip(("w_in", "b_in", "w_out", "b_out"), parameters(experts), strict=True):
        setattr(experts, name, nnx.Param(jnp.broadcast_to(parameter[:1], parameter.shape)))
    x = jnp.broadcast_to(normal(1, N, D), (E, N, D))
    y = experts(x, key=jax.random.key(1))
    assert np.allclose(y, y[:1]) == alike  # the same weights and tokens: only the masks can differ
    np.testing.assert_allclose(experts(x), experts(x)[:1].repeat(E, axis=0), **tolerance(jnp.float32))


def test_dropout_zeroes_at_its_rate_and_keeps_the_mean():
    x = drop(jnp.ones((200, 300)), 0.25, jax.random.key(0))
    np.testing.assert_allclose(np.unique(x), [0, 1 / 0.75], rtol=1e-6)
    assert np.mean(x == 0) == pytest.approx(0.25, abs=5 * np.sqrt(0.25 * 0.75 / x.size))


def test_one_dropout_mask_serves_the_shared_axis():
    x = np.asarray(drop(jnp.ones((E, 40)), 0.5, jax.random.key(0), 0))
    assert (x == x[:1]).all()
    assert 0 < (x == 0).sum() < x.size
