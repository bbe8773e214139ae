"""What the row ops share: reading rows by index, where an index outside the array reads zeros."""

import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


def take_rows(x: Shaped[Array, "n ..."], index: Int[Array, "..."]) -> Shaped[Array, "..."]:
    """Reads rows of x; an index outside [0, n) reads zeros.

    `jnp.take` alone would wrap a negative index round.
    """
    n = x.shape[0]
    if n == 0:  # from which jnp.take refuses to take
        return jnp.zeros(index.shape + x.shape[1:], x.dtype)
    return jnp.take(x, jnp.where(index < 0, n, index), axis=0, mode="fill", fill_value=0)


def check_index_pair(rows: int, slots: Shaped[Array, "..."], choice: Shaped[Array, "..."], op: str) -> None:
    """Raises ValueError unless slots and choice are integers and slots has one row for each of `rows` tokens."""
    if slots.ndim != 2 or choice.ndim != 1:
        raise ValueError(f"{op} wants slots [n, k] and choice [m]; it got shapes {slots.shape} and {choice.shape}.")
    if slots.shape[0] != rows:
        raise ValueError(f"{op} wants one row of slots for each of the {rows} tokens; slots has shape {slots.shape}.")
    for name, index in (("slots", slots), ("choice", choice)):
        if not jnp.issubdtype(index.dtype, jnp.integer):
            raise ValueError(f"{op} wants integers in {name}; it got {index.dtype}.")
