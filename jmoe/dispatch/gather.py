"""Dispatch by gathers: slots copy the rows of their tokens, tokens sum the rows of their slots, and so backward."""

from collections.abc import Callable

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


def through(
    x: Float[Array, "G S D"],
    routing: Routing,
    experts: Callable[[Float[Array, "N D"], Int[Array, "N K"], Int[Array, " M"]], Float[Array, "M D"]],
    implementation: str | None = None,
) -> Float[Array, "G S D"]:
    """Sends tokens through experts that gather them by themselves, and combines what comes out.

    Args:
      x: [G, S, D] tokens.
      routing: the decision.
      experts: called with all tokens and the two index arrays of `by_token`; returns the outputs of all slots.
      implementation: of the combination.
    """
    G, S, D = x.shape
    slots, weights, choice = slot_index(routing)
    rows = experts(x.reshape(G * S, D), slots, choice)
    return combine_rows(rows, slots, weights, choice, implementation=implementation).reshape(G, S, rows.shape[1])


def slot_index(routing: Routing) -> tuple[Int[Array, "N K"], Float[Array, "N K"], Int[Array, " M"]]:
    """The index arrays of `by_token` for slots in the order [E, G, C]."""
    G = routing.token.shape[0]
    E, C = routing.num_experts, routing.capacity
    group = jnp.arange(G)[:, None]
    position = jnp.where(routing.slot < C, (routing.expert * G + group) * C + routing.slot, E * G * C)
    return by_token(position, E * G * C, routing)
