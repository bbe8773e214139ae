"""Dispatch by gathers: slots copy the rows of their tokens, tokens sum the rows of their slots, and so backward."""

import jax.numpy as jnp

from jmoe.dispatch.index import by_token
from jmoe.notation import Array, Float, Int
from jmoe.routing.decision import Routing
from kernels_pallas import combine_rows, gather_rows


def dispatch(x: Float[Array, "G S D"], routing: Routing, implementation: str | None = None) -> Float[Array, "G E C D"]:
    """Fills each slot with the row of its token; empty slots are zero."""
    G, S, D = x.shape
    slots, _, choice = slot_index(routing)
    rows = gather_rows(x.reshape(G * S, D), slots, choice, implementation=implementation)
    # Rows lie in the order of experts, as their matrix multiply wants them: a caller that swaps the axes back moves
    # nothing, because XLA cancels the two.
    return rows.reshape(routing.num_experts, G, routing.capacity, D).swapaxes(0, 1)


def combine(y: Float[Array, "G E C D"], routing: Routing, implementation: str | None = None) -> Float[Array, "G S D"]:
    """Sums each token's slots by weight, in float32; a token without a slot is zero."""
    G, _, _, D = y.shape
    slots, weights, choice = slot_index(routing)
    rows = y.swapaxes(0, 1).reshape(-1, D)  # see dispatch
    tokens = combine_rows(rows, slots, weights, choice, implementation=implementation)
    return tokens.reshape(G, routing.group_size, D)


def slot_index(routing: Routing) -> tuple[Int[Array, "N K"], Float[Array, "N K"], Int[Array, " M"]]:
    """The index arrays of `by_token` for slots in the order [E, G, C]."""
    G = routing.token.shape[0]
    E, C = routing.num_experts, routing.capacity
    group = jnp.arange(G)[:, None]
    position = jnp.where(routing.slot < C, (routing.expert * G + group) * C + routing.slot, E * G * C)
    return by_token(position, E * G * C, routing)
