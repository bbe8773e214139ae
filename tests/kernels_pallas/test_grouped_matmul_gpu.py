import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import grouped_matmul
from kernels_pallas.grouped_matmul import gpu
from tests.aot import WIDTHS
from tests.kernels_pallas.cuda import triton_kernels
from tests.tolerance import tolerance

GPU = "interpret-gpu"
M, K, N = 83, 37, 29  # rows, contracted, columns: tails everywhere
SMALL = gpu.TileConfig(rows=16, columns=16, depth=64, num_warps=4)  # many tiles, several turns
GROUPS = {  # of four as a rule, so that one program serves them
    "all rows owned, groups of whole tiles and not": (32, 3, 16, 32),
    "an empty group, and a row of its own": (41, 0, 1, 41),
    "empty first and last": (0, 60, 1, 0),
    "rows beyond the last group": (17, 5, 16, 2),
    "one group has all": (0, 0, 83, 0),
    "nobody has rows": (0, 0, 0, 0),
    "there is one group": (79,),
}
every_groups = pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
every_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])


def gelu(x):
    return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


ACTIVATIONS = {
    "gelu": gelu,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    None: lambda x: x,
}


def draw(seed, groups, dtype, rows=M):
    """Operands of about the size that a trained layer has: sums over them are of the order of 1."""
    rng = np.random.default_rng(seed)
    shapes = ((rows, K), (groups, K, N), (rows, N), (groups, N))
    return tuple(jnp.asarray(rng.normal(size=s) / np.sqrt(K), dtype) for s in shapes)


def as_float64(x):
    return np.asarray(x, np.float64)


def owner(sizes, rows=M):
    """The group of each row, or None."""
    groups = [group for group, size in enumerate(sizes) for _ in range(size)]
    return (groups + [None] * rows)[:rows]


def check(actual, expected, dtype, name=""):
    assert actual.dtype == dtype
    close = tolerance(dtype, np.abs(expected).max())
    np.testing.assert_allclose(as_float64(actual), expected, **close, err_msg=name)


@jax.jit
def products(x, w, dout, group_sizes):
    """out, dx and dw of the plain multiply, in small tiles."""
    options = {"interpret": True, "config": SMALL}
    (out,) = gpu.grouped_matmul(x, w, group_sizes, **options)
    (dx,) = gpu.grouped_matmul(dout, w, group_sizes, transposed=True, **options)
    (dw,) = gpu.grouped_outer(x, dout, group_sizes, **options)
    return out, dx, dw


@every_dtype
@every_groups
def test_each_row_meets_the_matrix_of_its_group(sizes, dtype):
    x, w, dout, _ = draw(0, len(sizes), dtype)
    out, dx, dw = products(x, w, dout, jnp.asarray(sizes, jnp.int32))
    expected, expected_dx, expected_dw = np.zeros((M, N)), np.zeros((M, K)), np.zeros(w.shape)
    for row, group in enumerate(owner(sizes)):
        if group is not None:
            expected[row] = as_float64(x[row]) @ as_float64(w[group])
            expected_dx[row] = as_float64(w[group]) @ as_float64(dout[row])
            expected_dw[group] += np.outer(as_float64(x[row]), as_float64(dout[row]))
    for actual, oracle in ((out, expected), (dx, expected_dx), (dw, expected_dw)):
        check(actual, oracle, dtype)
    assert not out[sum(sizes) :].any()
    assert not dx[sum(sizes) :].any()
    assert not dw[np.array(sizes) == 0].any()


@pytest.mark.parametrize(
    ("activation", "dtype"), [*((name, jnp.float32) for name in ACTIVATIONS), ("gelu", jnp.bfloat16)], ids=str
)
def test_rows_are_gathered_and_results_finished_in_the_kernel(activation, dtype):
    sizes, rows = (17, 0, 34), 71
    x, w, _, bias = draw(1, len(sizes), dtype)
    index = np.random.default_rng(2).integers(0, M, rows)
    index[[3, 11, 20, 30]] = [-1, M, 2**30, -M]  # which read nothing
    extras = ("index", "bias")
    call = functools.partial(
        gpu.grouped_matmul, extras=extras, activation=activation, keep=True, interpret=True, config=SMALL
    )
    after, before = jax.jit(call)(x, w, jnp.array(sizes), jnp.asarray(index, jnp.int32), bias)
    expected = np.zeros((rows, N))
    for row, group in enumerate(owner(sizes, rows)):
        if group is not None:
            read = as_float64(x[index[row]]) if 0 <= index[row] < M else np.zeros(K)
            expected[row] = read @ as_float64(w[group]) + as_float64(bias[group])
    check(before, expected, dtype, "before the activation")
    check(after, ACTIVATIONS[activation](expected), dtype, "after it")
    assert not after[sum(sizes) :].any()


@every_dtype
def test_the_op_and_its_gradients_with_tiles_of_the_usual_size(dtype):
    sizes, r, c = (40, 0, 150, 7), 67, 3
    x, w, _, bias = draw(3, len(sizes), dtype, rows=r)
    slots, choice = np.full((r, c), -1), np.full(r * c, r * c)
    places = np.random.default_rng(4).permutation(r * c)[:190]
    slots.flat[places], choice[:190] = np.arange(190), places
    slots, choice = (jnp.asarray(a, jnp.int32) for a in (slots, choice))
    dout = jnp.asarray(np.random.default_rng(5).normal(size=(r * c, N)), dtype)

    @functools.partial(jax.jit, static_argnums=0)
    def values_and_gradients(implementation, x, w, bias, rows, dout):
        def call(x, w, bias):
            options = {"rows": rows, "bias": bias, "activation": "silu", "implementation": implementation}
            return grouped_matmul(x, w, jnp.array(sizes), **options)

        out, back = jax.vjp(call, x, w, bias)
        return out, *back(dout)

    out, dx, dw, dbias = values_and_gradients(GPU, x, w, bias, (slots, choice), dout)
    expected, before = np.zeros((r * c, N)), np.zeros((r * c, N))
    expected_dx, expected_dw, expected_dbias = np.zeros(x.shape), np.zeros(w.shape), np.zeros(bias.shape)
    for row, group in enumerate(owner(sizes, r * c)):
        if group is not None:
            token = int(choice[row]) // c
            read = as_float64(x[token]) if token < r else np.zeros(K)
            before[row] = read @ as_float64(w[group]) + as_float64(bias[group])
            sigmoid = 1 / (1 + np.exp(-before[row]))
            expected[row] = before[row] * sigmoid
            kept = as_float64(jnp.asarray(before[row], dtype))  # the gradient starts from what was kept
            sigmoid = 1 / (1 + np.exp(-kept))
            d = as_float64(dout[row]) * sigmoid * (1 + kept * (1 - sigmoid))
            d = as_float64(jnp.asarray(d, dtype))
            if token < r:
                expected_dx[token] += as_float64(w[group]) @ d
            expected_dw[group] += np.outer(read, d)
            expected_dbias[group] += d
    for name, actual, oracle in (
        ("out", out, expected),
        ("dx", dx, expected_dx),
        ("dw", dw, expected_dw),
        ("dbias", dbias, expected_dbias),
    ):
        check(actual, oracle, dtype, name)


def test_rows_of_other_groups_and_of_none_are_not_read():
    x, w, dout, _ = draw(6, 4, jnp.float32)
    sizes = jnp.array([20, 30, 0, 2])
    nothing = jnp.arange(M)[:, None] >= 52
    x, dout = (jnp.where(nothing, jnp.nan, a) for a in (x, dout))
    for result in products(x, w, dout, sizes):
        assert jnp.isfinite(result).all()
    out, _, dw = products(x.at[19].set(jnp.nan), w, dout, sizes)  # a row of group 0
    np.testing.assert_array_equal(jnp.isnan(out).all(axis=1), np.arange(M) == 19)
    np.testing.assert_array_equal(jnp.isnan(dw).any(axis=(1, 2)), [True, False, False, False])


@pytest.mark.parametrize("sizes", [(80, 40, 0, 5), (83, 1, 2**30, 0)], ids=str)
def test_sizes_that_pass_the_number_of_rows_stop_there(sizes):
    arrays = draw(7, 4, jnp.float32)[:3]
    within = jnp.diff(jnp.minimum(jnp.cumsum(jnp.array((0, *sizes))), M))
    for passing, stopping in zip(products(*arrays, jnp.array(sizes)), products(*arrays, within), strict=True):
        np.testing.assert_array_equal(passing, stopping)


@pytest.mark.parametrize("sizes", [*GROUPS.values(), (16, 16, 51), (1,) * 83, (0,) * 5 + (83,)], ids=str)
def test_every_row_is_in_one_tile_of_its_group(sizes):
    group, first, end, owned = map(np.asarray, jax.jit(gpu._tiles, static_argnums=(1, 2))(jnp.array(sizes), M, 16))
    found = [[] for _ in range(M)]
    for tile in range(len(group)):
        assert 0 <= group[tile] < len(sizes)
        assert end[tile] - first[tile] <= 16
        for row in range(first[tile], end[tile]):
            found[row].append(group[tile] if owned[tile] else None)
    assert found == [[group] for group in owner(sizes)]


@pytest.mark.parametrize(
    ("shapes", "options", "sentence"),
    [
        (
            ((5, 3), (2, 3, 7)),
            {"dtypes": ("float32", "bfloat16")},
            "The GPU kernel takes two arrays of float32, bfloat16 or float16, not float32 and bfloat16.",
        ),
        (
            ((5, 3), (2, 3, 7)),
            {"dtypes": ("int8", "int8")},
            "The GPU kernel takes two arrays of float32, bfloat16 or float16, not int8 and int8.",
        ),
        (
            ((0, 3), (2, 3, 7)),
            {},
            "The GPU kernel wants no empty array; it got (0, 3) and (2, 3, 7), for 0 rows.",
        ),
        (
            ((5, 3), (5, 0)),
            {},
            "The GPU kernel wants no empty array; it got (5, 3) and (5, 0), for 5 rows.",
        ),
        (
            ((5, 3), (2, 3, 7)),
            {"activation": "tanh"},
            "The GPU kernel takes an index, a bias and an activation that it knows, not 'tanh'.",
        ),
        (
            ((5, 3), (2, 3, 7)),
            {"extras": ("scale",), "more": ((7,),)},
            "The GPU kernel takes an index, a bias and an activation that it knows, not 'scale'.",
        ),
        (
            ((2**16, 8), (2, 8, 2**15)),
            {},
            "The GPU kernel takes arrays of at most 2147483647 elements, not 2147483648.",
        ),
        (
            ((2, 2**15), (2, 2**15)),
            {},
            "The GPU kernel takes arrays of at most 2147483647 elements, not 2147483648.",
        ),
        (((2**16, 8), (2, 2**15 - 1, 8)), {"transposed": True}, None),
        (((5, 3), (2, 3, 7)), {"extras": ("index", "bias"), "more": ((9,), (2, 7)), "activation": "relu"}, None),
    ],
)
def test_what_the_kernel_cannot_take_is_refused(shapes, options, sentence):
    struct, options = jax.ShapeDtypeStruct, dict(options)
    dtypes = options.pop("dtypes", ("float32", "float32"))
    more = [struct(shape, jnp.int32) for shape in options.pop("more", ())]
    operands = [struct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    assert gpu.refusal(*operands, struct((2,), jnp.int32), *more, **options) == sentence


@pytest.mark.parametrize("depth", [32, 96])
def test_a_tile_is_what_a_product_takes(depth):
    with pytest.raises(
        ValueError, match=rf"TileConfig wants a power of two of at least 64 for depth; it got {depth}\."
    ):
        gpu.TileConfig(depth=depth)


def kernels_of_gradients(width, dtype, implementation, activation):
    """The kernels of the op and its gradients at the size of B/16, 8 images; with an activation all parts are fused."""
    r, c, m, e = 1576, 2, 3328, 8
    shape = jax.ShapeDtypeStruct
    x, w, bias = (shape(s, dtype) for s in ((r, width), (e, width, 4 * width), (e, 4 * width)))
    sizes, slots, choice = (shape(s, jnp.int32) for s in ((e,), (r, c), (m,)))

    def gradients(x, w, bias, sizes, slots, choice):
        def call(x, w, bias):
            options = {"rows": (slots, choice), "bias": bias} if activation else {}
            return grouped_matmul(x, w, sizes, activation=activation, implementation=implementation, **options)

        out, back = jax.vjp(call, x, w, bias)
        return back(out)

    return sorted(triton_kernels(gradients, x, w, bias, sizes, slots, choice))


PRODUCTS = ["jmoe_grouped_matmul", "jmoe_grouped_matmul", "jmoe_grouped_outer"]


@every_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_the_op_lowers_for_cuda_at_published_widths(width, dtype):
    assert kernels_of_gradients(width, dtype, "pallas", "gelu") == ["jmoe_gather_sum"] * 2 + PRODUCTS


@pytest.mark.parametrize(("activation", "gathers"), [(None, 0), ("relu", 2), ("silu", 2)], ids=str)
def test_other_activations_lower_for_cuda(activation, gathers):
    assert kernels_of_gradients(768, jnp.bfloat16, "pallas", activation) == ["jmoe_gather_sum"] * gathers + PRODUCTS


def test_xla_is_the_default_until_a_gpu_has_shown_which_is_faster():
    assert kernels_of_gradients(768, jnp.bfloat16, None, "gelu") == []
