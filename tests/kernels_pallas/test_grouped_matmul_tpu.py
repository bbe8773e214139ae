"""The grouped matrix multiply for TPU: interpreted, and compiled for chips that are not there."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.analysis.bound import CHIPS as FIGURES
from jmoe.analysis.bound import bound
from kernels_pallas import grouped_matmul
from kernels_pallas.grouped_matmul import tpu
from tests.aot import CHIPS, WIDTHS, compile_for, slow_but
from tests.kernels_pallas.grouped import expected
from tests.kernels_pallas.index_pairs import index_pair
from tests.kernels_pallas.interpreted import no_races
from tests.tolerance import tolerance

M, K, N = 43, 128, 384  # rows, which fill tiles of 16 but for the last, contracted, columns: one and a half blocks
TILES = tpu.TileConfig(rows=16, columns=256, ranges=2)
OUTER = tpu.OuterConfig(rows=16, depth=128, columns=256)
GROUPS = {
    "an empty group, and rows beyond the last one": (9, 0, 14, 5),
    "groups end where tiles do": (16, 16, 11),
    "sizes beyond the last row": (20, 0, 40, 3),
    "groups within one tile": (3, 2, 1, 0, 4),
    "one group": (43,),
    "nobody has rows": (0, 0),
}

every_groups = pytest.mark.parametrize("sizes", GROUPS.values(), ids=GROUPS)
every_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
every_chip = pytest.mark.parametrize("chip", CHIPS)
shape = jax.ShapeDtypeStruct


def draw(seed, groups, dtype, rows=M):
    """Rows, matrices, a gradient and a bias, of which sums are of the order of 1, as in a trained layer."""
    rng = np.random.default_rng(seed)
    shapes = ((rows, K), (groups, K, N), (rows, N), (groups, N))
    return tuple(jnp.asarray(rng.normal(size=s) / np.sqrt(K), dtype) for s in shapes)


def check(actual, oracle, dtype):
    assert actual.dtype == dtype
    scale = np.abs(oracle).max(initial=0)
    np.testing.assert_allclose(np.asarray(actual, np.float64), oracle, **tolerance(dtype, scale))


@every_groups
@pytest.mark.parametrize(("rows", "ranges"), [(8, 1), (16, 2), (8, 3)])
def test_the_plan_has_a_step_for_each_group_in_each_tile(sizes, rows, ranges):
    tiles = -(-M // rows)
    table, (count,) = tpu.plan(jnp.array(sizes), M, rows, ranges, interpret=True)
    table = np.asarray(table).reshape(ranges, -1, len(tpu.FIELDS))
    ends = [*np.minimum(np.cumsum(sizes), M), M]
    starts = [0, *ends[:-1]]
    most = 0
    for place, steps in enumerate(table):
        owned = range(place * -(-tiles // ranges), min((place + 1) * -(-tiles // ranges), tiles))
        wanted = [
            (group, tile, max(start, tile * rows), min(end, (tile + 1) * rows, M))
            for group, (start, end) in enumerate(zip(starts, ends, strict=True))
            for tile in owned
            if max(start, tile * rows) < min(end, (tile + 1) * rows)
        ]
        groups = [group for group, *_ in wanted]
        for step, (group, *inside) in zip(steps, wanted, strict=False):
            assert [*step[[0, 2, 3, 4]]] == [group, *inside]
            assert step[1] == min((other for other in groups if other > group), default=len(sizes))
        for step in steps[len(wanted) :]:  # which do nothing, and name no other blocks
            assert [*step[[0, 2]]] == [*wanted[-1][:2]]
            assert step[3] == step[4]
        most = max(most, len(wanted))
    assert count == most


@every_groups
def test_the_plan_of_gradients_has_a_step_for_each_empty_group(sizes):
    table, (count,) = tpu.plan(jnp.array(sizes), M, 8, 1, every_group=True, interpret=True)
    steps = np.asarray(table).reshape(-1, len(tpu.FIELDS))[:count]
    assert sorted({*steps[:, 0]}) == list(range(len(sizes)))
    assert all(np.diff(steps[:, 0]) >= 0)
    rows = [(group, row) for group, _, _, start, stop in steps for row in range(start, stop)]
    owners = [group for group, size in enumerate(sizes) for _ in range(size)][:M]
    assert rows == [(group, row) for row, group in enumerate(owners)]
    assert all(8 * tile <= start <= stop <= 8 * (tile + 1) or start == stop for _, _, tile, start, stop in steps)


@functools.partial(jax.jit, static_argnames="activation")
def products(x, w, dout, sizes, bias, source, index, activation):
    """Every kernel: the finished result and what the activation was of, the same of rows by index, dx, dw."""
    call = functools.partial(tpu.grouped_matmul, interpret=True, config=TILES)
    finished = functools.partial(call, activation=activation, keep=True)
    return (
        *finished(x, w, sizes, bias, extras=("bias",)),
        *finished(source, w, sizes, index, bias, extras=("index", "bias")),
        *call(dout, w, sizes, transposed=True),
        *tpu.grouped_outer(x, dout, sizes, interpret=True, config=OUTER),
    )


@pytest.mark.parametrize(
    ("sizes", "dtype", "activation"),
    [
        (GROUPS["an empty group, and rows beyond the last one"], jnp.float32, "gelu"),
        (GROUPS["sizes beyond the last row"], jnp.bfloat16, "silu"),
        *(
            pytest.param(sizes, dtype, activation, marks=pytest.mark.slow)
            for sizes in GROUPS.values()
            for dtype in (jnp.float32, jnp.bfloat16)
            for activation in ("gelu", None)
        ),
    ],
)
def test_each_row_meets_the_matrix_of_its_group(sizes, dtype, activation):
    x, w, dout, bias = draw(0, len(sizes), dtype)
    source = draw(1, 1, dtype, rows=19)[0]
    index = np.random.default_rng(2).integers(0, 19, M)
    index[[0, 7, 11, 20]] = [-1, 19, 2**30, -19]  # which read nothing
    with no_races():
        out, before, gathered, gathered_before, dx, dw = products(
            x, w, dout, jnp.array(sizes), bias, source, jnp.asarray(index, jnp.int32), activation
        )
    for rows, which, result, kept in ((x, None, out, before), (source, index, gathered, gathered_before)):
        check(result, expected(rows, w, sizes, dout, which, bias, activation)[0], dtype)
        check(kept, expected(rows, w, sizes, dout, which, bias)[0], dtype)
        assert not result[sum(sizes) :].any()
    _, expected_dx, expected_dw, _ = expected(x, w, sizes, dout)
    check(dx, expected_dx, dtype)
    check(dw, expected_dw, dtype)
    assert not dx[sum(sizes) :].any()
    assert not dw[np.array(sizes) == 0].any()


@pytest.mark.parametrize("dtype", slow_but(jnp.float32, [jnp.float32, jnp.bfloat16]), ids=str)
def test_values_and_gradients_of_the_op(dtype, monkeypatch):
    monkeypatch.setattr(tpu, "_row_tiles", lambda m, e: [16])
    tokens, choices, sizes = 17, 2, (9, 0, 14, 5)
    slots, choice = map(jnp.asarray, index_pair(0, tokens, choices, M))
    x = draw(1, 1, dtype, rows=tokens)[0]
    _, w, dout, bias = draw(0, len(sizes), dtype)

    def call(x, w, bias):
        options = {"rows": (slots, choice), "activation": "gelu", "implementation": "interpret-tpu"}
        return grouped_matmul(x, w, jnp.array(sizes), bias=bias, **options)

    with no_races():
        out, back = jax.vjp(call, x, w, bias)
        gradients = back(dout)
    oracle = expected(x, w, sizes, dout, choice // choices, bias, "gelu")
    for actual, wanted in zip((out, *gradients), oracle, strict=True):
        check(actual, wanted, dtype)


def test_rows_of_no_group_may_hold_anything():
    sizes = jnp.array([9, 3])
    x, w, dout, _ = draw(0, 2, jnp.float32)
    x, dout = (a.at[12:].set(jnp.nan) for a in (x, dout))
    with no_races():
        out, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation="interpret-tpu"), x, w)
        dx, dw = back(dout)
    for actual in (out, dx, dw):
        assert jnp.isfinite(actual).all()
        assert actual.any()
    assert not out[12:].any()
    assert not dx[12:].any()


def test_no_rows_at_all_and_no_rows_to_gather():
    _, w, dout, _ = draw(0, 2, jnp.float32, rows=0)
    sizes = jnp.array([0, 0])
    out, back = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation="interpret-tpu"), jnp.zeros((0, K)), w)
    dx, dw = back(dout)
    assert (out.shape, dx.shape) == ((0, N), (0, K))
    assert not dw.any()
    (out,) = tpu.grouped_matmul(
        jnp.zeros((0, K)), w, jnp.array([2, 3]), jnp.zeros(7, jnp.int32), extras=("index",), interpret=True
    )
    assert out.shape == (7, N)
    assert not out.any()


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("x", "w", "sentence"),
    [
        (shape((5, 128), jnp.float16), shape((2, 128, 128), jnp.float16), "takes float32 and bfloat16, not float16"),
        (shape((5, 100), jnp.float32), shape((2, 100, 128), jnp.float32), r"multiples of 128 .* not \[100, 128\]"),
        (shape((5, 128), jnp.float32), shape((2, 128, 64), jnp.float32), r"multiples of 128 .* not \[128, 64\]"),
        (
            shape((5, 2**17), jnp.float32),
            shape((2, 2**17, 128), jnp.float32),
            "holds whole columns of a matrix in vector memory, and 131072 numbers each are too many",
        ),
    ],
)
def test_what_the_kernel_cannot_take_is_refused_in_a_sentence(x, w, sentence):
    with pytest.raises(NotImplementedError, match=f"grouped_matmul: The TPU kernel .*{sentence}"):
        jax.eval_shape(functools.partial(grouped_matmul, implementation="interpret-tpu"), x, w, shape((2,), jnp.int32))


def hidden_width(width):
    return 6144 if width == 1408 else 4 * width


def program(x, w_in, b_in, w_out, sizes, rows):
    """A layer forward and backward: rows by index, bias and activation, then a plain product."""

    def layer(x, w_in, b_in, w_out):
        hidden = grouped_matmul(x, w_in, sizes, rows=rows, bias=b_in, activation="gelu", implementation="pallas")
        return grouped_matmul(hidden, w_out, sizes, implementation="pallas")

    out, back = jax.vjp(layer, x, w_in, b_in, w_out)
    return out, back(out)


def program_shapes(width, dtype, e, m=3328, tokens=1576):
    f = hidden_width(width)
    return (
        shape((tokens, width), dtype),
        shape((e, width, f), dtype),
        shape((e, f), dtype),
        shape((e, f, width), dtype),
        shape((e,), jnp.int32),
        (shape((tokens, 2), jnp.int32), shape((m,), jnp.int32)),
    )


DTYPES = (jnp.bfloat16, jnp.float32)
LAYERS = [(chip, width, dtype, 8) for chip in CHIPS for width in WIDTHS for dtype in DTYPES]
# With more experts, which changes less, every width and dtype on one of the chips.
LAYERS += [(CHIPS[i % 4], *case, 32) for i, case in enumerate(itertools.product(WIDTHS, DTYPES))]


@pytest.mark.parametrize(("chip", "width", "dtype", "e"), slow_but(("v4", 768, jnp.bfloat16, 8), LAYERS), ids=str)
def test_a_layer_compiles(chip, width, dtype, e):
    text = compile_for(chip, program, *program_shapes(width, dtype, e)).as_text()
    for kernel, calls in (("jmoe_grouped_matmul", 4), ("jmoe_grouped_outer", 2), ("jmoe_gather_sum", 2)):
        assert len(re.findall(rf"%{kernel}[\w.]* = .* custom-call\(", text)) == calls


@pytest.mark.slow
@every_chip
@pytest.mark.parametrize("width", [1024, 1408])  # blocks of the first are the first that do not fit
def test_a_layer_compiles_at_the_highest_precision(chip, width):
    with jax.default_matmul_precision("highest"):
        compile_for(chip, program, *program_shapes(width, jnp.float32, 8))


@pytest.mark.slow
@every_chip
@pytest.mark.parametrize("width", WIDTHS)
@every_dtype
def test_plain_products_compile(chip, width, dtype):
    m, f, sizes = 3328, hidden_width(width), shape((8,), jnp.int32)
    for k, n in ((width, f), (f, width)):
        x, w, dout = shape((m, k), dtype), shape((8, k, n), dtype), shape((m, n), dtype)
        compile_for(chip, tpu.grouped_matmul, x, w, sizes)
        compile_for(chip, functools.partial(tpu.grouped_matmul, transposed=True), dout, w, sizes)
        compile_for(chip, tpu.grouped_outer, x, dout, sizes)


@pytest.mark.parametrize("m", slow_but(17, [1, 17, 100_003]))
def test_few_and_many_rows_compile(m):
    compile_for("v4", program, *program_shapes(512, jnp.bfloat16, 8, m=m))


@pytest.mark.parametrize("e", [1, 3, 10, 64])
def test_tiles_have_rows_that_lie_in_whole_registers(e):
    for m in (*range(1, 300), 997, 5003, 10_000, 100_003):
        tile, outer = tpu.tile_config(m, 768, 3072, e, 2), tpu.outer_config(m, 768, 3072, e, 2)
        assert tile is not None
        assert tile.rows == outer.rows
        assert tile.rows % 16 == 0
        assert tile.rows < m + 16
        assert tile.rows <= 128 or 4 * e * tile.rows <= m


def test_groups_of_any_mean_size_compile():
    compile_for("v5e", program, *program_shapes(512, jnp.bfloat16, 10, m=10_000))


def test_the_kernel_is_the_default():
    x, w, sizes = shape((300, 256), jnp.bfloat16), shape((3, 256, 128), jnp.bfloat16), shape((3,), jnp.int32)
    assert "jmoe_grouped_matmul" in compile_for("v5e", grouped_matmul, x, w, sizes).as_text()


def test_a_chip_that_is_not_known_gets_what_runs_on_all(monkeypatch):
    known = tpu.tile_config(3328, 768, 3072, 8, 2)
    monkeypatch.setattr(tpu, "chip", lambda: tpu.Chip(cores=1, vector_memory=128 * tpu.MIB))
    assert known != tpu.tile_config(3328, 768, 3072, 8, 2) == tpu.TileConfig(rows=128, columns=3072, ranges=1)


def kernel_cost(compiled, name):
    (line,) = (
        line for line in compiled.as_text().splitlines() if "custom-call(" in line and f"%{name}" in line.split("=")[0]
    )
    found = re.search(r'"cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"', line)
    return int(found[1]), int(found[2])


def test_the_declared_cost_is_that_of_the_work():
    m, k, n, e = 3328, 768, 3072, 8
    x, w, dout = shape((m, k), jnp.bfloat16), shape((e, k, n), jnp.bfloat16), shape((m, n), jnp.bfloat16)
    sizes = shape((e,), jnp.int32)
    # On v5e a block has all columns and a range all tiles, 26 of 128 rows: everything is read once. 7 tiles are
    # multiplied for two groups.
    flops = 2 * (26 + 7) * 128 * k * n
    cost = kernel_cost(compile_for("v5e", tpu.grouped_matmul, x, w, sizes), "jmoe_grouped_matmul")
    assert cost == (flops, 2 * (m * k + e * k * n + m * n))
    assert kernel_cost(compile_for("v5e", tpu.grouped_outer, x, dout, sizes), "jmoe_grouped_outer") == cost
    # On v4, two ranges and two blocks: rows are read twice, and nine matrices.
    cost = kernel_cost(compile_for("v4", tpu.grouped_matmul, x, w, sizes), "jmoe_grouped_matmul")
    assert cost == (flops, 2 * (2 * m * k + (e + 1) * k * n + m * n))


def ragged_dot(x, w, sizes):
    return jax.lax.ragged_dot(x, w, sizes)


def ragged_dx(dout, w, sizes):
    like = shape((dout.shape[0], w.shape[1]), dout.dtype)
    return jax.linear_transpose(lambda x: ragged_dot(x, w, sizes), like)(dout)


def ragged_dw(x, dout, sizes):
    like = shape((sizes.shape[0], x.shape[1], dout.shape[1]), x.dtype)
    return jax.linear_transpose(lambda w: ragged_dot(x, w, sizes), like)(dout)


@pytest.mark.slow
@pytest.mark.parametrize("e", [8, 32])
@pytest.mark.parametrize(("name", "width", "tokens"), [("S/32", 512, 50), ("B/16", 768, 197), ("H/14", 1280, 257)])
def test_the_bound_of_a_training_step_is_below_that_of_ragged_dot(name, width, tokens, e):
    m, sizes = 8 * tokens * 2, shape((e,), jnp.int32)  # 8 images, 2 experts per token
    totals = np.zeros(2)
    for k, n in ((width, 4 * width), (4 * width, width)):
        x, w, dout = (shape(s, jnp.bfloat16) for s in ((m, k), (e, k, n), (m, n)))
        for what, ours, theirs, arguments in (
            ("forward", tpu.grouped_matmul, ragged_dot, (x, w)),
            ("dx", functools.partial(tpu.grouped_matmul, transposed=True), ragged_dx, (dout, w)),
            ("dw", tpu.grouped_outer, ragged_dw, (x, dout)),
        ):
            programs = (compile_for("v5e", function, *arguments, sizes).as_text() for function in (ours, theirs))
            seconds = np.array([bound(text, FIGURES["v5e"]).seconds for text in programs])
            print(f"{name} E={e} {k:4d} -> {n:4d} {what:7s} {seconds[0] * 1e6:7.0f} {seconds[1] * 1e6:7.0f}")
            totals += seconds
    print(f"{name} E={e} in all {totals[0] * 1e6:7.0f} {totals[1] * 1e6:7.0f}")
    assert totals[0] < totals[1]
