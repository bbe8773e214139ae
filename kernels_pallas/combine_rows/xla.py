"""combine_rows in plain XLA: k gathers forward, one gather and k row products backward, never a scatter of rows."""

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.indexing import take_rows

UNROLL = 8  # More slots per token than this are summed in a loop, so that the program does not grow with them.


def weighted_sum(y, slots, weights):
    """out[t] = sum_j weights[t, j] * y[slots[t, j]], summed in float32; weights None means 1."""

    def term(j_slots, j_weights):
        rows = take_rows(y, j_slots).astype(jnp.float32)
        return rows if j_weights is None else j_weights[:, None] * rows

    n, k = slots.shape
    if k <= UNROLL:
        columns = [term(slots[:, j], None if weights is None else weights[:, j]) for j in range(k)]
        return sum(columns[1:], columns[0]).astype(y.dtype)
    columns = (slots.T, None if weights is None else weights.T)
    zeros = jnp.zeros((n, y.shape[1]), jnp.float32)
    return jax.lax.scan(lambda out, column: (out + term(*column), None), zeros, columns)[0].astype(y.dtype)


def row_products(y, slots, dout):
    """[n, k]: the product of dout[t] with y[slots[t, j]], in float32; 0 where the slot is out of range."""

    def product(j_slots):
        return jnp.sum(dout.astype(jnp.float32) * take_rows(y, j_slots).astype(jnp.float32), axis=-1)

    if slots.shape[1] <= UNROLL:
        return jnp.stack([product(slots[:, j]) for j in range(slots.shape[1])], axis=-1)
    return jax.lax.map(product, slots.T).T


@jax.custom_vjp
def combine_rows(y, slots, weights, choice):
    """[m, d] -> [n, d]; out[t] = sum_j weights[t, j] * y[slots[t, j]]."""
    del choice
    return weighted_sum(y, slots, weights)


def _forward(y, slots, weights, choice):
    return weighted_sum(y, slots, weights), (y, slots, weights, choice)


def _backward(residuals, dout):
    y, slots, weights, choice = residuals
    # A slot is read by one token only, so its gradient is that token's, times the weight it was read with.
    weight = take_rows(weights.reshape(-1), choice)
    dy = weight[:, None] * take_rows(dout, choice // slots.shape[1]).astype(jnp.float32)
    dweights = row_products(y, slots, dout).astype(weights.dtype)
    none = (np.zeros(slots.shape, jax.dtypes.float0), np.zeros(choice.shape, jax.dtypes.float0))
    return dy.astype(y.dtype), none[0], dweights, none[1]


combine_rows.defvjp(_forward, _backward)
