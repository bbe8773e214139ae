"""The definition of grouped_matmul: every row by every matrix, and the right one kept."""

import jax
import jax.numpy as jnp

from kernels_pallas.activations import ACTIVATIONS


def grouped_matmul(x, w, group_sizes, index=None, bias=None, activation=None):
    """[n, k] by [e, k, n] -> [m, n]; rows of no group come out zero. index [m] are the rows of x that are meant."""
    if index is not None:  # by a matrix of 0 and 1, in which an index out of range is a row of zeros
        x = jnp.dot(jax.nn.one_hot(index, x.shape[0]), x.astype(jnp.float32), precision="highest")
    ends = jnp.cumsum(group_sizes)[None]
    row = jnp.arange(x.shape[0])[:, None]
    owned = (row < ends) & (row >= ends - group_sizes[None])  # [m, e]
    x = jnp.where(jnp.any(owned, axis=1, keepdims=True), x, 0)  # rows of no group may hold anything
    every = jnp.einsum("mk,ekn->men", x.astype(jnp.float32), w.astype(jnp.float32), precision="highest")
    if bias is not None:
        every = every + bias.astype(jnp.float32)[None]
    kept = jnp.where(owned[:, :, None], ACTIVATIONS[activation](every), 0)
    return jnp.sum(kept, axis=1).astype(w.dtype)
