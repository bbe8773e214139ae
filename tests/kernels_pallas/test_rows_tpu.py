"""The kernels for TPU that dispatch and combine are made of: interpreted, and compiled for chips that are not there."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import combine_rows, gather_rows
from kernels_pallas.interpreter import interpreter
from kernels_pallas.rows import copies, tpu
from tests.aot import CHIPS, WIDTHS, compile_for, slow_but
from tests.kernels_pallas.index_pairs import index_pair
from tests.kernels_pallas.interpreted import no_races
from tests.tolerance import tolerance

every_dtype = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
every_source = pytest.mark.parametrize("source", ["hbm", "vmem"])
every_chip = pytest.mark.parametrize("chip", CHIPS)
every_width = pytest.mark.parametrize("width", slow_but(768, WIDTHS))
shape = jax.ShapeDtypeStruct

SIZES = {  # rows of x, rows of the result, rows per sum
    "several blocks on two cores": (37, 83, 2),
    "an odd number of blocks": (23, 41, 1),
    "one block": (5, 3, 3),
}


def small_blocks(source):
    return tpu.TileConfig(rows=16, unroll=2, source=source, cores=2)


def random_rows(seed, *shape, dtype):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def random_index(seed, n, *shape):
    """Two thirds in range, others before it, just past it and far past it."""
    rng = np.random.default_rng(seed)
    index = rng.integers(0, n, shape)
    outside = rng.choice([-1, -n, n, n + 1, 2**30], size=shape)
    return np.where(rng.uniform(size=shape) < 2 / 3, index, outside).astype(np.int32)


def oracle(x, index):
    """Rows by index in float64, zeros for those out of range."""
    x = np.asarray(x, np.float64)
    rows = np.zeros((*index.shape, x.shape[1]))
    for place in np.ndindex(index.shape):
        if 0 <= index[place] < x.shape[0]:
            rows[place] = x[index[place]]
    return rows


@every_source
@every_dtype
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_sums_of_rows(sizes, dtype, source):
    n, m, k = sizes
    x, index = random_rows(0, n, 128, dtype=dtype), random_index(1, n, m, k)
    weights = np.random.default_rng(2).uniform(size=(m, k)).astype(np.float32)
    rows = oracle(x, index)
    run = functools.partial(tpu.gather_sum, x, jnp.asarray(index), interpret=True, config=small_blocks(source))
    with no_races():
        (plain,) = run()
        (weighted,) = run(jnp.asarray(weights))
    assert plain.dtype == weighted.dtype == dtype
    np.testing.assert_allclose(np.asarray(plain, np.float64), rows.sum(1), **tolerance(dtype))
    expected = (weights[..., None] * rows).sum(1)
    np.testing.assert_allclose(np.asarray(weighted, np.float64), expected, **tolerance(dtype))


@every_source
@every_dtype
def test_weighted_rows_and_their_products(dtype, source):
    n, m, d = 21, 53, 256
    x, other = random_rows(0, n, d, dtype=dtype), random_rows(1, m, d, dtype=dtype)
    index, weights = random_index(2, n, m), np.random.default_rng(3).uniform(size=m).astype(np.float32)
    config = small_blocks(source)
    with no_races():
        scaled, products = tpu.gather_dot(
            x, jnp.asarray(index), jnp.asarray(weights), other, interpret=True, config=config
        )
    rows = oracle(x, index)
    np.testing.assert_allclose(np.asarray(scaled, np.float64), weights[:, None] * rows, **tolerance(dtype))
    expected = (rows * np.asarray(other, np.float64)).sum(1)
    np.testing.assert_allclose(products, expected, **tolerance(jnp.float32, scale=np.sqrt(d)))


@every_source
@every_dtype
def test_a_row_that_no_index_names_is_never_read(dtype, source):
    n = 11  # the last row of an odd number of bfloat16 rows has no partner of its own
    x = random_rows(0, n, 128, dtype=dtype).at[jnp.array([3, 4, 7])].set(jnp.nan)
    index = jnp.array([[0, n], [-1, n - 1], [n, -5], [5, 2], [2**31 - 1, 6]], jnp.int32)
    (out,) = tpu.gather_sum(x, index, interpret=True, config=small_blocks(source))
    np.testing.assert_allclose(np.asarray(out, np.float64), oracle(x, np.asarray(index)).sum(1), **tolerance(dtype))


@every_dtype
def test_the_public_ops_interpreted_give_values_and_gradients(dtype):
    n, k, m, d = 29, 2, 47, 128
    slots, choice = map(jnp.asarray, index_pair(0, n, k, m))
    x, y, dout = (random_rows(i, rows, d, dtype=dtype) for i, rows in enumerate((n, m, n)))
    weights = jnp.asarray(np.random.default_rng(3).uniform(size=(n, k)), jnp.float32)

    def run(implementation):
        gathered, back = jax.vjp(lambda x: gather_rows(x, slots, choice, implementation=implementation), x)
        combined, combine_back = jax.vjp(
            lambda y, weights: combine_rows(y, slots, weights, choice, implementation=implementation), y, weights
        )
        return gathered, *back(y), combined, *combine_back(dout)

    with no_races():
        interpreted = run("interpret-tpu")
    for actual, expected in zip(interpreted, run("reference"), strict=True):
        assert actual.dtype == expected.dtype
        bound = tolerance(actual.dtype, scale=float(jnp.abs(expected).max()))
        np.testing.assert_allclose(np.asarray(actual, np.float64), np.asarray(expected, np.float64), **bound)


def test_the_race_detector_finds_a_race():
    def kernel(x_ref, out_ref, buffer, semaphore):
        copy = pltpu.make_async_copy(x_ref, buffer, semaphore)
        copy.start()
        out_ref[...] = buffer[...]  # before the copy is awaited
        copy.wait()

    x = jnp.ones((8, 128))
    # JAX 0.12 raises at once, 0.10 keeps it to be asked for.
    errors = (AssertionError, jax.errors.JaxRuntimeError)
    with pytest.raises(errors, match="1 of 1 interpreted kernels have a race|RACE DETECTED"), no_races():
        pl.pallas_call(
            kernel,
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
            out_shape=shape(x.shape, x.dtype),
            scratch_shapes=[pltpu.VMEM(x.shape, x.dtype), pltpu.SemaphoreType.DMA],
            interpret=interpreter("tpu"),
        )(x)


def test_pairs_are_laid_out_as_the_chip_lays_them_out():
    x = random_rows(0, 16, 128, dtype=jnp.bfloat16)

    def kernel(x_ref, out_ref):
        out_ref[...] = pltpu.bitcast(x_ref[...], jnp.uint32)

    words = pl.pallas_call(kernel, out_shape=shape((8, 128), jnp.uint32), interpret=interpreter("tpu"))(x)
    np.testing.assert_array_equal(copies.pairs(x), words)


@every_chip
@every_width
@every_dtype
def test_dispatch_and_combine_compile(chip, width, dtype):
    n, k, m = 1576, 2, 3328  # of B/16: 8 images, 8 experts

    def program(tokens, slots, index, choice, weights, weight):
        results = []
        for config in (tpu.TileConfig(), tpu.TileConfig(source="hbm")):
            results += tpu.gather_sum(tokens, choice[:, None], config=config)
            results += tpu.gather_sum(slots, index, weights, config=config)
            results += tpu.gather_dot(tokens, choice, weight, slots, config=config)
            results += tpu.gather_sum(slots, index, config=config)
        return results

    float32, int32 = jnp.float32, jnp.int32
    arguments = [((n, width), dtype), ((m, width), dtype), ((n, k), int32), ((m,), int32), ((n, k), float32)]
    compile_for(chip, program, *(shape(*one) for one in [*arguments, ((m,), float32)]))


@every_chip
def test_the_kernels_are_the_default(chip):
    n, k, m, d = 788, 2, 1664, 768

    def program(x, slots, choice, weights):
        def both(x, weights):
            return combine_rows(gather_rows(x, slots, choice), slots, weights, choice)

        y, back = jax.vjp(both, x, weights)
        return y, back(y)

    index = (shape((n, k), jnp.int32), shape((m,), jnp.int32))
    text = compile_for(chip, program, shape((n, d), jnp.bfloat16), *index, shape((n, k), jnp.float32)).as_text()
    for name, calls in (("jmoe_gather_sum", 3), ("jmoe_gather_dot", 1)):
        assert len(re.findall(rf"%{name}[\w.]* = .* custom-call\(", text)) == calls


@every_source
def test_the_declared_cost_is_that_of_the_work(source):
    n, k, m, d = 1576, 2, 1664, 768
    config = tpu.TileConfig(source=source)
    compiled = compile_for(
        "v5e",
        lambda x, index, weights: tpu.gather_sum(x, index, weights, config=config),
        shape((n, d), jnp.bfloat16),
        shape((m, k), jnp.int32),
        shape((m, k), jnp.float32),
    )
    (line,) = (line for line in compiled.as_text().splitlines() if "custom-call(" in line and "jmoe_gather_sum" in line)
    assert f'"flops":"{2 * k * m * d}"' in line  # a multiplication and an addition each
    indices = k * m * 4
    reads = {
        "vmem": n * d * 2 + indices,  # the source once
        "hbm": k * m * d * 2 * 2 + 2 * indices + indices,  # pairs of rows; indices twice, and which row of the pair
    }[source]
    assert f'"bytes_accessed":"{reads + k * m * 4 + m * d * 2}"' in line


@pytest.mark.parametrize(
    ("x", "index", "sentence"),
    [
        (shape((8, 100), jnp.float32), (3, 1), "The TPU kernel takes rows of a multiple of 128 columns, not 100."),
        (shape((8, 128), jnp.float16), (3, 1), "The TPU kernel takes float32 and bfloat16, not float16."),
        (shape((8, 128), jnp.float32), (3, 17), "The TPU kernel sums from 1 to 16 rows, not 17."),
        (
            shape((0, 128), jnp.float32),
            (3, 1),
            "The TPU kernel wants at least one row to read and one to write, not 0 and 3.",
        ),
    ],
)
def test_what_it_cannot_take_is_said(x, index, sentence):
    assert tpu.refusal(x, shape(index, jnp.int32)) == sentence
