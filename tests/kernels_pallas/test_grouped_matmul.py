import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import grouped_matmul, implementations, per_platform
from tests.tolerance import tolerance

M, K, N = 13, 5, 3  # rows, contracted, columns
GROUPS = {
    "all rows owned": (4, 2, 7),
    "an empty group": (4, 0, 6),
    "empty first and last": (0, 9, 0),
    "rows beyond the last group": (2, 3, 1),
    "one group": (13,),
    "one group of some rows": (5,),
    "nobody has rows": (0, 0),
}

every_implementation = pytest.mark.parametrize("implementation", implementations()["grouped_matmul"])
every_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])


@functools.partial(jax.jit, static_argnums=0)
def values_and_gradients(implementation, x, w, group_sizes, dout):
    out, back = jax.vjp(lambda x, w: grouped_matmul(x, w, group_sizes, implementation=implementation), x, w)
    return out, *back(dout)


def random_case(seed, groups, dtype, rows=M):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=s), dtype) for s in ((rows, K), (groups, K, N), (rows, N)))


@every_implementation
@every_dtype
@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
def test_each_row_meets_the_matrix_of_its_group(implementation, sizes, dtype):
    x, w, dout = random_case(0, len(sizes), dtype)
    out, dx, dw = values_and_gradients(implementation, x, w, jnp.asarray(sizes, jnp.int32), dout)

    x64, w64, dout64 = (np.asarray(a, np.float64) for a in (x, w, dout))
    expected, expected_dx, expected_dw = np.zeros((M, N)), np.zeros((M, K)), np.zeros((len(sizes), K, N))
    row = 0
    for group, size in enumerate(sizes):
        for _ in range(size):
            expected[row] = x64[row] @ w64[group]
            expected_dx[row] = w64[group] @ dout64[row]
            expected_dw[group] += np.outer(x64[row], dout64[row])
            row += 1
    assert out.dtype == dx.dtype == dw.dtype == dtype
    for actual, oracle in ((out, expected), (dx, expected_dx), (dw, expected_dw)):
        np.testing.assert_allclose(np.asarray(actual, np.float64), oracle, **tolerance(dtype, np.abs(oracle).max()))
    assert not out[sum(sizes) :].any()
    assert not dx[sum(sizes) :].any()


@every_implementation
def test_no_rows_at_all(implementation):
    x, w, dout = random_case(0, 2, jnp.float32, rows=0)
    out, dx, dw = values_and_gradients(implementation, x, w, jnp.zeros(2, jnp.int32), dout)
    assert (out.shape, dx.shape) == ((0, N), (0, K))
    assert not dw.any()


@every_implementation
def test_vmap_gives_the_same(implementation):
    cases = [random_case(seed, 3, jnp.float32) for seed in range(2)]
    x, w, dout = (jnp.stack(arrays) for arrays in zip(*cases, strict=True))
    sizes = jnp.array([[4, 2, 7], [0, 5, 3]])
    call = functools.partial(values_and_gradients, implementation)
    mapped = jax.vmap(call)(x, w, sizes, dout)
    for i in range(2):
        for actual, expected in zip(mapped, call(x[i], w[i], sizes[i], dout[i]), strict=True):
            np.testing.assert_allclose(actual[i], expected, **tolerance(jnp.float32, np.abs(expected).max()))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        (
            {"w": jnp.ones((3, 4, 2))},
            ValueError,
            r"grouped_matmul wants x \[m, k\] and w \[e, k, n\]; it got \(13, 5\) and \(3, 4, 2\)\.",
        ),
        (
            {"group_sizes": jnp.ones(2, jnp.int32)},
            ValueError,
            r"grouped_matmul wants one group size for each of the 3 matrices; it got \(2,\)\.",
        ),
        (
            {"w": jnp.ones((3, 5, 2), jnp.bfloat16)},
            ValueError,
            r"grouped_matmul wants x and w of one dtype; it got float32 and bfloat16\.",
        ),
        ({"group_sizes": jnp.ones(3)}, ValueError, r"grouped_matmul wants integers in group_sizes; it got float32\."),
        (
            {"implementation": "triton"},
            NotImplementedError,
            r"grouped_matmul has no implementation 'triton'; use one of 'pallas', 'xla', 'reference', or None\.",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, error, sentence):
    arguments = {"x": jnp.ones((13, 5)), "w": jnp.ones((3, 5, 2)), "group_sizes": jnp.ones(3, jnp.int32)}
    with pytest.raises(error, match=sentence):
        grouped_matmul(**arguments | change)


def test_the_implementation_that_runs_by_default_is_logged_once(caplog, monkeypatch):
    monkeypatch.setattr(per_platform, "_said", set())
    x, w, _ = random_case(0, 1, jnp.float32)
    with caplog.at_level(logging.INFO, "kernels_pallas"):
        for _ in range(2):
            grouped_matmul(x, w, jnp.array([M]))
    assert caplog.messages == ["grouped_matmul runs as 'xla' here."]
