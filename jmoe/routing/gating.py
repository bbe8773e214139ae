"""What a gate says before a router decides: logits, with or without noise, and which tokens are real."""

import dataclasses
import typing

import jax
import jax.numpy as jnp

from jmoe.notation import Array, Bool, Float, PRNGKeyArray


@typing.no_type_check  # JAX rebuilds it with batched leaves and placeholders; checking those would reject vmap.
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Gating:
    """Everything that losses and metrics read of a gate.

    Attributes:
      logits: [G, S, E] float32, without noise.
      noisy_logits: [G, S, E] float32, what was routed on; the same array as logits where there is no noise.
      mask: [G, S], False for padding; None if every token is real.
      sigma: standard deviation of the noise in noisy_logits, 0.0 for none.
    """

    logits: Float[Array, "G S E"]
    noisy_logits: Float[Array, "G S E"]
    mask: Bool[Array, "G S"] | None = None
    sigma: float = dataclasses.field(default=0.0, metadata={"static": True})

    @property
    def gates(self) -> Float[Array, "G S E"]:
        """Softmax over all experts of what was routed on; not renormalised over the chosen ones (V-MoE, eq. 2)."""
        return jax.nn.softmax(self.noisy_logits, axis=-1)

    @property
    def clean_gates(self) -> Float[Array, "G S E"]:
        """Softmax over all experts of the logits without noise."""
        return jax.nn.softmax(self.logits, axis=-1)


def add_noise(
    logits: Float[Array, "G S ..."],
    noise: Float[Array, "G S ..."],
    sigma: float,
    mask: Bool[Array, "G S"] | None = None,
) -> Gating:
    """Adds normal noise to the logits (V-MoE, section 2.1).

    Args:
      logits: [G, S, E] float32 ([G, S, E, P] for a soft router).
      noise: standard normal draws of the same shape.
      sigma: standard deviation of what is added; 1 / E as published.
      mask: [G, S], False for padding.
    """
    return Gating(logits=logits, noisy_logits=logits + sigma * noise, mask=mask, sigma=sigma)


def gating(
    logits: Float[Array, "G S ..."],
    *,
    sigma: float = 0.0,
    key: PRNGKeyArray | None = None,
    mask: Bool[Array, "G S"] | None = None,
) -> Gating:
    """Draws the noise of `add_noise` from key; without a key or with sigma 0 there is none."""
    if key is None or sigma == 0:
        return Gating(logits=logits, noisy_logits=logits, mask=mask)
    return add_noise(logits, jax.random.normal(key, logits.shape, jnp.float32), sigma, mask)
