import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jmoe.nn.attention import AttentionPool, attention
from tests.drawn import drawn, normal
from tests.tolerance import tolerance

B, T, D, HEADS = 2, 5, 6, 3


def slow_attention(layer, queries, tokens):
    """The definition, one head and one query at a time."""
    queries, tokens = (np.asarray(a, np.float64) for a in (queries, tokens))

    def project(name, x, head):
        part = getattr(layer, name)
        return x @ np.asarray(part.kernel)[:, head] + np.asarray(part.bias)[head]

    def norm(name, x):
        if not hasattr(layer, name) or getattr(layer, name) is None:
            return x
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * np.asarray(getattr(layer, name).scale)

    y = np.zeros(queries.shape) + np.asarray(layer.out.bias)
    for b in range(len(tokens)):
        for head in range(HEADS):
            q = norm("query_ln", project("query", queries[b], head))
            k = norm("key_ln", project("key", tokens[b], head))
            scores = np.exp(q @ k.T / np.sqrt(D // HEADS))
            weights = scores / scores.sum(axis=1, keepdims=True)
            y[b] += weights @ project("value", tokens[b], head) @ np.asarray(layer.out.kernel)[head]
    return y


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_equals_its_definition(qk_norm):
    layer, x = drawn(functools.partial(attention, D, HEADS, qk_norm=qk_norm)), normal(B, T, D)
    np.testing.assert_allclose(layer(x, deterministic=True), slow_attention(layer, x, x), **tolerance("float32", 10))


@pytest.mark.parametrize(("dtype", "logits"), [("float32", "f32"), ("bfloat16", "bf16")])
def test_of_many_tokens_logits_are_kept_in_the_dtype_of_the_computation(dtype, logits, monkeypatch):
    layer, x = drawn(functools.partial(attention, D, HEADS, dtype=jnp.dtype(dtype))), normal(B, T, D).astype(dtype)
    expected = layer(x, deterministic=True)
    monkeypatch.setattr("jmoe.nn.attention.MANY_TOKENS", T - 1)
    np.testing.assert_allclose(layer(x, deterministic=True), expected, **tolerance(dtype, 10))
    program = str(jax.make_jaxpr(lambda x: layer(x, deterministic=True))(x))
    assert f"{logits}[{B},{HEADS},{T},{T}] = dot_general" in program


def test_attention_pooling_is_one_query_over_all_tokens_and_a_perceptron():
    pool, x = drawn(functools.partial(AttentionPool, D, HEADS, 7)), normal(B, T, D)
    probe = np.broadcast_to(np.asarray(pool.probe), (B, 1, D))
    pooled = jnp.asarray(slow_attention(pool.attention, probe, x)[:, 0], jnp.float32)
    expected = pooled + pool.mlp(pool.norm(pooled))
    np.testing.assert_allclose(pool(x), expected, **tolerance("float32", 10))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match=r"^num_heads=4 does not divide the model width 6\.$"):
        attention(6, 4, rngs=nnx.Rngs(0))
