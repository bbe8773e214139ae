"""Dispatch without slots: kept assignments sorted by expert, in as many rows as there are (MegaBlocks, 2211.15841)."""

import dataclasses
import typing

import jax
import jax.numpy as jnp

from jmoe.dispatch.index import by_token
from jmoe.notation import Array, Float, Int
from jmoe.routing.decision import Routing
from kernels_pallas import combine_rows, gather_rows


@typing.no_type_check  # JAX rebuilds it with batched leaves and placeholders; checking those would reject vmap.
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Ragged:
    """Rows for the experts, sorted by expert; no padding between them.

    Attributes:
      rows: [N, D], N = G * A; rows past sum(group_sizes) belong to dropped assignments.
      group_sizes: [E] int32, the rows of each expert.
    """

    rows: Float[Array, "N D"]
    group_sizes: Int[Array, " E"]


def dispatch(x: Float[Array, "G S D"], routing: Routing, implementation: str | None = None) -> Ragged:
    """Copies each kept assignment's token, sorted by expert, then by group and place in the list."""
    G, S, D = x.shape
    key = sort_key(routing)
    slots, _, choice = row_index(routing, key)
    sizes = jnp.sum(key[:, None] == jnp.arange(routing.num_experts)[None], axis=0, dtype=jnp.int32)
    rows = gather_rows(x.reshape(G * S, D), slots, choice, implementation=implementation)
    return Ragged(rows=rows, group_sizes=sizes)


def combine(y: Float[Array, "N D"], routing: Routing, implementation: str | None = None) -> Float[Array, "G S D"]:
    """Sums each token's rows by weight, in float32; a token whose assignments were all dropped is zero."""
    slots, weights, choice = row_index(routing, sort_key(routing))
    G, _ = routing.token.shape
    tokens = combine_rows(y, slots, weights, choice, implementation=implementation)
    return tokens.reshape(G, routing.group_size, y.shape[-1])


def sort_key(routing: Routing) -> Int[Array, " GA"]:
    """The expert of each assignment; E, past the last, for dropped ones."""
    return jnp.where(routing.slot < routing.capacity, routing.expert, routing.num_experts).reshape(-1)


def row_index(
    routing: Routing, key: Int[Array, " GA"]
) -> tuple[Int[Array, "N K"], Float[Array, "N K"], Int[Array, " M"]]:
    """The index arrays of `by_token` for rows sorted by key."""
    order = jnp.argsort(key, stable=True)
    position = jnp.argsort(order)  # the inverse of a permutation
    position = jnp.where(key < routing.num_experts, position, position.size)
    return by_token(position.reshape(routing.token.shape), position.size, routing)
