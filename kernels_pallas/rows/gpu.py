"""Rows by index on GPU, through Pallas' Triton backend.

A program makes a block of rows and columns of the result. It reads a column of indices, and with it the rows that they
name, straight from the array: rows are contiguous, so that a warp reads whole cache lines wherever they lie. An index
out of range is masked off together with what it would read: nothing is read out of bounds, nothing is multiplied by 0.

Shapes inside a Triton kernel are powers of two. Blocks are, whatever the width of the rows, and their tails are masked.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas import compat

UNROLL = 8  # more rows per sum than this are summed in a loop, so that the kernel does not grow with them
LARGEST = 2**31 - 1  # elements of an array that is read by index: offsets are int32
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How the work is cut up. By default a thread reads 16 columns of each row of a sum, by loads of 16 bytes.

    Attributes:
      rows: of the result, per program; a power of two.
      columns: per program, or per turn where a program walks along its rows; a power of two.
      num_warps: per program.
      num_stages: turns of a loop whose loads are under way at the same time.
    """

    rows: int = 8
    columns: int = 256
    num_warps: int = 4
    num_stages: int = 2

    def __post_init__(self):
        for name in ("rows", "columns", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"TileConfig wants a power of two for {name}; it got {value}.")


def refusal(x, index, *_) -> str | None:
    """Why these arguments cannot be taken, or None."""
    n, d = x.shape
    m, k = index.shape[0], 1 if index.ndim == 1 else index.shape[1]
    if x.dtype.name not in DTYPES:
        return f"The GPU kernel takes float32, bfloat16 and float16, not {x.dtype}."
    if n == 0 or m == 0:
        return f"The GPU kernel wants at least one row to read and one to write, not {n} and {m}."
    if d == 0 or k == 0:
        return f"The GPU kernel wants at least one column and one row per sum, not {d} and {k}."
    if max(n * d, m * d, m * k) > LARGEST:
        return f"The GPU kernel takes arrays of at most {LARGEST} elements, not {max(n * d, m * d, m * k)}."
    return None


def gather_sum(x, index, weights=None, *, interpret: bool = False, config: TileConfig = TileConfig()):
    """[n, d] -> [m, d]; out[i] = sum_j weights[i, j] * x[index[i, j]]."""
    (n, d), (m, k) = x.shape, index.shape
    rows, columns = _block(config, m, d)
    operands = [x, _as_int32(index, n), *([] if weights is None else [weights.astype(jnp.float32)])]
    out = compat.result_of((m, d), x.dtype, operands)
    call = pl.pallas_call(
        functools.partial(_gather_sum, weighted=weights is not None, block=(rows, columns)),
        grid=(pl.cdiv(d, columns), pl.cdiv(m, rows)),  # the first axis runs fastest: programs side by side share rows
        out_shape=out,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        cost_estimate=_cost(
            flops=m * d * (2 * k if weights is not None else k - 1), rows_read=m * k, arrays=[*operands, out]
        ),
        interpret=interpret,
        name="jmoe_gather_sum",
    )
    return (call(*operands),)


def _gather_sum(x_ref, index_ref, *refs, weighted: bool, block: tuple[int, int]):
    *weights_ref, out_ref = refs
    (m, k), (n, d) = index_ref.shape, x_ref.shape
    row, column = _positions(1, block[0]), _positions(0, block[1])
    in_rows, in_columns = row < m, column < d

    def term(j):
        index = plt.load(index_ref.at[row, j], mask=in_rows, other=-1)
        values = _rows(x_ref, index, column, in_columns, n)
        if not weighted:
            return values
        return values * plt.load(weights_ref[0].at[row, j], mask=in_rows, other=0.0)[:, None]

    if k <= UNROLL:  # all loads can be under way at the same time
        total = term(0)
        for j in range(1, k):
            total += term(j)
    else:
        total = lax.fori_loop(0, k, lambda j, total: total + term(j), jnp.zeros(block, jnp.float32))
    inside = in_rows[:, None] & in_columns[None, :]
    plt.store(out_ref.at[row[:, None], column[None, :]], total.astype(out_ref.dtype), mask=inside)


def gather_dot(x, index, weights, other, *, interpret: bool = False, config: TileConfig = TileConfig()):
    """[n, d], [m, d] -> weights[i] * x[index[i]] [m, d], and the products of x[index[i]] with other[i] [m]."""
    (n, d), m = x.shape, index.shape[0]
    rows, columns = _block(config, m, d)
    operands = [x, _as_int32(index, n), weights.astype(jnp.float32), other]
    out = [compat.result_of((m, d), x.dtype, operands), compat.result_of((m,), jnp.float32, operands)]
    call = pl.pallas_call(
        functools.partial(_gather_dot, block=(rows, columns)),
        grid=(pl.cdiv(m, rows),),
        out_shape=out,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        cost_estimate=_cost(flops=3 * m * d, rows_read=m, arrays=[*operands, *out]),
        interpret=interpret,
        name="jmoe_gather_dot",
    )
    scaled, products = call(*operands)
    return scaled, products


def _gather_dot(x_ref, index_ref, weights_ref, other_ref, scaled_ref, products_ref, *, block: tuple[int, int]):
    (m, d), n = other_ref.shape, x_ref.shape[0]
    row = _positions(0, block[0])
    in_rows = row < m
    index = plt.load(index_ref.at[row], mask=in_rows, other=-1)
    weights = plt.load(weights_ref.at[row], mask=in_rows, other=0.0)[:, None]
    named = ((index >= 0) & (index < n))[:, None]

    def along(step, products):  # one pass: a row is scaled and multiplied while it is in registers
        column = step * block[1] + jnp.arange(block[1], dtype=jnp.int32)
        in_columns = column < d
        values = _rows(x_ref, index, column, in_columns, n)
        at = (row[:, None], column[None, :])
        inside = in_columns[None, :] & in_rows[:, None]
        plt.store(scaled_ref.at[at], (values * weights).astype(scaled_ref.dtype), mask=inside)
        other = plt.load(other_ref.at[at], mask=inside & named, other=0.0)  # a row of zeros needs no partner
        return products + values * other.astype(jnp.float32)

    products = lax.fori_loop(0, pl.cdiv(d, block[1]), along, jnp.zeros(block, jnp.float32))
    plt.store(products_ref.at[row], jnp.sum(products, axis=1), mask=in_rows)


def _rows(x_ref, index, column, in_columns, n: int):
    """Columns of the rows that an index names, as float32; zeros where it names none."""
    named = (index >= 0) & (index < n)
    at = (jnp.where(named, index, 0)[:, None], column[None, :])
    return plt.load(x_ref.at[at], mask=named[:, None] & in_columns[None, :], other=0.0).astype(jnp.float32)


def _positions(axis: int, size: int):
    """Where the block of this program lies along an axis of the grid."""
    return pl.program_id(axis) * size + jnp.arange(size, dtype=jnp.int32)


def _block(config: TileConfig, m: int, d: int) -> tuple[int, int]:
    """Rows and columns of a block: no more than there are, rounded up to a power of two."""
    return min(config.rows, pl.next_power_of_2(m)), min(config.columns, pl.next_power_of_2(d))


def _as_int32(index, n: int):
    """The index as int32; one of 64 bits that is out of range stays so."""
    if index.dtype.itemsize > 4:
        index = jnp.where((index >= 0) & (index < n), index, n)
    return index.astype(jnp.int32)


def _cost(*, flops: int, rows_read: int, arrays) -> pl.CostEstimate:
    """What is done and moved: of the first array so many rows, and all of the others once."""
    x, *others = arrays
    moved = rows_read * x.shape[1] * x.dtype.itemsize + sum(a.size * a.dtype.itemsize for a in others)
    return pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved)
