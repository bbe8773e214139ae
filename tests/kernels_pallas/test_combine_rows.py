import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import combine_rows, implementations
from tests.kernels_pallas.index_pairs import CASES, index_pair
from tests.tolerance import tolerance

every_implementation = pytest.mark.parametrize("implementation", implementations()["combine_rows"])
every_case = pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
every_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradients(implementation, y, slots, weights, choice, dout):
    def call(y, weights):
        return combine_rows(y, slots, weights, choice, implementation=implementation)

    out, back = jax.vjp(call, y, weights)
    return out, *back(dout)


@every_implementation
@every_case
@every_dtype
def test_tokens_sum_their_slots_by_weight(implementation, sizes, dtype):
    n, k, m, d = sizes
    slots, choice = index_pair(0, n, k, m)
    rng = np.random.default_rng(1)
    y, dout = (jnp.asarray(rng.normal(size=(rows, d)), dtype) for rows in (m, n))
    weights = rng.uniform(size=(n, k)).astype(np.float32)
    out, dy, dweights = values_and_gradients(implementation, y, slots, weights, choice, dout)

    y64, dout64 = np.asarray(y, np.float64), np.asarray(dout, np.float64)
    expected, expected_dy, expected_dweights = np.zeros((n, d)), np.zeros((m, d)), np.zeros((n, k))
    for token in range(n):
        for j in range(k):
            slot = slots[token, j]
            if 0 <= slot < m:
                expected[token] += weights[token, j] * y64[slot]
                expected_dy[slot] += weights[token, j] * dout64[token]
                expected_dweights[token, j] = dout64[token] @ y64[slot]
    assert out.dtype == dy.dtype == dtype
    assert dweights.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, **tolerance(dtype))
    np.testing.assert_allclose(np.asarray(dy, np.float64), expected_dy, **tolerance(dtype))
    np.testing.assert_allclose(dweights, expected_dweights, **tolerance(jnp.float32))  # products summed in float32


@every_implementation
def test_a_row_that_nobody_reads_may_hold_anything_finite(implementation):
    slots, choice = jnp.array([[1, 3]]), jnp.array([2, 0, 2])  # of three slots, token 0 reads slot 1 only
    y = jnp.array([[1e30], [2.0], [-1e30]])
    out, dy, dweights = values_and_gradients(
        implementation, y, slots, jnp.array([[0.5, 0.25]]), choice, jnp.ones((1, 1))
    )
    np.testing.assert_array_equal(out, [[1.0]])
    np.testing.assert_array_equal(dy, [[0.0], [0.5], [0.0]])
    np.testing.assert_array_equal(dweights, [[2.0, 0.0]])


@every_implementation
def test_no_tokens_and_no_slots(implementation):
    nobody = values_and_gradients(
        implementation,
        jnp.ones((3, 2)),
        jnp.zeros((0, 2), jnp.int32),
        jnp.zeros((0, 2)),
        jnp.zeros(3, jnp.int32),
        jnp.zeros((0, 2)),
    )
    assert [a.shape for a in nobody] == [(0, 2), (3, 2), (0, 2)]
    assert not nobody[1].any()
    nothing = values_and_gradients(
        implementation,
        jnp.ones((0, 2)),
        jnp.zeros((3, 2), jnp.int32),
        jnp.ones((3, 2)),
        jnp.zeros(0, jnp.int32),
        jnp.ones((3, 2)),
    )
    assert [a.shape for a in nothing] == [(3, 2), (0, 2), (3, 2)]
    assert not nothing[0].any()
    assert not nothing[2].any()


@every_implementation
def test_vmap_gives_the_same(implementation):
    n, k, m, d = CASES["primes"]
    pairs = [index_pair(seed, n, k, m) for seed in range(3)]
    slots, choice = (jnp.stack([jnp.asarray(pair[i]) for pair in pairs]) for i in range(2))
    rng = np.random.default_rng(1)
    y, dout, weights = (jnp.asarray(rng.normal(size=(3, *s)), jnp.float32) for s in ((m, d), (n, d), (n, k)))
    call = functools.partial(values_and_gradients, implementation)
    mapped = jax.vmap(call)(y, slots, weights, choice, dout)
    for i in range(3):
        for actual, expected in zip(mapped, call(y[i], slots[i], weights[i], choice[i], dout[i]), strict=True):
            np.testing.assert_allclose(actual[i], expected, **tolerance(jnp.float32))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (
            {"weights": jnp.ones((3, 1))},
            ValueError,
            r"combine_rows wants weights of the shape of slots, \(3, 2\); it got \(3, 1\)\.",
        ),
        (
            {"choice": jnp.zeros(4, jnp.int32)},
            ValueError,
            r"combine_rows wants a choice for each of the 5 rows of y; it got \(4,\)\.",
        ),
        ({"slots": jnp.zeros((3, 2))}, ValueError, r"combine_rows wants integers in slots; it got float32\."),
        (
            {"implementation": "cuda"},
            NotImplementedError,
            r"combine_rows has no implementation 'cuda'; use one of 'pallas', 'xla', 'reference', or None\.",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, error, sentence):
    arguments = {
        "y": jnp.ones((5, 2)),
        "slots": jnp.zeros((3, 2), jnp.int32),
        "weights": jnp.ones((3, 2)),
        "choice": jnp.zeros(5, jnp.int32),
    }
    with pytest.raises(error, match=sentence):
        combine_rows(**arguments | change)
