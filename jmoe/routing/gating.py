"""What a gate says before a router decides: logits, with or without noise, and which tokens are real."""

import dataclasses
import typing

import jax
import jax.numpy as jnp

from jmoe.notation import Array, Bool, Float, PRNGKeyArray
from jmoe.routing.members import interleave_members


@typing.no_type_check  # JAX rebuilds it with batched leaves and placeholders; checking those would reject vmap.
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Gating:
    """Everything that losses and metrics read of a gate.

    In an efficient ensemble of M members each member is gated on its own: then G counts groups times members (the
    members of a group follow each other), S the tokens and E the experts of one member.

    Attributes:
      logits: [G, S, E] float32, without noise.
      noisy_logits: [G, S, E] float32, what was routed on; the same array as logits where there is no noise.
      mask: [G, S], False for padding; None if every token is real.
      sigma: standard deviation of the noise in noisy_logits, 0.0 for none.
      members: M, 1 for no ensemble.
    """

    logits: Float[Array, "G S E"]
    noisy_logits: Float[Array, "G S E"]
    mask: Bool[Array, "G S"] | None = None
    sigma: float = dataclasses.field(default=0.0, metadata={"static": True})
    members: int = dataclasses.field(default=1, metadata={"static": True})

    @property
    def gates(self) -> Float[Array, "G S E"]:
        """Softmax over all experts of what was routed on; not renormalised over the chosen ones (V-MoE, eq. 2)."""
        return jax.nn.softmax(self.noisy_logits, axis=-1)

    @property
    def clean_gates(self) -> Float[Array, "G S E"]:
        """Softmax over all experts of the logits without noise."""
        return jax.nn.softmax(self.logits, axis=-1)

    @property
    def group_gates(self) -> Float[Array, "G S E"]:
        """The gates of whole groups, as routers read them: of all experts, 0 for those of another member.

        In a group of an ensemble the M copies of a token follow each other, and member m has experts m * E / M to
        (m + 1) * E / M (E3, arXiv:2110.03360, section 4).
        """
        if self.members == 1:
            return self.gates
        gates = interleave_members(self.gates, self.members)  # [G, S, E / M]
        G, S, _ = gates.shape
        own = jnp.arange(S)[:, None] % self.members == jnp.arange(self.members)[None]  # [S, M]
        return jnp.where(own[None, :, :, None], gates[:, :, None], 0.0).reshape(G, S, -1)

    @property
    def group_mask(self) -> Bool[Array, "G S"] | None:
        """The mask of whole groups."""
        if self.members == 1 or self.mask is None:
            return self.mask
        return interleave_members(self.mask, self.members)


def add_noise(
    logits: Float[Array, "G S ..."],
    noise: Float[Array, "G S ..."],
    sigma: float,
    mask: Bool[Array, "G S"] | None = None,
    members: int = 1,
) -> Gating:
    """Adds normal noise to the logits (V-MoE, section 2.1).

    Args:
      logits: [G, S, E] float32 ([G, S, E, P] for a soft router).
      noise: standard normal draws of the same shape.
      sigma: standard deviation of what is added; 1 / E as published.
      mask: [G, S], False for padding.
      members: M of an ensemble, see `Gating`.
    """
    return Gating(logits=logits, noisy_logits=logits + sigma * noise, mask=mask, sigma=sigma, members=members)


def gating(
    logits: Float[Array, "G S ..."],
    *,
    sigma: float = 0.0,
    key: PRNGKeyArray | None = None,
    mask: Bool[Array, "G S"] | None = None,
    members: int = 1,
) -> Gating:
    """Draws the noise of `add_noise` from key; without a key or with sigma 0 there is none."""
    if key is None or sigma == 0:
        return Gating(logits=logits, noisy_logits=logits, mask=mask, members=members)
    return add_noise(logits, jax.random.normal(key, logits.shape, jnp.float32), sigma, mask, members)


def check_noise(noise_std: float, owner: str) -> None:
    """Raises ValueError if noise cannot have this standard deviation."""
    if not noise_std >= 0:
        raise ValueError(f"{owner} wants a noise_std of at least 0; it got {noise_std}.")
