"""What the ops on rows ask of their index arrays, and read from them."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Shaped


def check_index_pair(rows: int, slots: Shaped[Array, "..."], choice: Shaped[Array, "..."], op: str) -> None:
    """Raises ValueError unless slots and choice are integers and slots has one row for each of `rows` tokens."""
    if slots.ndim != 2 or choice.ndim != 1:
        raise ValueError(f"{op} wants slots [n, k] and choice [m]; it got shapes {slots.shape} and {choice.shape}.")
    if slots.shape[0] != rows:
        raise ValueError(f"{op} wants one row of slots for each of the {rows} tokens; slots has shape {slots.shape}.")
    for name, index in (("slots", slots), ("choice", choice)):
        if not jnp.issubdtype(index.dtype, jnp.integer):
            raise ValueError(f"{op} wants integers in {name}; it got {index.dtype}.")


def rows_of(slots: Int[Array, "n k"], choice: Int[Array, " m"]) -> Int[Array, " m"]:
    """The token in each slot. Division rounds towards minus infinity, so that what is out of range stays so."""
    return choice // slots.shape[1]


def no_gradients(*integers: Shaped[Array, "..."]) -> tuple[np.ndarray, ...]:
    """What a backward pass returns for arrays of integers."""
    return tuple(np.zeros(array.shape, jax.dtypes.float0) for array in integers)
