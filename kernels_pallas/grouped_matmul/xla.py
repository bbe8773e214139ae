"""Matrix multiplies of grouped rows through XLA's own ragged product."""

import jax
import jax.numpy as jnp


def grouped_matmul(x, w, group_sizes, *, transposed: bool = False):
    """[m, k] by [e, k, n], or by [e, n, k] if transposed -> [m, n]; rows of no group come out zero."""
    w = w.swapaxes(1, 2) if transposed else w
    out = jax.lax.ragged_dot(x, w, group_sizes.astype(jnp.int32), preferred_element_type=jnp.float32)
    return (jnp.where(owned(x.shape[0], group_sizes), out, 0).astype(x.dtype),)


def grouped_outer(x, dout, group_sizes):
    """[m, k], [m, n] -> [e, k, n]: for each group the product of its rows of x, transposed, with those of dout."""
    mask = owned(x.shape[0], group_sizes)
    like = jnp.zeros((group_sizes.shape[0], x.shape[1], dout.shape[1]), x.dtype)

    def product(w):
        return jax.lax.ragged_dot(x, w, group_sizes.astype(jnp.int32), preferred_element_type=jnp.float32)

    return tuple(jax.linear_transpose(product, like)(jnp.where(mask, dout, 0).astype(jnp.float32)))


def owned(rows: int, group_sizes):
    """[rows, 1]: which rows belong to a group. What ragged_dot does with the others differs between platforms."""
    return (jnp.arange(rows) < jnp.sum(group_sizes))[:, None]
