"""What a router did, in numbers: where tokens went, which were dropped, how sure the gate was."""

import jax
import jax.numpy as jnp

from jmoe.notation import Array, Bool, Float, Int
from jmoe.routing.decision import Decision, Mixing, Routing
from jmoe.routing.gating import Gating
from jmoe.routing.losses import masked_mean, mean_over_groups, squared_variation


def assignments_of(routing: Routing, mask: Bool[Array, "G S"] | None = None) -> Bool[Array, "G A"]:
    """Which assignments are of real tokens: all but those of padding."""
    if mask is None:
        return jnp.ones(routing.token.shape, bool)
    return jnp.take_along_axis(mask, routing.token, axis=1)


def kept_per_token(routing: Routing) -> Int[Array, "G S"]:
    """The number of slots that each token got."""
    kept = (routing.slot < routing.capacity).astype(jnp.int32)
    if routing.choices is not None:
        return jnp.sum(kept.reshape(-1, routing.group_size, routing.choices), axis=-1)
    empty = jnp.zeros((kept.shape[0], routing.group_size), jnp.int32)
    return jax.vmap(lambda counts, token, ones: counts.at[token].add(ones))(empty, routing.token, kept)


def dropped_tokens(routing: Routing, mask: Bool[Array, "G S"] | None = None) -> Float[Array, ""]:
    """Share, from 0 to 1, of the real tokens that got no slot at all."""
    return _share(kept_per_token(routing) == 0, mask)


def dropped_assignments(routing: Routing, mask: Bool[Array, "G S"] | None = None) -> Float[Array, ""]:
    """Share, from 0 to 1, of the choices of real tokens that got no slot; 0 where experts choose."""
    return _share(routing.slot >= routing.capacity, assignments_of(routing, mask))


def expert_load(decision: Decision, mask: Bool[Array, "G S"] | None = None) -> Float[Array, " E"]:
    """Share of the choices of real tokens that wanted each expert, dropped ones included; sums to 1.

    For a Mixing, the share of the combine weight.
    """
    if isinstance(decision, Mixing):
        load = jnp.sum(decision.combine, axis=(0, 1, 3))  # padding has no weight
    else:
        counts = jax.nn.one_hot(decision.expert, decision.num_experts, dtype=jnp.float32)
        load = jnp.sum(counts * assignments_of(decision, mask)[..., None], axis=(0, 1))
    return load / jnp.maximum(jnp.sum(load), jnp.finfo(jnp.float32).tiny)


def gate_entropy(gates: Float[Array, "G S E"], mask: Bool[Array, "G S"] | None = None) -> Float[Array, ""]:
    """Mean entropy of a token's gates, in nats; log(E) for a gate that knows nothing."""
    return mean_over_groups(masked_mean(jnp.sum(jax.scipy.special.entr(gates), axis=-1), mask), mask)


def gate_confidence(gates: Float[Array, "G S E"], mask: Bool[Array, "G S"] | None = None) -> Float[Array, ""]:
    """Mean of a token's largest gate."""
    return mean_over_groups(masked_mean(jnp.max(gates, axis=-1), mask), mask)


def similarity(vectors: Float[Array, "G N D"]) -> dict[str, Float[Array, ""]]:
    """How alike the N vectors of each group are: cosine similarities of all pairs, over all groups.

    For a Mixing these are its tokens (rows of combine weights, [G, S, E * C]) or slots (columns of dispatch weights,
    [G, E * C, S]); for a gate its columns ([1, N, D]). Slots that become alike are a known failure of soft routers.

    Returns:
      "mean", "max" and "min" over pairs of different vectors. As published, the maximum is at least 0, and the mean
      takes each vector's similarity with itself for exactly 1.
    """
    G, N, _ = vectors.shape
    unit = vectors * jax.lax.rsqrt(jnp.sum(jnp.square(vectors), axis=-1, keepdims=True) + 1e-9)
    cosine = jnp.einsum("GND,GMD->GNM", unit, unit, precision="highest")
    same = jnp.eye(N, dtype=bool)[None]
    largest = jnp.max(jnp.where(same, 0.0, cosine))
    return {
        "mean": (jnp.sum(cosine) - G * N) / max(G * N * (N - 1), 1),
        "max": largest,
        "min": jnp.min(jnp.where(same, largest, cosine)),
    }


def routing_metrics(gating: Gating, decision: Decision) -> dict[str, Array]:
    """The metrics of one layer: scalars, and "expert_load" [E].

    For a Mixing, nothing is dropped, and entropy and confidence are those of a token's weights over all slots.
    """
    mask = gating.group_mask
    load = expert_load(decision, mask)
    if isinstance(decision, Mixing):
        gates = decision.combine.reshape(*decision.combine.shape[:2], -1)
        nothing = jnp.zeros((), jnp.float32)
        dropped = {"dropped_tokens": nothing, "dropped_assignments": nothing}
    else:
        gates = gating.gates
        dropped = {
            "dropped_tokens": dropped_tokens(decision, mask),
            "dropped_assignments": dropped_assignments(decision, mask),
        }
    metrics = dropped | {
        "expert_load": load,
        "load_variation": jnp.sqrt(squared_variation(load)),
        "entropy": gate_entropy(gates, gating.mask),
        "confidence": gate_confidence(gates, gating.mask),
    }
    return jax.lax.stop_gradient(metrics)


def _share(happened: Bool[Array, "G A"], counted: Bool[Array, "G A"] | None) -> Float[Array, ""]:
    """The share of counted entries in which it happened."""
    if counted is None:
        return jnp.mean(happened, dtype=jnp.float32)
    return jnp.sum(happened & counted).astype(jnp.float32) / jnp.maximum(jnp.sum(counted), 1)
