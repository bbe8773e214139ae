"""Rows by index on TPU.

A grid step makes one block of output rows. The indices of its rows stand in scalar memory (blocks of them are fetched
ahead by Pallas, so that a call may have any number). Each names a row, which is copied into a buffer in vector memory:

- "hbm": by an asynchronous copy of its own from where the source lies. All copies of the next block are started before
  the current one is used; the buffer is double. They signal one semaphore, which is awaited once for the whole block.
- "vmem": from a copy of the whole source in vector memory, for a source that fits there. It is read once instead of
  once for each row that names it, and by one large copy.

How a row is copied, one of bfloat16 or out of range too, is in copies.py.

The leading grid axis is parallel, for chips with two cores (v4, v5p): each has buffers of its own.
"""

import dataclasses
import functools
import math
from typing import Literal

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import compat, target
from kernels_pallas.interpreter import interpreter
from kernels_pallas.rows import copies
from kernels_pallas.target import MIB

LANES = 128
MAX_PER_ROW = 16  # rows per sum; each has a place in the buffer
SOURCE_BYTES = 32 * MIB  # in vector memory at most, and at most half of it: XLA keeps arrays of its own there
SPARE_BYTES = 4 * MIB  # of vector memory, for what the compiler adds to the buffers of a kernel


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How rows are moved.

    Attributes:
      rows: output rows of a grid step.
      unroll: copies that are started per turn of the loop.
      source: "hbm", "vmem", or None for "vmem" where the source fits.
      cores: size of the leading, parallel grid axis; None for the cores of the chip.
    """

    rows: int = 128
    unroll: int = 8
    source: Literal["hbm", "vmem"] | None = None
    cores: int | None = None


def refusal(x, index, *_) -> str | None:
    """Why these arguments cannot be taken, or None."""
    n, d = x.shape
    m, k = index.shape[0], 1 if index.ndim == 1 else index.shape[1]
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"The TPU kernel takes float32 and bfloat16, not {x.dtype}."
    if d % LANES or d == 0:
        return f"The TPU kernel takes rows of a multiple of {LANES} columns, not {d}."
    if not 1 <= k <= MAX_PER_ROW:
        return f"The TPU kernel sums from 1 to {MAX_PER_ROW} rows, not {k}."
    if n == 0 or m == 0:
        return f"The TPU kernel wants at least one row to read and one to write, not {n} and {m}."
    return None


def gather_sum(x, index, weights=None, *, interpret: bool = False, config: TileConfig = TileConfig()):
    """[n, d] -> [m, d]; out[i] = sum_j weights[i, j] * x[index[i, j]]."""
    m, k = index.shape
    call = _Call(x, m, k, config)
    operands, specs = [], []
    if weights is not None:  # [blocks, k, rows]: a lane each
        padded = jnp.pad(weights.astype(jnp.float32), ((0, call.padded - m), (0, 0)))
        operands.append(padded.reshape(call.blocks, call.rows, k).swapaxes(1, 2))
        specs.append(call.block_of_vectors(k))

    def finish(read, weight_refs, out_refs):
        rows = [read(j) for j in range(k)]
        if weight_refs:
            rows = [row * weight_refs[0][0, j][:, None] for j, row in enumerate(rows)]
        out_refs[0][...] = sum(rows[1:], rows[0]).astype(out_refs[0].dtype)

    flops = m * call.d * (2 * k if weights is not None else k - 1)
    out = call(finish, index, operands, specs, flops, name="jmoe_gather_sum", interpret=interpret)
    return (out[0],)


def gather_dot(x, index, weights, other, *, interpret: bool = False, config: TileConfig = TileConfig()):
    """[n, d], [m, d] -> weights[i] * x[index[i]] [m, d], and the products of x[index[i]] with other[i] [m]."""
    m = index.shape[0]
    call = _Call(x, m, 1, config)
    weights = jnp.pad(weights.astype(jnp.float32), (0, call.padded - m)).reshape(call.blocks, 1, call.rows)

    def finish(read, in_refs, out_refs):
        (weight_ref, other_ref), (scaled_ref, products_ref) = in_refs, out_refs
        row = read(0)
        scaled_ref[...] = (row * weight_ref[0, 0][:, None]).astype(scaled_ref.dtype)
        products_ref[0, 0] = _row_sums(row * other_ref[...].astype(jnp.float32))

    scaled, products = call(
        finish,
        index[:, None],
        [weights, other],
        [call.block_of_vectors(1), call.block_of_rows()],
        flops=3 * m * call.d,
        products=True,
        name="jmoe_gather_dot",
        interpret=interpret,
    )
    return scaled, products.reshape(-1)[:m]


class _Call:
    """A pallas_call over blocks of m output rows, each made of k rows of x."""

    def __init__(self, x, m: int, k: int, config: TileConfig):
        self.paired = copies.paired(x.dtype)
        self.n, self.d = x.shape
        self.x = copies.whole_pairs(x)
        self.m, self.k = m, k
        self.rows = min(config.rows, pl.cdiv(m, 16) * 16)
        self.blocks = pl.cdiv(m, self.rows)
        self.padded = self.blocks * self.rows
        chip = target.chip()
        self.cores = min(config.cores or chip.cores, self.blocks)
        self.steps = pl.cdiv(self.blocks, self.cores)
        small = self.x.size * self.x.dtype.itemsize <= min(SOURCE_BYTES, chip.vector_memory // 2)
        self.source = config.source or ("vmem" if small else "hbm")
        self.unroll = config.unroll

    def block(self, core, step, ahead=0):
        """The block that a core is at. One past the last is the last again: then the core has just done it."""
        return jnp.minimum(core * self.steps + step + ahead, self.blocks - 1)

    def block_of_vectors(self, count: int):
        return pl.BlockSpec((1, count, self.rows), lambda core, step: (self.block(core, step), 0, 0))

    def block_of_rows(self):
        return pl.BlockSpec((self.rows, self.d), lambda core, step: (self.block(core, step), 0))

    def indices(self, ahead: int):
        return pl.BlockSpec(
            (1, 1, self.rows * self.k),
            lambda core, step: (self.block(core, step, ahead), 0, 0),
            memory_space=pltpu.SMEM,
        )

    def __call__(self, finish, index, operands, specs, flops, *, products=False, name, interpret):
        # Past the last row of the result there is nothing to read: n is out of range.
        index = jnp.pad(index.astype(jnp.int32), ((0, self.padded - self.m), (0, 0)), constant_values=self.n)
        index = index.reshape(self.blocks, 1, self.rows * self.k)
        x = copies.pairs(self.x) if interpret and self.paired else self.x
        size, word = self.x.dtype.itemsize, copies.word(self.x.dtype)
        out_shape = [compat.result_of((self.m, self.d), self.x.dtype, [x, index, *operands])]
        out_specs = [self.block_of_rows()]
        if products:
            out_shape.append(compat.result_of((self.blocks, 1, self.rows), jnp.float32, [x, index, *operands]))
            out_specs.append(self.block_of_vectors(1))
        if self.source == "hbm":
            kernel = self._from_hbm
            ahead = [index]
            if self.paired:  # which row of its pair is meant, a lane each
                odd = (index & 1).reshape(self.blocks, self.rows, self.k).swapaxes(1, 2)
                operands, specs = [odd, *operands], [self.block_of_vectors(self.k), *specs]
            scratch = [
                pltpu.VMEM((2, self.k * self.rows, self.d), word),
                pltpu.VMEM((1, self.d), word),
                pltpu.SemaphoreType.DMA((2,)),
            ]
            read_bytes = self.m * self.k * self.d * 4  # a float32 row, or a pair of bfloat16 rows
            buffers = 2 * self.k * self.rows * self.d * 4
        else:
            kernel = self._from_vmem
            ahead = []
            scratch = [
                pltpu.VMEM(x.shape, x.dtype),
                pltpu.VMEM((self.k * self.rows, self.d), jnp.float32),
                pltpu.SemaphoreType.DMA,
            ]
            read_bytes = self.cores * self.x.size * size
            buffers = self.x.size * size + self.k * self.rows * self.d * 4
        others = sum(a.size * a.dtype.itemsize for a in [*operands, index, *ahead])
        results = sum(s.size * s.dtype.itemsize for s in out_shape)
        blocks = 2 * sum(math.prod(spec.block_shape) * 4 for spec in [*specs, *out_specs])
        return pl.pallas_call(
            functools.partial(kernel, finish, len(operands), len(out_shape)),
            grid=(self.cores, self.steps),
            in_specs=[
                *(self.indices(i) for i in range(1 + len(ahead))),
                pl.BlockSpec(memory_space=pl.ANY),
                *specs,
            ],
            out_specs=out_specs,
            out_shape=out_shape,
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=buffers + blocks + SPARE_BYTES
            ),
            cost_estimate=pl.CostEstimate(flops=flops, transcendentals=0, bytes_accessed=read_bytes + others + results),
            interpret=interpreter("tpu") if interpret else False,
            name=name,
        )(index, *ahead, x, *operands)

    def _from_hbm(self, finish, num_operands, num_results, index_ref, next_ref, x_ref, *refs):
        in_refs, out_refs = refs[:num_operands], refs[num_operands : num_operands + num_results]
        buffer, zero, semaphores = refs[num_operands + num_results :]
        step = pl.program_id(1)
        source = copies.words(x_ref)

        def start(indices, half):
            def one(i, carry):
                to = lax.rem(i, self.k) * self.rows + lax.div(i, self.k)  # all first rows, then all second ones, ...
                place = buffer.at[half, pl.ds(to, 1), :]
                copies.start(source, indices[0, 0, i], self.n, place, zero, semaphores.at[half])
                return carry

            lax.fori_loop(0, self.rows * self.k, one, 0, unroll=self.unroll)

        @pl.when(step == 0)
        def _():
            zero[...] = jnp.zeros_like(zero)
            start(index_ref, 0)

        half = lax.rem(step, 2)

        @pl.when(step + 1 < self.steps)
        def _():
            start(next_ref, 1 - half)

        copies.wait(buffer.at[half], semaphores.at[half])

        odd_ref, in_refs = (in_refs[0], in_refs[1:]) if self.paired else (None, in_refs)

        def read(j):
            rows = buffer[half, j * self.rows : (j + 1) * self.rows, :]
            return rows if odd_ref is None else copies.half(rows, odd_ref[0, j][:, None].astype(jnp.uint32))

        finish(read, in_refs, out_refs)

    def _from_vmem(self, finish, num_operands, num_results, index_ref, x_ref, *refs):
        in_refs, out_refs = refs[:num_operands], refs[num_operands : num_operands + num_results]
        source, buffer, semaphore = refs[num_operands + num_results :]

        @pl.when(pl.program_id(1) == 0)
        def _():
            copy = pltpu.make_async_copy(x_ref, source, semaphore)
            copy.start()
            copy.wait()

        words = copies.words(source)

        def one(i, carry):
            row = index_ref[0, 0, i]
            inside = (row >= 0) & (row < self.n)
            row = jnp.where(inside, row, 0)
            if self.paired:
                pair = words[pl.ds(row >> 1, 1), :]
                value = copies.half(pair, (row & 1).astype(jnp.uint32))
            else:
                value = words[pl.ds(row, 1), :]
            to = lax.rem(i, self.k) * self.rows + lax.div(i, self.k)
            buffer[pl.ds(to, 1), :] = jnp.where(inside, value, 0.0)
            return carry

        lax.fori_loop(0, self.rows * self.k, one, 0, unroll=self.unroll)
        finish(lambda j: buffer[j * self.rows : (j + 1) * self.rows, :], in_refs, out_refs)


def _row_sums(x):
    """[rows, d] -> [rows], which lie along lanes: a product with ones, because v4 cannot turn a column into a lane."""
    partial = sum(x[:, i : i + LANES] for i in range(LANES, x.shape[1], LANES)) + x[:, :LANES]
    ones, contract_lanes = jnp.ones((8, LANES), jnp.float32), (((1,), (1,)), ((), ()))
    return lax.dot_general(ones, partial, contract_lanes, precision=lax.Precision.HIGHEST)[0]
