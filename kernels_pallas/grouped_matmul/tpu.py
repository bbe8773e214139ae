"""The grouped matrix multiply on TPU.

The rows are cut into tiles, and the tiles into ranges, one for each core at least. A step of the grid multiplies one
tile by the matrix of one group that has rows in it: a tile in which groups meet is visited once for each of them. Which
step does what is worked out from the group sizes beforehand (`plan`) and stands in scalar memory; there are exactly as
many steps as there are such pairs.

    grid   (ranges, blocks of columns, steps)
    x      a tile of rows with all columns, fetched ahead by Pallas
    w      a block of columns of one group's matrix, the whole contracted axis long
    out    stays in vector memory while steps visit the same tile; each writes the rows of its group

The block of w stays while consecutive steps belong to one group, so every matrix is read once. With few rows per group
that is most of the traffic, and it comes in bursts: Pallas would fetch the next group's block during the last step of
this one only. So the kernel copies it by itself, from the first step of a group on, while all of its rows are
multiplied.

Rows that are given by index are copied one by one (rows/copies.py), those of the next tile while this one is
multiplied, during the first block of columns. They are kept in vector memory for the others: there are as many
ranges as it takes for the rows of one to fit.

The gradient for w, `grouped_outer`, goes through the same steps for each block of the result, which gathers in float32
while the steps belong to one group and is written once. An empty group has one step, which writes zeros.
"""

import dataclasses
import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import compat
from kernels_pallas.activations import ACTIVATIONS
from kernels_pallas.interpreter import interpreter
from kernels_pallas.rows import copies
from kernels_pallas.target import MIB, Chip, chip

LANES = 128
SUBLANES = 16  # of bfloat16; a tile of rows is a multiple of it
UNROLL = 8  # copies of rows that are started per turn of the loop
MOST_MEMORY = 32 * MIB  # of vector memory, and at most half of it, because XLA keeps arrays of its own there
LEAST_MEMORY = 25 * MIB // 2  # but this much, of 16 MiB of the smallest chip, v4
SPARE_MEMORY = 7 * MIB // 2  # for what the compiler adds to what is counted here


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How a multiplication is cut.

    Attributes:
      rows: of a tile.
      columns: of the result in a block; a multiple of 128.
      ranges: of tiles; the size of the leading, parallel grid axis.
    """

    rows: int
    columns: int
    ranges: int


@dataclasses.dataclass(frozen=True)
class OuterConfig:
    """How the product of grouped_outer is cut.

    Attributes:
      rows: of a tile.
      depth: rows of a block of the result, which are columns of x; a multiple of 128.
      columns: of a block of the result; a multiple of 128.
    """

    rows: int
    depth: int
    columns: int


def refusal(x, other, group_sizes, *more, extras=(), transposed=False, keep=False, **_) -> str | None:
    """Why these arguments of grouped_matmul or grouped_outer cannot be taken, or None."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"The TPU kernel takes float32 and bfloat16, not {x.dtype}."
    k, n = x.shape[1], other.shape[1 if transposed else -1]
    if k % LANES or n % LANES or 0 in (k, n):
        return f"The TPU kernel takes matrices of multiples of {LANES} rows and columns, not [{k}, {n}]."
    gathered = "index" in extras
    m, e, size = (more[0] if gathered else x).shape[0], group_sizes.shape[0], x.dtype.itemsize
    if other.ndim == 3 and m and e and tile_config(m, k, n, e, size, 1 + keep, gathered) is None:
        return f"The TPU kernel holds whole columns of a matrix in vector memory, and {k} numbers each are too many."
    return None


def grouped_matmul(
    x,
    w,
    group_sizes,
    *more,
    extras=(),
    transposed=False,
    activation=None,
    keep=False,
    interpret: bool = False,
    config: TileConfig | None = None,
):
    """[m, k] by [e, k, n], or by [e, n, k] if transposed -> [m, n]; the arguments are those of xla.grouped_matmul."""
    named = dict(zip(extras, more, strict=True))
    index = named.get("index")
    m = x.shape[0] if index is None else index.shape[0]
    e, n = w.shape[0], w.shape[1 if transposed else 2]
    if m == 0 or e == 0:
        return tuple(jnp.zeros((m, n), x.dtype) for _ in range(1 + keep))
    config = config or tile_config(m, x.shape[1], n, e, x.dtype.itemsize, 1 + keep, index is not None)
    assert config is not None, refusal(x, w, group_sizes, *more, extras=extras, transposed=transposed, keep=keep)
    call = _Matmul(x, w, m, index is not None, named.get("bias"), transposed, activation, keep, config)
    return tuple(call(group_sizes, index, interpret))


def tile_config(
    m: int, k: int, n: int, e: int, size: int, outputs: int = 1, gathered: bool = False
) -> TileConfig | None:
    """The tiles of [m, k] by [e, k, n], of numbers of so many bytes; None if nothing fits into vector memory."""
    cores, memory = chip().cores, _memory(chip())
    for rows in _row_tiles(m, e):
        tiles = pl.cdiv(m, rows)
        per_range = pl.cdiv(tiles, cores)
        if gathered:  # a quarter of the memory is for the rows of a range
            fitting = max(1, memory // 4 // (rows * k * size))
            per_range = pl.cdiv(tiles, _round_up(pl.cdiv(tiles, fitting), cores))
        # Rows: a tile of x twice, or those that have landed twice, as words, and those that are kept.
        of_rows = (2 * rows * k * 4 + per_range * rows * k * size) if gathered else 2 * rows * k * size
        # Fewest blocks of columns first: the rows are read once for each.
        for blocks in range(1, n // LANES + 1):
            columns = _round_up(pl.cdiv(n, blocks), LANES)
            of_columns = 2 * k * columns * size + rows * columns * (2 * outputs * size + 3 * 4)
            if of_rows + of_columns <= memory:
                return TileConfig(rows=rows, columns=columns, ranges=pl.cdiv(tiles, per_range))
    return None


def outer_config(m: int, k: int, n: int, e: int, size: int) -> OuterConfig:
    """The tiles of [m, k] by [m, n] -> [e, k, n]."""
    rows, most = _row_tiles(m, e)[0], _memory(chip())
    best = None
    for deep in range(1, k // LANES + 1):
        depth = _round_up(pl.cdiv(k, deep), LANES)
        for wide in range(1, n // LANES + 1):
            columns = _round_up(pl.cdiv(n, wide), LANES)
            # The block of the result as float32, its product, and twice as it is written; twice the tiles of rows.
            memory = depth * columns * (2 * 4 + 2 * size) + rows * (depth + columns) * (2 * size + 4)
            if memory <= most and (deep * wide >= chip().cores or k * n == LANES**2):  # a block for each core
                reads = wide * k + deep * n
                if best is None or reads < best[0]:
                    best = reads, OuterConfig(rows=rows, depth=depth, columns=columns)
                break  # more blocks read more
    assert best is not None  # the smallest blocks always fit
    return best[1]


def _memory(of: Chip) -> int:
    return max(LEAST_MEMORY, min(MOST_MEMORY, of.vector_memory // 2))


def _compiler_params(dtype, *semantics):
    # At the highest precision the compiler splits float32 operands into parts, and keeps those.
    spare = _memory(chip()) if dtype == jnp.float32 else SPARE_MEMORY
    return pltpu.CompilerParams(
        dimension_semantics=semantics, vmem_limit_bytes=min(_memory(chip()) + spare, chip().vector_memory)
    )


def _row_tiles(m: int, e: int) -> list[int]:
    """Rows of a tile, the preferred first.

    A tile in which groups meet is multiplied once for each: with tiles of a quarter of a group that adds a quarter.
    Less than 128 rows leave a matrix unit waiting for its weights, whatever the groups.
    """
    most = next(rows for rows in (512, 256, 128) if rows <= max(128, m // (4 * e)))
    most = min(most, _round_up(m, SUBLANES))
    return [most, *(rows for rows in (256, 128, 64, 32, 16) if rows < most)]


def _round_up(number: int, multiple: int) -> int:
    return pl.cdiv(number, multiple) * multiple


FIELDS = ("group", "next", "tile", "start", "stop")


def plan(group_sizes, m: int, rows: int, ranges: int, *, every_group: bool = False, interpret: bool = False):
    """What each step does.

    Groups are taken in order, tiles of a group in order. The rows beyond the last group count as one group more, so
    that every tile is visited, unless every_group asks for steps of the empty groups instead.

    This is a kernel too, for the scalar unit alone: as XLA's own operations, each on a few numbers, it would be twenty
    that wait for each other.

    Args:
      group_sizes: [e].
      m: rows; groups end there.
      rows: of a tile.
      ranges: among which the tiles are divided.
      every_group: visit each group at least once, and only groups.
      interpret: run step by step.

    Returns:
      int32 [ranges * steps * 5]: FIELDS of each step, with `steps` places for each range, as many as it can have.
      `start` to `stop` are the rows of its group in its tile; they are equal in a step that does nothing, of an empty
      group, or of a range that has fewer steps than another. `next` is the next group in the range that has steps;
      e or more if there is none. And int32 [1], how many steps the range with the most of them has.
    """
    e, tiles = group_sizes.shape[0], pl.cdiv(m, rows)
    per_range = pl.cdiv(tiles, ranges)
    steps = steps_of(per_range, e)

    def kernel(sizes_ref, table_ref, count_ref):
        def put(position, **fields):
            for name, value in fields.items():
                table_ref[position * len(FIELDS) + FIELDS.index(name)] = jnp.asarray(value, jnp.int32)

        def of_range(r, most):
            low, high = r * per_range * rows, jnp.minimum((r + 1) * per_range * rows, m)

            def of_group(group, carry):
                begin, step = carry
                size = sizes_ref[jnp.minimum(group, e - 1)]
                end = jnp.where(group < e, jnp.minimum(begin + size, m), m)
                start, stop = jnp.clip(begin, low, high), jnp.clip(end, low, high)
                first = jnp.minimum(lax.div(start, rows), tiles - 1)
                count = jnp.where(stop > start, lax.div(stop - 1, rows) - first + 1, int(every_group))

                def of_tile(i, _):
                    tile = first + i
                    inside = jnp.maximum(start, tile * rows), jnp.minimum(stop, (tile + 1) * rows)
                    put(r * steps + step + i, group=group, tile=tile, start=inside[0], stop=inside[1])

                lax.fori_loop(0, count, of_tile, None)
                return end, step + count

            _, count = lax.fori_loop(0, e if every_group else e + 1, of_group, (jnp.int32(0), jnp.int32(0)))

            def of_step(i, carry):  # from the last to the first
                group, following = carry
                step = _Step(table_ref, r * steps + count - 1 - i)
                following = jnp.where(step.group == group, following, group)
                put(r * steps + count - 1 - i, next=following)
                return step.group, following

            lax.fori_loop(0, count, of_step, (jnp.int32(e), jnp.int32(e)))
            last = _Step(table_ref, r * steps + count - 1)
            group, tile = last.group, last.tile

            def of_nothing(i, _):
                put(r * steps + i, group=group, next=e, tile=tile, start=0, stop=0)

            lax.fori_loop(count, steps, of_nothing, None)
            return jnp.maximum(most, count)

        count_ref[0] = lax.fori_loop(0, ranges, of_range, jnp.int32(0))

    table, count = pl.pallas_call(
        kernel,
        in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)],
        out_specs=[pl.BlockSpec(memory_space=pltpu.SMEM)] * 2,
        out_shape=[
            compat.result_of((ranges * steps * len(FIELDS),), jnp.int32, [group_sizes]),
            compat.result_of((1,), jnp.int32, [group_sizes]),
        ],
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=4 * (e + ranges * steps * len(FIELDS))
        ),
        interpret=interpreter("tpu") if interpret else False,
        name="jmoe_grouped_plan",
    )(group_sizes.astype(jnp.int32))
    return table, count


def steps_of(tiles: int, e: int) -> int:
    """How many steps so many tiles can have: one each, and one more for each place where groups, or none, meet."""
    return tiles + e


class _Step:
    """A row of the plan, as a kernel or an index map reads it."""

    def __init__(self, plan_ref, position):
        self._plan, self._position = plan_ref, position

    def __getattr__(self, name: str):
        return self._plan[self._position * len(FIELDS) + FIELDS.index(name)]


class _Matmul:
    """A pallas_call that multiplies tiles of rows by blocks of columns."""

    def __init__(self, x, w, m, gathered, bias, transposed, activation, keep, config: TileConfig):
        self.gathered, self.transposed, self.activation, self.keep = gathered, transposed, activation, keep
        self.w, self.bias = w, bias
        self.source_rows = x.shape[0]
        if gathered:  # the pair of the last row must exist, and an array without rows cannot be named
            x = copies.whole_pairs(x if x.shape[0] else jnp.zeros((1, x.shape[1]), x.dtype))
        self.x, self.m = x, m
        self.k, self.e = x.shape[1], w.shape[0]
        self.n = w.shape[1 if transposed else 2]
        self.rows, self.columns, self.ranges = config.rows, config.columns, config.ranges
        self.tiles = pl.cdiv(m, self.rows)
        self.per_range = pl.cdiv(self.tiles, self.ranges)
        assert (self.ranges - 1) * self.per_range < self.tiles, "a range has no tile"
        self.blocks = pl.cdiv(self.n, self.columns)
        self.steps = steps_of(self.per_range, self.e)

    def at(self, plan_ref, of_range, step):
        return _Step(plan_ref, of_range * self.steps + step)

    def __call__(self, group_sizes, index, interpret):
        table, count = plan(group_sizes, self.m, self.rows, self.ranges, interpret=interpret)
        x, dtype = self.x, self.x.dtype
        operands, specs, scratch = [], [], []
        if self.gathered:
            # Beyond the last row there is nothing to read.
            padding = (0, self.tiles * self.rows - self.m)
            index = jnp.pad(index.astype(jnp.int32), padding, constant_values=-1).reshape(self.tiles, 1, self.rows)
            operands += [index, index]
            specs += [self.indices(0), self.indices(1)]
            if copies.paired(dtype):  # which row of its pair is meant, a lane each
                operands.append(index & 1)
                specs.append(self.indices(0, pltpu.VMEM))
            operands.append(copies.pairs(x) if interpret and copies.paired(dtype) else x)
            specs.append(pl.BlockSpec(memory_space=pl.ANY))
            scratch = [
                pltpu.VMEM((2, self.rows, self.k), copies.word(dtype)),
                pltpu.VMEM((1, self.k), copies.word(dtype)),
                pltpu.VMEM((self.per_range, self.rows, self.k), dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ]
        else:
            operands.append(x)
            specs.append(pl.BlockSpec((self.rows, self.k), lambda r, b, s, p: (self.at(p, r, s).tile, 0)))
        operands.append(self.w)
        specs.append(pl.BlockSpec(memory_space=pl.ANY))
        if self.bias is not None:
            operands.append(self.bias[:, None])
            specs.append(pl.BlockSpec((1, 1, self.columns), self.place_of_bias))
        block = (self.columns, self.k) if self.transposed else (self.k, self.columns)
        results = 1 + self.keep
        out_spec = pl.BlockSpec((self.rows, self.columns), lambda r, b, s, p: (self.at(p, r, s).tile, b))
        return pl.pallas_call(
            functools.partial(self._kernel, results),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(self.ranges, self.blocks, count[0]),
                in_specs=specs,
                out_specs=[out_spec] * results,
                scratch_shapes=[
                    pltpu.VMEM((2, *block), dtype),
                    pltpu.SemaphoreType.DMA((2,)),
                    pltpu.SMEM((1,), jnp.int32),
                    *scratch,
                ],
            ),
            out_shape=[compat.result_of((self.m, self.n), dtype, [table, *operands])] * results,
            compiler_params=_compiler_params(dtype, "parallel", "arbitrary", "arbitrary"),
            cost_estimate=self.cost(results),
            interpret=interpreter("tpu") if interpret else False,
            name="jmoe_grouped_matmul" + "_transposed" * self.transposed + "_gathered" * self.gathered,
        )(table, *operands)

    def place_of_bias(self, r, b, s, p):
        return jnp.minimum(self.at(p, r, s).group, self.e - 1), 0, b

    def indices(self, ahead: int, memory=pltpu.SMEM):
        """Blocks of a number for each row of a tile, or of the next one; the last tile is also its own next."""

        def place(r, b, s, p):
            return jnp.minimum(self.at(p, r, s).tile + ahead, self.tiles - 1), 0, 0

        return pl.BlockSpec((1, 1, self.rows), place, memory_space=memory)

    def cost(self, results: int) -> pl.CostEstimate:
        """What is multiplied and fetched if no group is empty and all of them meet within tiles."""
        size = self.x.dtype.itemsize
        visits = self.tiles + self.e - 1
        # A row by index is copied once, by itself as float32 or with its pair.
        x = self.m * self.k * (4 if self.gathered else self.blocks * size)
        lists = (
            3 * self.blocks * self.tiles * self.rows * 4 if self.gathered else 0
        )  # of indices, ahead too, and halves
        matrices = self.e + self.ranges - 1  # one lies in two ranges where they meet
        matrix = (self.k + (self.bias is not None)) * self.n * size
        return pl.CostEstimate(
            flops=2 * visits * self.rows * self.k * self.n,
            transcendentals=visits * self.rows * self.n if self.activation in ("gelu", "silu") else 0,
            bytes_accessed=x + lists + matrices * matrix + results * self.m * self.n * size,
        )

    def _kernel(self, results, plan_ref, *refs):
        if self.gathered:
            index_ref, next_ref, *refs = refs
            odd_ref, *refs = refs if copies.paired(self.x.dtype) else (None, *refs)
        x_ref, w_ref, *refs = refs
        bias_ref, *refs = refs if self.bias is not None else (None, *refs)
        out_refs, (buffer, semaphores, turn, *scratch) = refs[:results], refs[results:]
        of_range, block, number = (pl.program_id(axis) for axis in range(3))
        step, previous = (self.at(plan_ref, of_range, i) for i in (number, jnp.maximum(number - 1, 0)))
        new_tile = (number == 0) | (step.tile != previous.tile)
        new_group = (number == 0) | (step.group != previous.group)
        works = step.group < self.e

        def copy(group, block, half, act):
            """Starts or awaits the copy of a block of columns; the last one may be narrower."""

            def columns(width):
                place = pl.ds(block * self.columns, width)
                if self.transposed:
                    source, to = w_ref.at[group, place, :], buffer.at[half, :width, :]
                else:
                    source, to = w_ref.at[group, :, place], buffer.at[half, :, :width]
                act(pltpu.make_async_copy(source, to, semaphores.at[half]))

            rest = self.n - (self.blocks - 1) * self.columns
            if rest == self.columns:
                columns(rest)
            else:
                pl.when(block < self.blocks - 1)(lambda: columns(self.columns))
                pl.when(block == self.blocks - 1)(lambda: columns(rest))

        @pl.when(new_group & works)
        def _():
            @pl.when((number == 0) & (block == 0))
            def _():
                turn[0] = 1
                copy(step.group, block, 0, lambda c: c.start())

            # The halves of the buffer take turns, through all blocks of columns: after the last group of a block comes
            # the first one of the next.
            turn[0] = 1 - turn[0]
            half = turn[0]
            more = step.next < self.e
            group = jnp.where(more, step.next, self.at(plan_ref, of_range, 0).group)
            at = jnp.where(more, block, block + 1)

            @pl.when(at < self.blocks)
            def _():
                copy(group, at, 1 - half, lambda c: c.start())

            copy(step.group, block, half, lambda c: c.wait())

        if self.gathered:
            place = step.tile - of_range * self.per_range
            landing, zero, kept, row_semaphores = scratch

            @pl.when(new_tile & (block == 0))
            def _():
                self._gather(place, of_range, index_ref, next_ref, x_ref, landing, zero, row_semaphores)
                arrived = landing[lax.rem(place, 2)]
                if odd_ref is not None:
                    arrived = copies.half(arrived, odd_ref[0, 0][:, None].astype(jnp.uint32))
                kept[place] = arrived.astype(kept.dtype)

        @pl.when(new_tile)
        def _():
            for ref in out_refs:
                ref[...] = jnp.zeros_like(ref)

        @pl.when(works & (step.stop > step.start))
        def _():
            x = kept[place] if self.gathered else x_ref[...]
            contracted = (((1,), (1 if self.transposed else 0,)), ((), ()))
            product = lax.dot_general(x, buffer[turn[0]], contracted, preferred_element_type=jnp.float32)
            if bias_ref is not None:
                product = product + bias_ref[0].astype(jnp.float32)
            row = step.tile * self.rows + lax.broadcasted_iota(jnp.int32, (self.rows, 1), 0)
            mine = (row >= step.start) & (row < step.stop)
            for ref, value in zip(out_refs, (ACTIVATIONS[self.activation](product), product), strict=False):
                ref[...] = jnp.where(mine, value, ref[...].astype(jnp.float32)).astype(ref.dtype)

    def _gather(self, place, of_range, index_ref, next_ref, x_ref, landing, zero, semaphores):
        """Awaits the rows of a tile, having started to copy those of the next one of the range."""
        source = copies.words(x_ref)

        def start(indices, half):
            def one(i, carry):
                to = landing.at[half, pl.ds(i, 1), :]
                copies.start(source, indices[0, 0, i], self.source_rows, to, zero, semaphores.at[half])
                return carry

            lax.fori_loop(0, self.rows, one, 0, unroll=UNROLL)

        @pl.when(place == 0)
        def _():
            zero[...] = jnp.zeros_like(zero)
            start(index_ref, 0)

        half = lax.rem(place, 2)
        tiles = jnp.minimum(self.per_range, self.tiles - of_range * self.per_range)

        @pl.when(place + 1 < tiles)
        def _():
            start(next_ref, 1 - half)

        copies.wait(landing.at[half], semaphores.at[half])


def grouped_outer(x, dout, group_sizes, *, interpret: bool = False, config: OuterConfig | None = None):
    """[m, k], [m, n] -> [e, k, n]: for each group the product of its rows of x, transposed, with those of dout."""
    (m, k), n, e = x.shape, dout.shape[1], group_sizes.shape[0]
    if m == 0 or e == 0:
        return (jnp.zeros((e, k, n), x.dtype),)
    size = x.dtype.itemsize
    config = config or outer_config(m, k, n, e, size)
    rows, depth, columns = config.rows, config.depth, config.columns
    deep, wide, tiles = pl.cdiv(k, depth), pl.cdiv(n, columns), pl.cdiv(m, rows)
    table, count = plan(group_sizes, m, rows, 1, every_group=True, interpret=interpret)
    # The axis of more blocks leads: it is divided among the cores.
    grid, blocks_of = ((deep, wide), lambda a, b: (a, b)) if deep > wide else ((wide, deep), lambda a, b: (b, a))

    def kernel(plan_ref, x_ref, dout_ref, out_ref, total):
        number = pl.program_id(2)
        step, previous = _Step(plan_ref, number), _Step(plan_ref, jnp.maximum(number - 1, 0))
        following = _Step(plan_ref, jnp.minimum(number + 1, pl.num_programs(2) - 1))
        row = step.tile * rows + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        mine = (row >= step.start) & (row < step.stop)

        @pl.when((number == 0) | (step.group != previous.group))
        def _():
            total[...] = jnp.zeros_like(total)

        @pl.when(step.stop > step.start)
        def _():
            # Rows of others, and of nobody, may hold anything: both must be zero.
            a, b = (jnp.where(mine, ref[...].astype(jnp.float32), 0.0).astype(ref.dtype) for ref in (x_ref, dout_ref))
            total[...] += lax.dot_general(a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)

        @pl.when((number == pl.num_programs(2) - 1) | (step.group != following.group))
        def _():
            out_ref[0] = total[...].astype(out_ref.dtype)

    def of_x(a, b, s, p):
        return _Step(p, s).tile, blocks_of(a, b)[0]

    def of_dout(a, b, s, p):
        return _Step(p, s).tile, blocks_of(a, b)[1]

    def of_out(a, b, s, p):
        return _Step(p, s).group, *blocks_of(a, b)

    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(*grid, count[0]),
            in_specs=[pl.BlockSpec((rows, depth), of_x), pl.BlockSpec((rows, columns), of_dout)],
            out_specs=[pl.BlockSpec((1, depth, columns), of_out)],
            scratch_shapes=[pltpu.VMEM((depth, columns), jnp.float32)],
        ),
        out_shape=[compat.result_of((e, k, n), x.dtype, [x, dout, group_sizes])],
        compiler_params=_compiler_params(x.dtype, "parallel", "parallel", "arbitrary"),
        cost_estimate=pl.CostEstimate(
            flops=2 * (tiles + e - 1) * rows * k * n,
            transcendentals=0,
            bytes_accessed=(m * (wide * k + deep * n) + e * k * n) * size,
        ),
        interpret=interpreter("tpu") if interpret else False,
        name="jmoe_grouped_outer",
    )(table, x, dout)
