"""Rows copied one by one into vector memory: what the kernels for TPU that read rows by index share.

bfloat16 rows lie in pairs: a 32-bit word holds the same column of rows 2i and 2i + 1. No single one of them can be
copied, so sources are viewed as uint32 [n / 2, d], a pair is copied, and the half that was meant becomes float32 by a
shift.
An index out of range copies a row of zeros that lies in vector memory: the semaphore counts the same bytes, and nothing
is read out of bounds.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu


def paired(dtype) -> bool:
    """Whether rows of this dtype are copied as pairs."""
    return bool(dtype == jnp.bfloat16)


def word(dtype):
    """The dtype of buffers that rows of float32, or pairs of rows of bfloat16, are copied to."""
    return jnp.uint32 if paired(dtype) else jnp.float32


def whole_pairs(x):
    """[n, d] with a row of zeros appended where the pair of the last row would not exist."""
    return jnp.pad(x, ((0, 1), (0, 0))) if paired(x.dtype) and x.shape[0] % 2 else x


def pairs(x):
    """What a view of bfloat16 rows [n, d] as uint32 holds: [n / 2, d], the even row in the low half of the word.

    Interpreters know no such view, and are given this.
    """
    halves = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    return halves[::2] | (halves[1::2] << 16)


def words(ref):
    """The view of a source that rows or pairs are copied from."""
    return ref.bitcast(jnp.uint32) if paired(ref.dtype) else ref


def half(pair, odd):
    """The even or odd row of pairs of bfloat16 rows, as float32; odd is uint32."""
    return lax.bitcast_convert_type((pair >> (odd * 16)) << 16, jnp.float32)


def start(source, row, n: int, to, zero, semaphore) -> None:
    """Starts to copy row `row` of n, or the pair that it is in, to a row in vector memory; `zero` if there is no such.

    Args:
      source: view of the n rows, from `words`.
      row: its number among the n; one outside [0, n) reads nothing.
      n: how many rows there are.
      to: reference to [1, d].
      zero: reference to [1, d] of zeros.
      semaphore: which counts the copy.
    """
    inside = (row >= 0) & (row < n)
    place = row >> 1 if source.dtype == jnp.uint32 else row

    def copy(origin):
        pltpu.make_async_copy(origin, to, semaphore).start()

    pl.when(inside)(lambda: copy(source.at[pl.ds(place, 1), :]))
    pl.when(jnp.logical_not(inside))(lambda: copy(zero))


def wait(buffer, semaphore) -> None:
    """Waits for as many copied bytes as the buffer has: a copy that is described but never started."""
    pltpu.make_async_copy(buffer, buffer, semaphore).wait()
