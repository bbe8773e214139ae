"""Matrix multiplies of grouped rows on GPU, through Pallas' Triton backend.

Rows are cut into tiles that begin anew with each group, so that a tile needs one matrix and writes rows of its own: of
m rows in e groups there are at most m / tile + e, and one more for rows of no group, which are written as zeros by
tiles of theirs. Which rows a tile has is computed beforehand, in XLA, from the sizes of the groups.

A program makes a tile of rows by a block of columns and walks along the contracted axis; Triton overlaps the loads of
the next turns with the product of this one. Tiles of rows are the axis of the grid that runs fastest: the programs that
are under way together share the columns of a matrix, which are the larger part of what is read, through the L2 cache.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas import compat
from kernels_pallas.activations import ACTIVATIONS

SMALLEST = 16  # what Triton's product takes, along every axis
LARGEST = 2**31 - 1  # elements of an array: offsets are int32
DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How the work is cut up. The defaults need 96 KiB of shared memory, which compute capability 8.6 has just so.

    Attributes:
      rows: of the result, per program: of a group for `grouped_matmul`, of a matrix for `grouped_outer`; a power of 2.
      columns: of the result, per program; a power of two.
      depth: bytes of the contracted axis per turn, so that every dtype needs the same shared memory; a power of two.
      num_warps: per program.
      num_stages: turns whose loads are under way at the same time.
    """

    rows: int = 128
    columns: int = 128
    depth: int = 128
    num_warps: int = 8
    num_stages: int = 3

    def __post_init__(self):
        for name, least in (("rows", SMALLEST), ("columns", SMALLEST), ("depth", 4 * SMALLEST), ("num_warps", 1)):
            value = getattr(self, name)
            if value < least or value & (value - 1):
                raise ValueError(f"TileConfig wants a power of two of at least {least} for {name}; it got {value}.")


def refusal(x, other, group_sizes, *more, extras=(), transposed=False, activation=None, keep=False) -> str | None:
    """Why these arguments of grouped_matmul, or of grouped_outer, cannot be taken, or None."""
    del keep
    if x.dtype.name not in DTYPES or other.dtype != x.dtype:
        return f"The GPU kernel takes two arrays of float32, bfloat16 or float16, not {x.dtype} and {other.dtype}."
    unknown = [*(name for name in extras if name not in ("index", "bias")), *({activation} - set(ACTIVATIONS))]
    if unknown:
        return f"The GPU kernel takes an index, a bias and an activation that it knows, not {unknown[0]!r}."
    m = dict(zip(extras, more, strict=True)).get("index", x).shape[0]
    if min(*x.shape, *other.shape, *group_sizes.shape, m) == 0:
        return f"The GPU kernel wants no empty array; it got {x.shape} and {other.shape}, for {m} rows."
    result = (
        (m, other.shape[1 if transposed else 2])
        if other.ndim == 3
        else (*group_sizes.shape, x.shape[1], other.shape[1])
    )
    largest = max(math.prod(shape) for shape in (x.shape, other.shape, result))
    if largest > LARGEST:
        return f"The GPU kernel takes arrays of at most {LARGEST} elements, not {largest}."
    return None


def grouped_matmul(
    x,
    w,
    group_sizes,
    *more,
    extras=(),
    transposed: bool = False,
    activation: str | None = None,
    keep: bool = False,
    interpret: bool = False,
    config: TileConfig = TileConfig(),
):
    """[m, k] by [e, k, n], or by [e, n, k] if transposed -> [m, n]; rows of no group come out zero.

    The arguments are those of kernels_pallas/grouped_matmul/xla.py: an index to read rows by, a bias and an activation
    to finish with, and the result before the activation beside that after it.
    """
    named = dict(zip(extras, more, strict=True))
    k, n = reversed(w.shape[1:]) if transposed else w.shape[1:]
    m = named["index"].shape[0] if "index" in named else x.shape[0]
    rows, columns = _fitting(config.rows, m), _fitting(config.columns, n)
    depth = _fitting(config.depth // x.dtype.itemsize, k)
    tiles = _tiles(group_sizes, m, rows)
    if "index" in named:
        named["index"] = _as_int32(named["index"], x.shape[0])
    operands = [*tiles, x, w, *named.values()]
    out = [compat.result_of((m, n), x.dtype, operands)] * (2 if keep else 1)
    kernel = functools.partial(
        _grouped_matmul, extras=tuple(named), transposed=transposed, activation=activation, block=(rows, columns, depth)
    )
    return tuple(
        pl.pallas_call(
            kernel,
            grid=(len(tiles[0]), pl.cdiv(n, columns)),
            out_shape=out,
            compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
            cost_estimate=_cost(2 * m * k * n, m * k * x.dtype.itemsize, [*tiles, w, *named.values(), *out]),
            interpret=interpret,
            name="jmoe_grouped_matmul",
        )(*operands)
    )


def _grouped_matmul(
    group_ref, first_ref, end_ref, owned_ref, x_ref, w_ref, *refs, extras, transposed, activation, block
):
    named, out_refs = dict(zip(extras, refs, strict=False)), refs[len(extras) :]
    (rows, columns, depth), tile = block, pl.program_id(0)
    k, n = reversed(w_ref.shape[1:]) if transposed else w_ref.shape[1:]
    group, first, end, owned = group_ref[tile], first_ref[tile], end_ref[tile], owned_ref[tile]
    row, column = first + _range(rows), pl.program_id(1) * columns + _range(columns)
    in_rows, in_columns = row < end, column < n
    source, there = row, in_rows
    if "index" in named:
        source = plt.load(named["index"].at[row], mask=in_rows, other=-1)
        there = (source >= 0) & (source < x_ref.shape[0])
        source = jnp.where(there, source, 0)

    def multiply(step, total):
        inner = step * depth + _range(depth)
        in_depth = inner < k
        left = plt.load(x_ref.at[source[:, None], inner[None, :]], mask=there[:, None] & in_depth[None, :], other=0.0)
        if transposed:
            at, inside = (group, column[:, None], inner[None, :]), in_columns[:, None] & in_depth[None, :]
        else:
            at, inside = (group, inner[:, None], column[None, :]), in_depth[:, None] & in_columns[None, :]
        right = plt.load(w_ref.at[at], mask=inside, other=0.0)
        return total + _product(left, right, 1, 1 if transposed else 0)

    turns = owned * pl.cdiv(k, depth)  # none in a tile of rows of no group: they come out zero
    total = lax.fori_loop(0, turns, multiply, jnp.zeros((rows, columns), jnp.float32))
    if "bias" in named:
        bias = plt.load(named["bias"].at[group, column], mask=in_columns & (owned == 1), other=0.0)
        total += bias.astype(jnp.float32)[None, :]
    inside = in_rows[:, None] & in_columns[None, :]
    for out_ref, name in zip(out_refs, (activation, None), strict=False):  # before the activation comes second
        result = ACTIVATIONS[name](total)  # of zero all of them are zero
        plt.store(out_ref.at[row[:, None], column[None, :]], result.astype(out_ref.dtype), mask=inside)


def grouped_outer(x, dout, group_sizes, *, interpret: bool = False, config: TileConfig = TileConfig()):
    """[m, k], [m, n] -> [e, k, n]: for each group the product of its rows of x, transposed, with those of dout."""
    (m, k), n, e = x.shape, dout.shape[1], group_sizes.shape[0]
    rows, columns = _fitting(config.rows, k), _fitting(config.columns, n)
    depth = _fitting(config.depth // x.dtype.itemsize, m)
    ends = _ends(group_sizes, m)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    out = compat.result_of((e, k, n), x.dtype, [x, dout, group_sizes])
    call = pl.pallas_call(
        functools.partial(_grouped_outer, block=(rows, columns, depth)),
        grid=(pl.cdiv(k, rows), pl.cdiv(n, columns), e),  # a group after the other: its rows stay in the L2 cache
        out_shape=out,
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        cost_estimate=_cost(2 * m * k * n, 0, [x, dout, starts, ends, out]),
        interpret=interpret,
        name="jmoe_grouped_outer",
    )
    return (call(starts, ends, x, dout),)


def _grouped_outer(start_ref, end_ref, x_ref, dout_ref, out_ref, *, block):
    (rows, columns, depth), group = block, pl.program_id(2)
    k, n = x_ref.shape[1], dout_ref.shape[1]
    start, end = start_ref[group], end_ref[group]
    row, column = pl.program_id(0) * rows + _range(rows), pl.program_id(1) * columns + _range(columns)
    in_rows, in_columns = row < k, column < n

    def multiply(step, total):
        inner = start + step * depth + _range(depth)
        owned = (inner < end)[:, None]  # masks both: what other rows hold may be no number, which 0 does not take away
        left = plt.load(x_ref.at[inner[:, None], row[None, :]], mask=owned & in_rows[None, :], other=0.0)
        right = plt.load(dout_ref.at[inner[:, None], column[None, :]], mask=owned & in_columns[None, :], other=0.0)
        return total + _product(left, right, 0, 0)

    total = lax.fori_loop(0, (end - start + depth - 1) // depth, multiply, jnp.zeros((rows, columns), jnp.float32))
    inside = in_rows[:, None] & in_columns[None, :]
    plt.store(out_ref.at[group, row[:, None], column[None, :]], total.astype(out_ref.dtype), mask=inside)


def _tiles(group_sizes, m: int, rows: int):
    """For each tile its group, its first row, the row after its last, and 1 or 0: whether a group owns its rows.

    There are as many tiles as any sizes can need. Rows of no group are a group after the last, tiles that are not
    needed have no rows; both name the last matrix, without reading it.
    """
    e = group_sizes.shape[0]
    ends = jnp.append(_ends(group_sizes, m), jnp.int32(m))
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends[:-1]])
    last_tile = jnp.cumsum(lax.div(ends - starts + rows - 1, jnp.int32(rows)), dtype=jnp.int32)
    tile = jnp.arange(m // rows + e + 1, dtype=jnp.int32)
    group = jnp.searchsorted(last_tile, tile, side="right").astype(jnp.int32)
    within = jnp.minimum(group, e)
    place = tile - jnp.where(within > 0, last_tile[within - 1], 0)  # of the tile in its group
    first = jnp.minimum(starts[within] + place * rows, m)
    end = jnp.where(group > e, first, jnp.minimum(first + rows, ends[within]))
    return jnp.minimum(group, e - 1), first, end, (group < e).astype(jnp.int32)


def _ends(group_sizes, m: int):
    """The row after the last of each group; beyond m there are none."""
    return jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), m)


def _product(left, right, left_axis: int, right_axis: int):
    return lax.dot_general(left, right, (((left_axis,), (right_axis,)), ((), ())), preferred_element_type=jnp.float32)


def _range(size: int):
    return jnp.arange(size, dtype=jnp.int32)


def _fitting(block: int, size: int) -> int:
    """No more than there is, rounded up to what Triton's product takes."""
    return min(block, max(SMALLEST, pl.next_power_of_2(size)))


def _as_int32(index, n: int):
    """The index as int32; one of 64 bits that is out of range stays so."""
    if index.dtype.itemsize > 4:
        index = jnp.where((index >= 0) & (index < n), index, n)
    return index.astype(jnp.int32)


def _cost(flops: int, moved: int, arrays) -> pl.CostEstimate:
    """What is multiplied if all rows are owned, and moved if everything is read once."""
    moved += sum(a.size * a.dtype.itemsize for a in arrays)
    return pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=moved)
