"""Dispatch by one-hot masks: the definition, and the oracle of every test. Its cost grows with S * E * C * D."""

import jax
import jax.numpy as jnp

from jmoe.notation import Array, Float
from jmoe.routing.decision import Decision, Mixing, Routing


def dispatch(x: Float[Array, "G S D"], decision: Decision) -> Float[Array, "G E C D"]:
    """Fills slots by multiplying tokens with the mask of who goes where, accumulated in float32."""
    weights = decision.dispatch if isinstance(decision, Mixing) else masks(decision)[0]
    return jnp.einsum("GSEC,GSD->GECD", weights, x.astype(jnp.float32)).astype(x.dtype)


def combine(y: Float[Array, "G E C D"], decision: Decision) -> Float[Array, "G S D"]:
    """Sums slots into tokens by combine weight, accumulated in float32."""
    weights = decision.combine if isinstance(decision, Mixing) else masks(decision)[1]
    return jnp.einsum("GSEC,GECD->GSD", weights, y.astype(jnp.float32)).astype(y.dtype)


def masks(routing: Routing) -> tuple[Float[Array, "G S E C"], Float[Array, "G S E C"]]:
    """The same decision as 0/1 dispatch weights and as combine weights."""
    G, S = routing.token.shape[0], routing.group_size
    E, C, K = routing.num_experts, routing.capacity, routing.choices
    expert = jax.nn.one_hot(routing.expert, E, dtype=jnp.float32)  # [G, A, E]
    slot = jax.nn.one_hot(routing.slot, C, dtype=jnp.float32)  # [G, A, C]; a slot past the end is a row of zeros
    weighted = slot * routing.weight[..., None]
    if K is not None:  # the tokens are known without a mask of their own
        expert = expert.reshape(G, S, K, E)
        fill = [
            jnp.einsum("GSKE,GSKC->GSEC", expert, s.reshape(G, S, K, C), precision="highest") for s in (slot, weighted)
        ]
    else:
        token = jax.nn.one_hot(routing.token, S, dtype=jnp.float32)  # [G, A, S]
        fill = [jnp.einsum("GAS,GAE,GAC->GSEC", token, expert, s, precision="highest") for s in (slot, weighted)]
    return fill[0], fill[1]
