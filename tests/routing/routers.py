"""The table of routers that every contract test runs over, and what those tests do with one.

A new router is one line in ROUTERS.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies

from jmoe.dispatch import einsum
from jmoe.routing import (
    Decision,
    EntropicPlan,
    ExpertChoice,
    Gating,
    QuadraticPlan,
    Routing,
    Soft,
    Switch,
    TopK,
    Transport,
    decide,
    routing_metrics,
)

ROUTERS = (
    TopK(),  # as published
    TopK(k=1, capacity_factor=0.5, multiple=1),
    TopK(k=2, capacity_factor=0.5, multiple=1, batch_priority=True),
    TopK(k=3, capacity_factor=None, capacity=3, batch_priority=True, priority="sum"),
    TopK(k=5, capacity_factor=None, capacity=1),  # K = E of the tests, C = 1
    TopK(k=2, capacity_factor=None),  # dropless
    TopK(k=2, capacity_factor=0.5, multiple=1, batch_priority=True, renormalize=True),
    Switch(),
    Switch(capacity_factor=0.5, batch_priority=True),
    ExpertChoice(),
    ExpertChoice(capacity_factor=1.0, rounding="nearest"),
    ExpertChoice(capacity_factor=3.0, renormalize=True),
    Soft(slots_per_expert=3),
    Transport(),
    Transport(choice=TopK(k=1, capacity_factor=0.5, multiple=1), plan=EntropicPlan(), weights="clean_gates"),
    Transport(choice=TopK(k=2, capacity_factor=None), plan=EntropicPlan(solver="newton"), weights="plan"),
    Transport(choice=ExpertChoice(capacity_factor=1.0)),
    Transport(choice=ExpertChoice(renormalize=True), plan=QuadraticPlan(sparse=False)),
)
ONE_HOT = tuple(router for router in ROUTERS if not isinstance(router, Soft))  # those that return a Routing

G, S, E, D = 2, 11, 5, 3  # of the contract tests; one shape each, so that each router is compiled once
seeds = strategies.integers(0, 2**31 - 1)


def name(router) -> str:
    """The router with those options that are not the default, as the name of a test."""
    default = type(router)()
    options = {field.name: getattr(router, field.name) for field in dataclasses.fields(router)}
    changed = [
        f"{option}={name(value) if dataclasses.is_dataclass(value) else repr(value)}"
        for option, value in options.items()
        if value != getattr(default, option)
    ]
    return f"{type(router).__name__}({', '.join(changed)})"


QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # for LLVM; XLA's are the same


def compiled(function):
    """Compiles for each first argument, and fetches what comes out as NumPy arrays: comparing them compiles nothing."""
    jitted = jax.jit(function, static_argnums=0, compiler_options=QUICK)
    return functools.wraps(function)(lambda *arguments: jax.device_get(jitted(*arguments)))


class Result(NamedTuple):
    """What a layer made of one router would return, with experts that multiply by fixed matrices."""

    y: np.ndarray
    decision: Decision
    losses: dict[str, np.ndarray]
    metrics: dict[str, np.ndarray]
    gradients: tuple[np.ndarray, np.ndarray]  # of a sum of all that is above, with respect to logits and tokens


def logits_shape(router, groups: int = G, tokens: int = S, experts: int = E) -> tuple[int, ...]:
    """[G, S, E], and for a soft router [G, S, E, P]."""
    slots = (router.slots_per_expert,) if isinstance(router, Soft) else ()
    return (groups, tokens, experts, *slots)


def random_logits(router, seed: int, **sizes: int) -> np.ndarray:
    """Normal logits, wide enough for sure and unsure tokens."""
    return np.random.default_rng(seed).normal(size=logits_shape(router, **sizes), scale=1.5).astype(np.float32)


def random_tokens(seed: int, *shape: int) -> np.ndarray:
    """Normal values of any shape."""
    return np.random.default_rng(seed + 1).normal(size=shape).astype(np.float32)


def gate(router, logits, mask=None) -> Gating:
    """What a gate would say, with a fixed stand-in for the noise, which depends on the token alone."""
    sigma = router.noise_std / logits.shape[2]
    return Gating(logits=logits, noisy_logits=logits + sigma * jnp.sin(37 * logits), mask=mask, sigma=sigma)


@compiled
def route(router, logits, mask=None) -> Decision:
    """The decision alone."""
    return decide(router, gate(router, logits, mask))


@compiled
def layer(router, logits, tokens, mask) -> Result:
    """Routes, lets expert e multiply by a matrix of its own, brings the result back, and differentiates."""
    experts = jnp.cos(jnp.arange(E * D * D, dtype=jnp.float32)).reshape(E, D, D)

    def total(logits, tokens):
        gating = gate(router, logits, mask)
        decision = decide(router, gating)
        slots = jnp.einsum("GECD,EDF->GECF", einsum.dispatch(tokens, decision), experts, precision="highest")
        y = einsum.combine(slots, decision)
        losses = {loss.name: loss(gating, decision) for loss in router.losses}
        return jnp.sum(jnp.sin(y)) + sum(losses.values()), (y, decision, losses, routing_metrics(gating, decision))

    gradients, values = jax.grad(total, argnums=(0, 1), has_aux=True)(logits, tokens)
    return Result(*values, gradients)


def weights_of(routing: Routing) -> dict[tuple[int, int, int, int], float]:
    """The weight of every assignment that is not dropped, by (group, expert, slot, token)."""
    group = np.broadcast_to(np.arange(routing.token.shape[0])[:, None], routing.token.shape)
    kept = np.asarray(routing.slot) < routing.capacity
    *place, weight = (
        np.asarray(a)[kept].tolist() for a in (group, routing.expert, routing.slot, routing.token, routing.weight)
    )
    return dict(zip(zip(*place, strict=True), weight, strict=True))


def kept_places(routing: Routing) -> list[tuple[int, int, int, int]]:
    """(group, expert, slot, token) of every assignment that is not dropped, sorted."""
    return sorted(weights_of(routing))
