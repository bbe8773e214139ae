"""The perceptrons of all experts on TPU, from tokens to slots, with nothing hidden in the memory of the device.

The rows of an expert are one tile where vector memory holds it, so that its weights are read once; else equal tiles, of
which the last is filled up with rows of zeros. The grid goes through the tiles, and for each through the hidden
columns, a block of them at a step:

    hidden [rows, columns] = activation(x [rows, d] @ w_in [d, columns] + b_in [columns])    rounded to the dtype of x
    total [rows, d] += hidden [rows, columns] @ w_out [columns, d]                           float32

Pallas fetches the blocks of weights ahead. The rows of the next tile are copied meanwhile from the tokens, by index
(rows/copies.py): at each step a share of them is started, so that they do not hold up the weights of the next step.
They land in one buffer. When a tile begins, the buffer is emptied into the operand of the product, and from then on it
is filled again.

The leading grid axis is parallel: of a chip with two cores (v4, v5p) each goes through half of the tiles.
Products take the precision that JAX is set to (`jax_default_matmul_precision`), as they do outside kernels.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import compat, target
from kernels_pallas.activations import ACTIVATIONS
from kernels_pallas.interpreter import interpreter
from kernels_pallas.rows import copies
from kernels_pallas.target import MIB

LANES = 128
PACKED = 16  # rows of a tile are a multiple of this: bfloat16 packs so many
CHUNK = 8  # copies that are started per turn of a loop; divides PACKED
COLUMNS = (512, 256, 128)  # of a block, the best first
TILE_BYTES = 32 * MIB  # of vector memory at most
SPARE_BYTES = 2 * MIB  # of vector memory, for what the compiler adds to what is counted: up to 0.3 MiB were seen
TRANSCENDENTALS = {"gelu": 1, "relu": 0, "silu": 1}  # per hidden value


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How the work is divided.

    Attributes:
      rows: of a tile, a multiple of PACKED. No tile has rows of two experts.
      columns: hidden columns of a grid step; they divide f.
    """

    rows: int
    columns: int

    def bytes(self, d: int, size: int) -> int:
        """The vector memory that tiles of [rows, d] take, with elements of `size` bytes."""
        landing, operand, result = 4, size, 2 * size  # the result has two buffers, as every block
        total = 0 if size == 4 else 4  # a float32 sum is made in the result
        weights = 2 * 2 * d * self.columns * size
        # What the compiler does not keep in registers: the hidden tile, and of bfloat16 the operand once more.
        between = self.columns * size + (0 if size == 4 else d * size)
        return self.rows * (d * (landing + operand + result + total) + between) + weights


def choose(c: int, d: int, f: int, size: int) -> TileConfig | None:
    """The tiles for experts of c rows: as few as the chip's vector memory holds. None if not even the smallest fit."""
    most = min(TILE_BYTES, target.chip().vector_memory - SPARE_BYTES)
    fitting = [columns for columns in COLUMNS if f % columns == 0]
    for per_expert in range(1, pl.cdiv(c, PACKED) + 1):
        rows = pl.cdiv(pl.cdiv(c, per_expert), PACKED) * PACKED
        for columns in fitting:
            # Half of a wide matrix unit idles in products of 128 columns: rather two tiles, while those are large.
            if columns < min(256, fitting[0]) and rows > 128:
                continue
            config = TileConfig(rows, columns)
            if config.bytes(d, size) <= most:
                return config
    return None


def refusal(x, source, w_in, *_, activation: str) -> str | None:
    """Why these arguments cannot be taken, or None."""
    del activation  # all are supported
    n, m, (e, d, f) = x.shape[0], source.shape[0], w_in.shape
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"The TPU kernel takes float32 and bfloat16, not {x.dtype}."
    if d % LANES or f % LANES or d == 0 or f == 0:
        return f"The TPU kernel takes widths that are multiples of {LANES}, not d={d} and f={f}."
    if n == 0 or m == 0:
        return f"The TPU kernel wants at least one row to read and one to write, not {n} and {m}."
    if choose(m // e, d, f, x.dtype.itemsize) is None:
        return f"Vector memory does not hold the smallest tile of the TPU kernel at d={d}."
    return None


def expert_mlp(x, source, w_in, b_in, w_out, b_out, *, activation, interpret=False, config: TileConfig | None = None):
    """[n, d] -> [m, d]; row i is the perceptron of expert i // (m / e) applied to x[source[i]]."""
    (n, d), (e, _, f), size = x.shape, w_in.shape, x.dtype.itemsize
    c = source.shape[0] // e
    config = config or choose(c, d, f, size)
    assert config is not None  # or `refusal` would have said so
    grid = _Grid(e, c, f, config)
    rows, columns = config.rows, config.columns

    # Past the last row of an expert there is nothing to read: n is out of range.
    index = jnp.pad(source.astype(jnp.int32).reshape(e, c), ((0, 0), (0, grid.padded - c)), constant_values=n)
    index = index.reshape(grid.tiles, 1, rows)
    x = copies.whole_pairs(x)
    paired, word = copies.paired(x.dtype), copies.word(x.dtype)
    operands = [index, index, copies.pairs(x) if interpret and paired else x]
    specs = [grid.indices(0), grid.indices(1), pl.BlockSpec(memory_space=pl.ANY)]
    if paired:  # which row of its pair is meant, a lane each
        operands.append(index & 1)
        specs.append(pl.BlockSpec((1, 1, rows), lambda core, step, column: (grid.tile(core, step), 0, 0)))
    operands += [w_in, b_in[:, None], w_out, b_out[:, None]]
    specs += [
        pl.BlockSpec((1, d, columns), lambda core, step, column: (grid.expert(core, step), 0, column)),
        pl.BlockSpec((1, 1, columns), lambda core, step, column: (grid.expert(core, step), 0, column)),
        pl.BlockSpec((1, columns, d), lambda core, step, column: (grid.expert(core, step), column, 0)),
        pl.BlockSpec((1, 1, d), lambda core, step, column: (grid.expert(core, step), 0, 0)),
    ]
    scratch = [
        pltpu.VMEM((rows, d), word),
        pltpu.VMEM((1, d), word),
        pltpu.VMEM((rows, d), x.dtype),
        pltpu.SemaphoreType.DMA,
    ]
    if x.dtype != jnp.float32:  # a float32 sum is made in the result
        scratch.append(pltpu.VMEM((rows, d), jnp.float32))
    hidden = grid.tiles * rows * f
    (out,) = pl.pallas_call(
        functools.partial(_kernel, grid, n, ACTIVATIONS[activation], paired),
        grid=(grid.cores, grid.steps, grid.columns),
        in_specs=specs,
        out_specs=[pl.BlockSpec((1, rows, d), lambda core, step, column: grid.result(core, step))],
        out_shape=[compat.result_of((e, c, d), x.dtype, operands)],
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=config.bytes(d, size) + SPARE_BYTES,
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * hidden * d,
            transcendentals=TRANSCENDENTALS[activation] * hidden,
            bytes_accessed=grid.weight_reads * (2 * d + 1) * f * size  # of w_in, w_out and b_in
            + grid.expert_changes * d * size  # of b_out
            + e * c * d * (4 + size)  # a float32 row, or a pair of bfloat16 rows; and the result
            + (3 if paired else 2) * index.size * 4,
        ),
        interpret=interpreter("tpu") if interpret else False,
        name="jmoe_expert_mlp",
    )(*operands)
    return (out.reshape(e * c, d),)


class _Grid:
    """The order of the work: (core, step) is a tile of rows, and `columns` steps go through its hidden columns."""

    def __init__(self, e: int, c: int, f: int, config: TileConfig):
        self.rows = config.rows
        self.per_expert = pl.cdiv(c, config.rows)
        self.padded = self.per_expert * config.rows  # rows of an expert
        self.tiles = e * self.per_expert
        # What does not divide is left to one core: the chip may have no other, and would do a tile twice.
        self.cores = target.chip().cores if self.tiles % target.chip().cores == 0 else 1
        self.steps = self.tiles // self.cores
        self.columns = f // config.columns
        # Blocks of weights stay for the next tile if it is of the same expert, unless columns have gone by.
        self.expert_changes = e + (self.cores - 1 if self.steps % self.per_expert else 0)
        self.weight_reads = self.tiles if self.columns > 1 else self.expert_changes

    def tile(self, core, step):
        return core * self.steps + step

    def expert(self, core, step):
        return lax.div(self.tile(core, step), self.per_expert)

    def result(self, core, step):
        return self.expert(core, step), lax.rem(self.tile(core, step), self.per_expert), 0

    def indices(self, ahead: int):
        return pl.BlockSpec(
            (1, 1, self.rows),
            lambda core, step, column: (jnp.minimum(self.tile(core, step) + ahead, self.tiles - 1), 0, 0),
            memory_space=pltpu.SMEM,
        )


def _kernel(grid, n, activation, paired, index_ref, next_ref, x_ref, *refs):
    odd_ref, refs = (refs[0], refs[1:]) if paired else (None, refs)
    w_in_ref, b_in_ref, w_out_ref, b_out_ref, out_ref, landing, zero, operand, semaphore, *rest = refs
    total = rest[0] if rest else out_ref.at[0]
    step, column = pl.program_id(1), pl.program_id(2)
    source = copies.words(x_ref)

    def start(indices, first, chunks):
        def chunk(i, carry):
            @pl.when(first + i * CHUNK < grid.rows)
            def _():
                for j in range(CHUNK):
                    row = first + i * CHUNK + j
                    copies.start(source, indices[0, 0, row], n, landing.at[pl.ds(row, 1), :], zero, semaphore)

            return carry

        lax.fori_loop(0, chunks, chunk, 0)

    @pl.when(column == 0)
    def _():
        @pl.when(step == 0)
        def _():
            zero[...] = jnp.zeros_like(zero)
            start(index_ref, 0, grid.rows // CHUNK)

        copies.wait(landing, semaphore)
        rows = landing[...]
        if odd_ref is not None:
            rows = copies.half(rows, odd_ref[0, 0][:, None].astype(jnp.uint32))
        operand[...] = rows.astype(operand.dtype)
        total[...] = jnp.broadcast_to(b_out_ref[0].astype(jnp.float32), total.shape)

    share = pl.cdiv(grid.rows // CHUNK, grid.columns)

    @pl.when(step + 1 < grid.steps)
    def _():
        start(next_ref, column * (share * CHUNK), share)

    before = jnp.dot(operand[...], w_in_ref[0], preferred_element_type=jnp.float32) + b_in_ref[0].astype(jnp.float32)
    hidden = activation(before).astype(operand.dtype)
    total[...] += jnp.dot(hidden, w_out_ref[0], preferred_element_type=jnp.float32)
    if rest:

        @pl.when(column == grid.columns - 1)
        def _():
            out_ref[0] = total[...].astype(out_ref.dtype)
