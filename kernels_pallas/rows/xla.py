"""Rows by index in plain XLA: gathers, never a scatter of rows."""

import jax
import jax.numpy as jnp

UNROLL = 8  # More rows per sum than this are summed in a loop, so that the program does not grow with them.


def take_rows(x, index):
    """Reads rows of x; an index outside [0, n) reads zeros. `jnp.take` alone would wrap a negative index round."""
    n = x.shape[0]
    if n == 0:  # from which jnp.take refuses to take
        return jnp.zeros(index.shape + x.shape[1:], x.dtype)
    return jnp.take(x, jnp.where(index < 0, n, index), axis=0, mode="fill", fill_value=0)


def gather_sum(x, index, weights=None):
    """[n, d] -> [m, d]; out[i] = sum_j weights[i, j] * x[index[i, j]], summed in float32."""
    m, k = index.shape
    if k == 1 and weights is None:
        return (take_rows(x, index[:, 0]),)

    def term(index, weights):
        rows = take_rows(x, index).astype(jnp.float32)
        return rows if weights is None else weights[:, None] * rows

    if k <= UNROLL:
        terms = [term(index[:, j], None if weights is None else weights[:, j]) for j in range(k)]
        return (sum(terms[1:], terms[0]).astype(x.dtype),)
    columns = (index.T, None if weights is None else weights.T)
    zeros = jnp.zeros((m, x.shape[1]), jnp.float32)
    return (jax.lax.scan(lambda out, column: (out + term(*column), None), zeros, columns)[0].astype(x.dtype),)


def gather_dot(x, index, weights, other):
    """[n, d], [m, d] -> weights[i] * x[index[i]] [m, d], and the products of x[index[i]] with other[i] [m]."""
    rows = take_rows(x, index).astype(jnp.float32)
    return (weights[:, None] * rows).astype(x.dtype), jnp.sum(rows * other.astype(jnp.float32), axis=-1)
