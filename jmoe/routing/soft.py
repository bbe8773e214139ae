"""Soft mixing of tokens (Soft MoE, Puigcerver et al. 2023, arXiv:2308.00951, section 2.1)."""

import dataclasses

import jax
import jax.numpy as jnp

from jmoe.notation import Array, Bool, Float
from jmoe.routing.decision import Mixing
from jmoe.routing.gating import check_noise
from jmoe.routing.losses import Loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Soft:
    """Every slot processes a weighted mean of the group's tokens; nothing is dropped and nothing is discrete.

    Its gate has one column per slot, not per expert, and its groups are single images as published
    (`MoEConfig(images_per_group=1)`).

    Attributes:
      slots_per_expert: slots of each expert per group; num_experts * slots_per_expert = S costs as much as a
        dense MLP.
      noise_std: standard deviation of the noise on the logits in training (not divided by E); none as published.
    """

    slots_per_expert: int = 1
    noise_std: float = 0.0
    takes = "logits"

    def __post_init__(self):
        if self.slots_per_expert < 1:
            raise ValueError(f"Soft wants slots_per_expert of at least 1; it got {self.slots_per_expert}.")
        check_noise(self.noise_std, "Soft")

    @property
    def losses(self) -> tuple[Loss, ...]:
        """None are needed."""
        return ()

    @property
    def batch_invariant(self) -> bool:
        """Whether the result of a token is independent of the rest of its group."""
        return False

    def __call__(self, logits: Float[Array, "G S E P"], *, mask: Bool[Array, "G S"] | None = None) -> Mixing:
        """Mixes groups of tokens.

        Args:
          logits: [G, S, E, P] float32, of every token for each of the P slots of every expert.
          mask: [G, S], False for padding, which has no weight in any slot.

        Returns:
          a Mixing: dispatch is a softmax over tokens, combine a softmax over all slots of all experts.
        """
        G, S, E, P = logits.shape
        if mask is not None:
            mask = mask[..., None, None]  # a group of padding alone has no weights at all, hence `where` and not -inf
        dispatch = jax.nn.softmax(logits, axis=1, where=mask)
        combine = jax.nn.softmax(logits.reshape(G, S, E * P), axis=-1).reshape(G, S, E, P)
        if mask is not None:
            dispatch, combine = jnp.where(mask, dispatch, 0.0), jnp.where(mask, combine, 0.0)
        return Mixing(dispatch=dispatch, combine=combine)
