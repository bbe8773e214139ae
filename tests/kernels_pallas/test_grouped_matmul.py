import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import gather_rows, grouped_matmul, implementations, per_platform
from tests.kernels_pallas.grouped import ACTIVATIONS, expected
from tests.kernels_pallas.index_pairs import index_pair
from tests.tolerance import tolerance

M, K, N = 13, 5, 3  # rows, contracted, columns
GROUPS = {
    "all rows owned": (4, 2, 7),
    "an empty group": (4, 0, 6),
    "empty first and last": (0, 9, 0),
    "rows beyond the last group": (2, 3, 1),
    "sizes beyond the last row": (5, 6, 4),
    "a group beyond the last row": (14, 3),
    "one group": (13,),
    "one group of some rows": (5,),
    "nobody has rows": (0, 0),
}

every_implementation = pytest.mark.parametrize("implementation", implementations()["grouped_matmul"])
every_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])


@functools.partial(jax.jit, static_argnums=0, static_argnames="activation")
def values_and_gradients(implementation, x, w, group_sizes, dout, bias=None, rows=None, activation=None):
    """The result, and the gradients for x, w and, if there is one, bias."""

    def call(x, w, bias):
        return grouped_matmul(
            x, w, group_sizes, rows=rows, bias=bias, activation=activation, implementation=implementation
        )

    out, back = jax.vjp(call, x, w, bias)
    dx, dw, dbias = back(dout)
    return (out, dx, dw) if bias is None else (out, dx, dw, dbias)


def random_case(seed, groups, dtype, rows=M):
    """Rows, matrices and a gradient, of which sums are of the order of 1, as in a trained layer."""
    rng = np.random.default_rng(seed)
    shapes = ((rows, K), (groups, K, N), (rows, N))
    return tuple(jnp.asarray(rng.normal(size=s) / np.sqrt(K), dtype) for s in shapes)


def assert_equal(actual, oracle, dtype):
    for a, b in zip(actual, oracle, strict=False):
        assert a.dtype == dtype
        np.testing.assert_allclose(np.asarray(a, np.float64), b, **tolerance(dtype, np.abs(b).max(initial=0)))


@every_implementation
@every_dtype
@pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
def test_each_row_meets_the_matrix_of_its_group(implementation, sizes, dtype):
    x, w, dout = random_case(0, len(sizes), dtype)
    actual = values_and_gradients(implementation, x, w, jnp.asarray(sizes, jnp.int32), dout)
    assert_equal(actual, expected(x, w, sizes, dout), dtype)
    assert not actual[0][sum(sizes) :].any()
    assert not actual[1][sum(sizes) :].any()


@every_implementation
@every_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_bias_is_added_and_an_activation_applied_to_rows_that_have_a_group(implementation, dtype, activation):
    sizes = GROUPS["rows beyond the last group"]
    x, w, dout = random_case(0, len(sizes), dtype)
    bias = jnp.asarray(np.random.default_rng(1).normal(size=(len(sizes), N)), dtype)
    actual = values_and_gradients(
        implementation, x, w, jnp.asarray(sizes, jnp.int32), dout, bias=bias, activation=activation
    )
    assert_equal(actual, expected(x, w, sizes, dout, bias=bias, activation=activation), dtype)
    assert not actual[0][sum(sizes) :].any()
    assert not actual[1][sum(sizes) :].any()


@every_implementation
@every_dtype
def test_rows_of_an_index_pair_are_multiplied_as_if_they_had_been_gathered(implementation, dtype):
    tokens, choices, sizes = 7, 2, GROUPS["rows beyond the last group"]
    slots, choice = index_pair(0, tokens, choices, M)
    x = random_case(2, 1, dtype, rows=tokens)[0]
    _, w, dout = random_case(0, len(sizes), dtype)
    bias = jnp.asarray(np.random.default_rng(1).normal(size=(len(sizes), N)), dtype)
    actual = values_and_gradients(
        implementation, x, w, jnp.asarray(sizes, jnp.int32), dout, bias=bias, rows=(slots, choice), activation="gelu"
    )
    oracle = expected(x, w, sizes, dout, index=choice // choices, bias=bias, activation="gelu")
    inside = (choice[: sum(sizes)] >= 0) & (choice[: sum(sizes)] < tokens * choices)
    assert inside.any()
    assert not inside.all()
    assert_equal(actual, oracle, dtype)

    written = gather_rows(x, jnp.asarray(slots), jnp.asarray(choice))
    separately = values_and_gradients(
        implementation, written, w, jnp.asarray(sizes, jnp.int32), dout, bias=bias, activation="gelu"
    )
    assert_equal((actual[0], *actual[2:]), [np.asarray(a, np.float64) for a in (separately[0], *separately[2:])], dtype)


@every_implementation
def test_rows_of_no_group_may_hold_anything(implementation):
    sizes = jnp.array([4, 3])
    x, w, dout = random_case(0, 2, jnp.float32)
    clean = values_and_gradients(implementation, x, w, sizes, dout)
    x, dout = (a.at[7:].set(jnp.finfo(jnp.float32).max) for a in (x, dout))
    for a, b in zip(values_and_gradients(implementation, x, w, sizes, dout), clean, strict=True):
        np.testing.assert_array_equal(a[:7], b[:7])
        assert not a[7:].any()


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
        for actual, alone in zip(mapped, call(x[i], w[i], sizes[i], dout[i]), strict=True):
            np.testing.assert_allclose(actual[i], alone, **tolerance(jnp.float32, np.abs(alone).max()))


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
            {"bias": jnp.ones((2, 3))},
            ValueError,
            r"grouped_matmul wants bias \[e, n\], \(3, 2\); it got \(2, 3\)\.",
        ),
        (
            {"bias": jnp.ones((3, 2), jnp.bfloat16)},
            ValueError,
            r"grouped_matmul wants x, w and bias of one dtype; it got float32, float32 and bfloat16\.",
        ),
        (
            {"activation": "tanh"},
            ValueError,
            r"grouped_matmul has no activation 'tanh'; use one of 'gelu', 'relu', 'silu', or None\.",
        ),
        (
            {"rows": (jnp.zeros((12, 1), jnp.int32), jnp.zeros(7, jnp.int32))},
            ValueError,
            r"grouped_matmul wants one row of slots for each of the 13 tokens; slots has shape \(12, 1\)\.",
        ),
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
