import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import gather_rows, implementations
from tests.kernels_pallas.index_pairs import CASES, index_pair
from tests.tolerance import tolerance

every_implementation = pytest.mark.parametrize("implementation", implementations()["gather_rows"])
every_case = pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
every_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradient(implementation, x, slots, choice, dout):
    out, back = jax.vjp(lambda x: gather_rows(x, slots, choice, implementation=implementation), x)
    return out, back(dout)[0]


@every_implementation
@every_case
@every_dtype
def test_slots_hold_their_tokens_and_tokens_sum_their_gradients(implementation, sizes, dtype):
    n, k, m, d = sizes
    slots, choice = index_pair(0, n, k, m)
    rng = np.random.default_rng(1)
    x, dout = (jnp.asarray(rng.normal(size=(rows, d)), dtype) for rows in (n, m))
    out, dx = values_and_gradient(implementation, x, slots, choice, dout)

    expected, expected_dx = np.zeros((m, d)), np.zeros((n, d))
    for i in range(m):
        if 0 <= choice[i] < n * k:
            token = choice[i] // k
            expected[i] = x[token]
            expected_dx[token] += np.asarray(dout[i], np.float64)
    assert out.dtype == dx.dtype == dtype
    np.testing.assert_array_equal(np.asarray(out, np.float64), expected)  # copied, not computed
    np.testing.assert_allclose(np.asarray(dx, np.float64), expected_dx, **tolerance(dtype))


@every_implementation
def test_no_tokens_fill_no_slots(implementation):
    x, slots, choice = jnp.zeros((0, 3)), jnp.zeros((0, 2), jnp.int32), jnp.zeros(5, jnp.int32)
    assert not gather_rows(x, slots, choice, implementation=implementation).any()


@every_implementation
def test_no_slots_leave_no_gradient(implementation):
    x, slots, choice = jnp.ones((3, 2)), jnp.zeros((3, 1), jnp.int32), jnp.zeros(0, jnp.int32)
    out, dx = values_and_gradient(implementation, x, slots, choice, jnp.zeros((0, 2)))
    assert out.shape == (0, 2)
    assert not dx.any()


@every_implementation
def test_vmap_gives_the_same(implementation):
    n, k, m, d = CASES["primes"]
    pairs = [index_pair(seed, n, k, m) for seed in range(3)]
    slots, choice = (jnp.stack([jnp.asarray(pair[i]) for pair in pairs]) for i in range(2))
    rng = np.random.default_rng(1)
    x, dout = (jnp.asarray(rng.normal(size=(3, rows, d)), jnp.float32) for rows in (n, m))
    call = functools.partial(values_and_gradient, implementation)
    mapped = jax.vmap(call)(x, slots, choice, dout)
    for i in range(3):
        for actual, expected in zip(mapped, call(x[i], slots[i], choice[i], dout[i]), strict=True):
            np.testing.assert_allclose(actual[i], expected, **tolerance(jnp.float32))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (
            {"slots": jnp.zeros((4, 2), jnp.int32)},
            ValueError,
            r"gather_rows wants one row of slots for each of the 3 tokens; slots has shape \(4, 2\)\.",
        ),
        (
            {"slots": jnp.zeros((3, 2), jnp.float32)},
            ValueError,
            r"gather_rows wants integers in slots; it got float32\.",
        ),
        ({"choice": jnp.zeros(5, bool)}, ValueError, r"gather_rows wants integers in choice; it got bool\."),
        (
            {"choice": jnp.zeros((5, 1), jnp.int32)},
            ValueError,
            r"gather_rows wants slots \[n, k\] and choice \[m\]; it got shapes \(3, 2\) and \(5, 1\)\.",
        ),
        (
            {"implementation": "cuda"},
            NotImplementedError,
            r"gather_rows has no implementation 'cuda'; use one of 'pallas', 'xla', 'reference', or None\.",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, error, sentence):
    arguments = {"x": jnp.ones((3, 2)), "slots": jnp.zeros((3, 2), jnp.int32), "choice": jnp.zeros(5, jnp.int32)}
    with pytest.raises(error, match=sentence):
        gather_rows(**arguments | change)
