import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import combine_rows, gather_rows
from kernels_pallas.rows import gather_dot, gather_sum, gpu
from tests.aot import WIDTHS
from tests.kernels_pallas.cuda import triton_kernels
from tests.kernels_pallas.index_pairs import index_pair
from tests.tolerance import tolerance

GPU = "interpret-gpu"
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
BLOCKS = {  # rows n to read, m to write, d wide, rows and columns of a block
    "whole blocks": (23, 16, 64, 8, 32),
    "tails of both": (23, 19, 83, 4, 32),
    "one block that is larger than all": (5, 3, 7, 16, 256),
    "one row, one column": (1, 1, 1, 8, 256),
}
every_block = pytest.mark.parametrize("sizes", BLOCKS.values(), ids=BLOCKS)
SUMS = {  # of which blocks, k rows per sum, with weights or not
    "copies": ("tails of both", 1, False),
    "two by weight": ("tails of both", 2, True),
    "three": ("whole blocks", 3, False),
    "more than are unrolled": ("tails of both", gpu.UNROLL + 3, True),
    "of a small array": ("one block that is larger than all", 2, True),
    "of a single number": ("one row, one column", 1, True),
}


def near(dtype, scale=1.0):
    return tolerance("bfloat16" if dtype == jnp.float16 else dtype, scale)  # float16 rounds more finely than bfloat16


def draw(seed, n, m, d, k, dtype):
    """x, index, weights and other; a third of the indices name nothing: -1, n, or farther outside."""
    rng = np.random.default_rng(seed)
    index = rng.integers(0, n, (m, k))
    nothing = rng.choice([-1, -n, n, n + 1, 2**31 - 1, -(2**31)], (m, k))
    index = np.where(rng.uniform(size=(m, k)) < 1 / 3, nothing, index).astype(np.int32)
    x, other = (jnp.asarray(rng.normal(size=(rows, d)), dtype) for rows in (n, m))
    return x, index, rng.normal(size=(m, k)).astype(np.float32), other


def as_float64(x):
    return np.asarray(x, np.float64)


@every_dtype
@pytest.mark.parametrize(("blocks", "k", "weighted"), SUMS.values(), ids=SUMS)
def test_gather_sum_is_the_sum_of_the_rows_that_are_named(blocks, k, weighted, dtype):
    n, m, d, rows, columns = BLOCKS[blocks]
    x, index, weights, _ = draw(0, n, m, d, k, dtype)
    call = functools.partial(gpu.gather_sum, interpret=True, config=gpu.TileConfig(rows=rows, columns=columns))
    (out,) = jax.jit(call)(x, index, weights if weighted else None)
    expected = np.zeros((m, d))
    for i in range(m):
        for j in range(k):
            if 0 <= index[i, j] < n:
                expected[i] += (weights[i, j] if weighted else 1) * as_float64(x[index[i, j]])
    assert (out.shape, out.dtype) == ((m, d), dtype)
    if k == 1:  # copied, not computed
        np.testing.assert_array_equal(as_float64(out), expected)
    np.testing.assert_allclose(as_float64(out), expected, **near(dtype, np.abs(expected).max()))


@every_dtype
@every_block
def test_gather_dot_scales_rows_and_multiplies_them_with_others(sizes, dtype):
    n, m, d, rows, columns = sizes
    x, index, weights, other = draw(1, n, m, d, 1, dtype)
    index, weights = index[:, 0], weights[:, 0]
    call = functools.partial(gpu.gather_dot, interpret=True, config=gpu.TileConfig(rows=rows, columns=columns))
    scaled, products = jax.jit(call)(x, index, weights, other)
    expected, expected_products = np.zeros((m, d)), np.zeros(m)
    for i in range(m):
        if 0 <= index[i] < n:
            expected[i] = weights[i] * as_float64(x[index[i]])
            expected_products[i] = as_float64(x[index[i]]) @ as_float64(other[i])
    assert (scaled.dtype, products.dtype) == (dtype, jnp.float32)
    np.testing.assert_allclose(as_float64(scaled), expected, **near(dtype))
    np.testing.assert_allclose(products, expected_products, **tolerance(jnp.float32, np.sqrt(d)))  # summed in float32


@every_dtype
def test_dispatch_and_combine_and_their_gradients(dtype):
    n, k, m, d = 29, 2, 37, 83
    slots, choice = index_pair(0, n, k, m)
    rng = np.random.default_rng(2)
    x, dx_out, y, dy_out = (jnp.asarray(rng.normal(size=(rows, d)), dtype) for rows in (n, m, m, n))
    weights = rng.uniform(size=(n, k)).astype(np.float32)

    @jax.jit
    def values_and_gradients(slots, choice, x, dx_out, y, weights, dy_out):
        dispatched, back = jax.vjp(lambda x: gather_rows(x, slots, choice, implementation=GPU), x)
        dx = back(dx_out)[0]
        combined, back = jax.vjp(lambda y, w: combine_rows(y, slots, w, choice, implementation=GPU), y, weights)
        return dispatched, dx, combined, *back(dy_out)

    dispatched, dx, combined, dy, dweights = values_and_gradients(slots, choice, x, dx_out, y, weights, dy_out)
    expected = {name: np.zeros(a.shape) for name, a in (("dispatched", y), ("dx", x), ("combined", x), ("dy", y))}
    expected["dweights"] = np.zeros((n, k))
    for token in range(n):
        for j in range(k):
            slot = slots[token, j]
            if 0 <= slot < m:
                expected["dispatched"][slot] = as_float64(x[token])
                expected["dx"][token] += as_float64(dx_out[slot])
                expected["combined"][token] += weights[token, j] * as_float64(y[slot])
                expected["dy"][slot] = weights[token, j] * as_float64(dy_out[token])
                expected["dweights"][token, j] = as_float64(dy_out[token]) @ as_float64(y[slot])
    actual = {"dispatched": dispatched, "dx": dx, "combined": combined, "dy": dy}
    for name, value in actual.items():
        np.testing.assert_allclose(as_float64(value), expected[name], **near(dtype, 2), err_msg=name)
    np.testing.assert_allclose(dweights, expected["dweights"], **tolerance(jnp.float32, np.sqrt(d)))


def test_what_nobody_names_is_not_read():
    x = jnp.full((5, 3), jnp.nan).at[2].set([1.0, 2.0, 3.0])
    index = jnp.array([[2, -1], [5, 2], [-5, 7]])
    np.testing.assert_array_equal(
        gather_sum(x, index, jnp.ones((3, 2)), implementation=GPU), [[1, 2, 3], [1, 2, 3], [0, 0, 0]]
    )
    other = jnp.full((3, 3), jnp.nan).at[0].set(1.0)
    scaled, products = gather_dot(x, jnp.array([2, 5, -1]), jnp.ones(3), other, implementation=GPU)
    np.testing.assert_array_equal(scaled, [[1, 2, 3], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(products, [6, 0, 0])


def test_an_index_of_64_bits_does_not_wrap_round_into_range():
    with jax.enable_x64():
        index = jnp.array([[2**32 + 1], [1], [-(2**32)]], jnp.int64)
        (out,) = gpu.gather_sum(jnp.ones((3, 2), jnp.float32), index, interpret=True)
    np.testing.assert_array_equal(out, [[0, 0], [1, 1], [0, 0]])


def test_vmap_gives_the_same():
    draws = [draw(seed, 11, 7, 5, 2, jnp.float32) for seed in range(3)]
    x, index, weights, _ = (jnp.stack([jnp.asarray(a) for a in arrays]) for arrays in zip(*draws, strict=True))
    mapped = jax.vmap(lambda *arrays: gather_sum(*arrays, implementation=GPU))(x, index, weights)
    for i in range(3):
        np.testing.assert_allclose(
            mapped[i], gather_sum(x[i], index[i], weights[i], implementation="xla"), **tolerance(jnp.float32)
        )


@pytest.mark.parametrize(
    ("x", "index", "sentence"),
    [
        ((5, 3, jnp.int32), (7, 2), "The GPU kernel takes float32, bfloat16 and float16, not int32."),
        ((0, 3, jnp.float32), (7, 2), "The GPU kernel wants at least one row to read and one to write, not 0 and 7."),
        ((5, 3, jnp.float32), (0, 2), "The GPU kernel wants at least one row to read and one to write, not 5 and 0."),
        ((5, 0, jnp.float32), (7, 2), "The GPU kernel wants at least one column and one row per sum, not 0 and 2."),
        ((5, 3, jnp.float32), (7, 0), "The GPU kernel wants at least one column and one row per sum, not 3 and 0."),
        (
            (2**21, 2**10, jnp.bfloat16),
            (7,),
            "The GPU kernel takes arrays of at most 2147483647 elements, not 2147483648.",
        ),
    ],
)
def test_what_the_kernel_cannot_take_is_refused(x, index, sentence):
    shapes = jax.ShapeDtypeStruct(x[:2], x[2]), jax.ShapeDtypeStruct(index, jnp.int32)
    assert gpu.refusal(*shapes) == sentence


def test_the_largest_array_is_taken():
    shapes = jax.ShapeDtypeStruct((2**21 - 1, 2**10), jnp.bfloat16), jax.ShapeDtypeStruct((7, 2), jnp.int32)
    assert gpu.refusal(*shapes) is None


def test_a_refusal_is_what_a_user_reads():
    sentence = (
        r"gather_sum \(of gather_rows and combine_rows\): The GPU kernel takes float32, bfloat16 and float16, not"
    )
    with pytest.raises(NotImplementedError, match=sentence):
        gather_sum(jnp.ones((3, 2), jnp.float8_e4m3fn), jnp.zeros((3, 1), jnp.int32), implementation=GPU)


def test_a_block_is_a_power_of_two():
    with pytest.raises(ValueError, match=r"TileConfig wants a power of two for columns; it got 768\."):
        gpu.TileConfig(columns=768)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("width", WIDTHS)
def test_the_ops_lower_for_cuda_at_published_widths(width, dtype):
    n, k, m = 1576, 2, 3328  # 8 images of B/16
    shape = jax.ShapeDtypeStruct
    x, y, weights = shape((n, width), dtype), shape((m, width), dtype), shape((n, k), jnp.float32)
    slots, choice = shape((n, k), jnp.int32), shape((m,), jnp.int32)

    def both(implementation):
        def gradients(x, y, slots, weights, choice):
            dispatched, back = jax.vjp(lambda x: gather_rows(x, slots, choice, implementation=implementation), x)
            combined, back_y = jax.vjp(
                lambda y, w: combine_rows(y, slots, w, choice, implementation=implementation), y, weights
            )
            return back(dispatched), back_y(combined)

        return triton_kernels(gradients, x, y, slots, weights, choice)

    assert sorted(both("pallas")) == ["jmoe_gather_dot"] + 3 * ["jmoe_gather_sum"]
    if width == WIDTHS[0]:
        assert both(None) == []  # XLA's gathers are the default until a GPU has shown which is faster


def test_sums_of_many_rows_lower_for_cuda():
    shape = jax.ShapeDtypeStruct
    arrays = (
        shape((53, 96), jnp.float16),
        shape((7, gpu.UNROLL + 1), jnp.int32),
        shape((7, gpu.UNROLL + 1), jnp.float32),
    )
    assert triton_kernels(lambda *a: gather_sum(*a, implementation="pallas"), *arrays) == ["jmoe_gather_sum"]
