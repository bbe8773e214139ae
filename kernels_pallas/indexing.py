"""What the ops on rows ask of their index arrays."""

import jax.numpy as jnp
from jaxtyping import Array, Shaped


def check_index_pair(rows: int, slots: Shaped[Array, "..."], choice: Shaped[Array, "..."], op: str) -> None:
    """Raises ValueError unless slots and choice are integers and slots has one row for each of `rows` tokens."""
    if slots.ndim != 2 or choice.ndim != 1:
        raise ValueError(f"{op} wants slots [n, k] and choice [m]; it got shapes {slots.shape} and {choice.shape}.")
    if slots.shape[0] != rows:
        raise ValueError(f"{op} wants one row of slots for each of the {rows} tokens; slots has shape {slots.shape}.")
    for name, index in (("slots", slots), ("choice", choice)):
        if not jnp.issubdtype(index.dtype, jnp.integer):
            raise ValueError(f"{op} wants integers in {name}; it got {index.dtype}.")
