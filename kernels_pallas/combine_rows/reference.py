"""The definition of combine_rows: a loop over the k slots of every token."""

import jax
import jax.numpy as jnp


def combine_rows(y, slots, weights, choice):
    """[m, d] -> [n, d]; out[t] = sum_j weights[t, j] * y[slots[t, j]], by one-hot matrices."""
    del choice  # only the gradient of the fast forms needs it
    m = y.shape[0]
    out = jnp.zeros((slots.shape[0], y.shape[1]), jnp.float32)
    for j in range(slots.shape[1]):
        one_hot = jax.nn.one_hot(slots[:, j], m, dtype=jnp.float32)  # an index outside [0, m) gives a row of zeros
        out += weights[:, j, None] * jnp.dot(one_hot, y.astype(jnp.float32), precision="highest")
    return out.astype(y.dtype)
