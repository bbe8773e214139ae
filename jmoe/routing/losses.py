"""Auxiliary losses of routers: functions of what the gate said and what the router decided.

Each formula is a function of arrays that returns one value per group, [G]; beside it stands a frozen dataclass with
its weight and scope, which is what a config holds. A group of padding alone has loss 0.
"""

import dataclasses
from typing import Literal, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp

from jmoe.notation import Array, Bool, Float, Float32, Int
from jmoe.routing.decision import Decision, Routing
from jmoe.routing.gating import Gating

Scope = Literal["group", "global"]


@runtime_checkable
class Loss(Protocol):
    """What a config may hold as a loss: any frozen dataclass with these two."""

    @property
    def name(self) -> str:
        """The name it is reported under."""
        ...

    def __call__(self, gating: Gating, decision: Decision) -> Float32[Array, ""]:
        """The weighted loss of one layer."""
        ...


def squared_variation(values: Float[Array, "... E"]) -> Float[Array, "..."]:
    """Squared coefficient of variation over the last axis, var / mean^2; 0 where all values are 0.

    Written without the square root of std: its gradient is finite also where all values are equal.
    """
    mean = jnp.mean(values, axis=-1)
    variance = jnp.mean(jnp.square(values - mean[..., None]), axis=-1)
    return variance / jnp.where(mean == 0, 1.0, jnp.square(mean))


def masked_mean(values: Float[Array, "G S ..."], mask: Bool[Array, "G S"] | None) -> Float[Array, "G ..."]:
    """Mean over the real tokens of each group; 0 for a group without any."""
    if mask is None:
        return jnp.mean(values, axis=1)
    mask = mask.reshape(mask.shape + (1,) * (values.ndim - 2))
    total = jnp.sum(jnp.where(mask, values, 0.0), axis=1)
    return total / jnp.maximum(jnp.sum(mask, axis=1), 1)


def importance_loss(clean_gates: Float[Array, "G S E"], mask: Bool[Array, "G S"] | None = None) -> Float[Array, " G"]:
    """Squared variation over experts of the sum of clean gates (V-MoE, appendix A.2, from Shazeer et al. 2017)."""
    return squared_variation(masked_mean(clean_gates, mask))  # mean and sum vary alike


def load_loss(
    logits: Float[Array, "G S E"],
    noisy_logits: Float[Array, "G S E"],
    k: int,
    sigma: float,
    mask: Bool[Array, "G S"] | None = None,
) -> Float[Array, " G"]:
    """Squared variation over experts of the probability of being chosen if the noise were drawn again.

    With T the K-th largest noisy logit of a token, p_e = 1 - Phi((T - logit_e) / sigma); the same threshold serves
    chosen and other experts (V-MoE, appendix A.2, without Shazeer's exclusion of the expert itself). Gradient flows
    through the logits and through T.

    Args:
      logits: [G, S, E] without noise.
      noisy_logits: [G, S, E] as routed on.
      k: K.
      sigma: standard deviation of the noise, above 0.
      mask: [G, S], False for padding.
    """
    _, index = jax.lax.top_k(jax.lax.stop_gradient(noisy_logits), k)
    kth = jax.nn.one_hot(index[..., -1], logits.shape[-1], dtype=logits.dtype)  # [G, S, E]; see TopK on one-hot
    threshold = jnp.sum(kth * noisy_logits, axis=-1, keepdims=True)
    probability = 1.0 - jax.scipy.stats.norm.cdf((threshold - logits) / sigma)
    return squared_variation(masked_mean(probability, mask))


def balance_loss(
    gates: Float[Array, "G S E"], expert: Int[Array, "G S K"], mask: Bool[Array, "G S"] | None = None
) -> Float[Array, " G"]:
    """E * sum_e f_e P_e, 1 for a uniform load: the loss of GShard (2006.16668) and Switch (2101.03961, eq. 4).

    Args:
      gates: [G, S, E] as routed on; P is their mean.
      expert: [G, S, K] the choices that count in f, the fraction of choices of each expert (without gradient); the
        first choice alone as published.
      mask: [G, S], False for padding.
    """
    E = gates.shape[-1]
    chosen = jnp.mean(jax.nn.one_hot(expert, E, dtype=gates.dtype), axis=2)  # [G, S, E]
    return E * jnp.sum(masked_mean(chosen, mask) * masked_mean(gates, mask), axis=-1)


def z_loss(logits: Float[Array, "G S E"], mask: Bool[Array, "G S"] | None = None) -> Float[Array, " G"]:
    """Mean squared log-sum-exp of the logits, which keeps them small (ST-MoE, arXiv:2202.08906, eq. 5)."""
    return masked_mean(jnp.square(jax.nn.logsumexp(logits, axis=-1)), mask)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Importance:
    """`importance_loss`, by weight.

    Attributes:
      weight: 0.005 as published (half of lambda = 0.01).
      scope: statistics of each group, averaged over groups, as published; or of all tokens together.
    """

    weight: float = 0.005
    scope: Scope = "group"
    name = "importance"

    def __post_init__(self):
        check_scope(self.scope)

    def __call__(self, gating: Gating, decision: Decision) -> Float32[Array, ""]:
        """The weighted loss, a scalar."""
        del decision
        gating = in_scope(gating, self.scope)
        return self.weight * mean_over_groups(importance_loss(gating.clean_gates, gating.mask), gating.mask)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """`load_loss`, by weight; 0 where no noise was drawn, as the probability is not defined then.

    Attributes:
      weight: 0.005 as published (half of lambda = 0.01).
      scope: statistics of each group, averaged over groups, as published; or of all tokens together.
    """

    weight: float = 0.005
    scope: Scope = "group"
    name = "load"

    def __post_init__(self):
        check_scope(self.scope)

    def __call__(self, gating: Gating, decision: Decision) -> Float32[Array, ""]:
        """The weighted loss, a scalar; wants a decision in which tokens choose."""
        if gating.sigma == 0:
            return jnp.zeros((), jnp.float32)
        if not isinstance(decision, Routing) or decision.choices is None:
            raise ValueError("The load loss is defined for routers in which every token chooses K experts.")
        gating = in_scope(gating, self.scope)
        loss = load_loss(gating.logits, gating.noisy_logits, decision.choices, gating.sigma, gating.mask)
        return self.weight * mean_over_groups(loss, gating.mask)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Balance:
    """`balance_loss`, by weight.

    Attributes:
      weight: 0.01 as published for Switch.
      scope: statistics of each group, averaged over groups; or of all tokens together (arXiv:2501.11873).
      choices: whether f counts every token's first choice, as published, or all K.
    """

    weight: float = 0.01
    scope: Scope = "group"
    choices: Literal["first", "all"] = "first"
    name = "balance"

    def __post_init__(self):
        check_scope(self.scope)
        if self.choices not in ("first", "all"):
            raise ValueError(f"Balance wants choices 'first' or 'all'; it got {self.choices!r}.")

    def __call__(self, gating: Gating, decision: Decision) -> Float32[Array, ""]:
        """The weighted loss, a scalar."""
        k = 1
        if self.choices == "all":
            if not isinstance(decision, Routing) or decision.choices is None:
                raise ValueError("Balance(choices='all') is defined for routers in which tokens choose.")
            k = decision.choices
        gating = in_scope(gating, self.scope)
        gates = gating.gates
        _, expert = jax.lax.top_k(jax.lax.stop_gradient(gates), k)
        return self.weight * mean_over_groups(balance_loss(gates, expert, gating.mask), gating.mask)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZLoss:
    """`z_loss` of the logits without noise, by weight.

    Attributes:
      weight: 1e-3 as published.
      scope: mean over the tokens of each group, then over groups; or over all tokens together.
    """

    weight: float = 1e-3
    scope: Scope = "group"
    name = "z"

    def __post_init__(self):
        check_scope(self.scope)

    def __call__(self, gating: Gating, decision: Decision) -> Float32[Array, ""]:
        """The weighted loss, a scalar."""
        del decision
        gating = in_scope(gating, self.scope)
        return self.weight * mean_over_groups(z_loss(gating.logits, gating.mask), gating.mask)


def check_scope(scope: str) -> None:
    """Raises ValueError for a scope that does not exist."""
    if scope not in get_args(Scope):
        raise ValueError(f"A loss has the scope 'group' or 'global'; it got {scope!r}.")


def in_scope(gating: Gating, scope: Scope) -> Gating:
    """The same gating, as one group of all tokens (of a member, in an ensemble) where the scope is global.

    Raises:
      ValueError: the gating is of a soft router, for which none of these losses is defined.
    """
    if gating.logits.ndim != 3:
        raise ValueError("A soft router has a logit per slot; importance, balance and z losses want one per expert.")
    if scope == "group":
        return gating
    M = gating.members

    def together(a: Array) -> Array:
        return a.reshape(-1, M, *a.shape[1:]).swapaxes(0, 1).reshape(M, -1, *a.shape[2:])

    return jax.tree.map(together, gating)


def mean_over_groups(values: Float[Array, " G"], mask: Bool[Array, "G S"] | None) -> Float32[Array, ""]:
    """Mean over the groups that hold a real token."""
    if mask is None:
        return jnp.mean(values)
    real = jnp.any(mask, axis=1)
    return jnp.sum(jnp.where(real, values, 0.0)) / jnp.maximum(jnp.sum(real), 1)
