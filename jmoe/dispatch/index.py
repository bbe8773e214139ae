"""From a list of assignments to the pair of index arrays that the row ops read, without moving any row."""

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.notation import Array, Float, Int
from jmoe.routing.decision import Routing


def by_token(
    position: Int[Array, "G A"], num_positions: int, routing: Routing
) -> tuple[Int[Array, "N K"], Float[Array, "N K"], Int[Array, " M"]]:
    """Arranges assignments by token.

    Args:
      position: [G, A] where in an array of num_positions rows each assignment stands; num_positions if nowhere.
      num_positions: M.
      routing: the decision; N = G * S tokens.

    Returns:
      slots [N, K]: the positions of each token's assignments, M for none; K is the most that a token can have.
      weights [N, K]: their combine weights.
      choice [M]: the inverse, for each position the flat index in slots that names it, N * K for none.
    """
    weight = routing.weight
    if routing.choices is None:
        listed = assignments_by_token(routing)  # [N, K], into the flat list of assignments
        weight = reorder(weight.reshape(-1), listed)
        position = jnp.take(position.reshape(-1), listed, mode="fill", fill_value=num_positions)
        K = listed.shape[1]
    else:
        K = routing.choices
    slots, weights = position.reshape(-1, K), weight.reshape(-1, K)
    return slots, weights, invert(slots, num_positions)


def assignments_by_token(routing: Routing) -> Int[Array, "N K"]:
    """For each token the flat indices of its assignments, G * A where it has fewer than K = min(E, A)."""
    G, A = routing.token.shape
    S, K = routing.group_size, min(routing.num_experts, A)
    token = (routing.token + S * jnp.arange(G)[:, None]).reshape(-1)
    order = jnp.argsort(token, stable=True)  # assignments sorted by token
    owner = token[order]
    rank = jnp.searchsorted(owner, jnp.arange(G * S))[:, None] + jnp.arange(K)[None]  # [N, K]
    mine = jnp.take(owner, rank, mode="fill", fill_value=G * S) == jnp.arange(G * S)[:, None]
    return jnp.where(mine, jnp.take(order, rank, mode="clip"), G * A)


def invert(index: Int[Array, "..."], size: int) -> Int[Array, " size"]:
    """For each of `size` positions the flat place in `index` that names it; index.size where none does."""
    # A scatter, but of integers and without collisions; rows are only ever gathered.
    places = jnp.arange(index.size, dtype=index.dtype)
    return jnp.full((size,), index.size, index.dtype).at[index.reshape(-1)].set(places, mode="drop")


@jax.custom_vjp
def reorder(values: Float[Array, " A"], index: Int[Array, "N K"]) -> Float[Array, "N K"]:
    """values[index], 0 past the end; no value is named twice, so that the gradient is a gather, too."""
    return jnp.take(values, index, mode="fill", fill_value=0)


def _reorder_forward(values, index):
    return reorder(values, index), (index, jnp.zeros((values.shape[0], 0)))


def _reorder_backward(residuals, gradient):
    index, like = residuals
    back = invert(index, like.shape[0])
    values = jnp.take(gradient.reshape(-1), back, mode="fill", fill_value=0)
    return values, np.zeros(index.shape, jax.dtypes.float0)


reorder.defvjp(_reorder_forward, _reorder_backward)
