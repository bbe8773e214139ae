"""Expert-choice routing (Zhou et al. 2022, arXiv:2202.09368, section 3.2)."""

import dataclasses

import jax
import jax.numpy as jnp

from jmoe.notation import Array, Bool, Float
from jmoe.routing.capacity import Rounding, check_capacity_options, expert_capacity
from jmoe.routing.decision import Routing
from jmoe.routing.gating import check_noise
from jmoe.routing.losses import Loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertChoice:
    """Each expert takes the C tokens of the group it gates highest; a token may get many experts or none.

    The load is balanced by construction, so there is no auxiliary loss. The softmax is over experts, not tokens.

    Attributes:
      capacity_factor: mean number of experts per token; C = S * capacity_factor / E, rounded. 2.0 as published.
      rounding: "up", or "nearest" as in the Soft MoE paper's comparison.
      multiple: C is then rounded up to a multiple of this.
      noise_std: standard deviation of the noise on the logits in training, in units of 1 / E.
      renormalize: whether the weights of a token are divided by their sum over the experts that took it, so that
        identical experts compute what one of them does for every token that is taken (Sparse Upcycling,
        arXiv:2212.05055, for vision). The published V-MoE router does not. A token that one expert took has weight 1,
        and no gradient of the task reaches the gate through it.
    """

    capacity_factor: float = 2.0
    rounding: Rounding = "up"
    multiple: int = 1
    noise_std: float = 1.0
    renormalize: bool = False

    def __post_init__(self):
        check_capacity_options(self.capacity_factor, None, self.rounding, self.multiple, "ExpertChoice")
        check_noise(self.noise_std, "ExpertChoice")

    @property
    def losses(self) -> tuple[Loss, ...]:
        """None are needed."""
        return ()

    @property
    def batch_invariant(self) -> bool:
        """Whether the result of a token is independent of the rest of its group."""
        return False

    def __call__(
        self,
        gates: Float[Array, "G S E"],
        *,
        mask: Bool[Array, "G S"] | None = None,
        weights: Float[Array, "G S E"] | None = None,
    ) -> Routing:
        """Routes groups of tokens.

        Args:
          gates: [G, S, E] float32, softmax over experts.
          mask: [G, S], False for padding, which no expert takes; experts that want more tokens than are real leave
            slots empty.
          weights: [G, S, E] where the combine weights are read, if the gates are to choose and nothing else.

        Returns:
          a Routing with A = E * C, nothing dropped but padding; the weights are the gates, renormalised or not.

        Raises:
          ValueError: an expert would take no token, or more than the group has.
        """
        G, S, E = gates.shape
        C = expert_capacity(S, E, self.capacity_factor, self.rounding, self.multiple)
        if C > S:
            raise ValueError(
                f"ExpertChoice gives each expert {C} of a group's {S} tokens (capacity_factor={self.capacity_factor}, "
                f"{E} experts, multiple={self.multiple}). Choose capacity_factor <= {E}, the number of experts, "
                "or larger groups."
            )
        wanted = gates if mask is None else jnp.where(mask[..., None], gates, -1.0)  # padding comes last
        gate, token = jax.lax.top_k(wanted.swapaxes(1, 2), C)  # [G, E, C]; equal gates: the earlier token first
        weight = gate if weights is None else jnp.take_along_axis(weights.swapaxes(1, 2), token, axis=2)
        slot = jnp.broadcast_to(jnp.arange(C), (G, E, C))
        if mask is not None:
            real = gate >= 0
            slot, weight = jnp.where(real, slot, C), jnp.where(real, weight, 0.0)
        expert = jnp.broadcast_to(jnp.arange(E)[:, None], (G, E, C))
        if self.renormalize:
            group = jnp.arange(G)[:, None, None]
            taken = jnp.zeros((G, S, E), bool).at[group, token, expert].set(slot < C, unique_indices=True)
            shares = jnp.where(taken, gates if weights is None else weights, 0)
            total = jnp.sum(shares, axis=-1)  # [G, S], of the experts that took the token
            weight /= jnp.where(total > 0, total, 1)[group, token]
        return Routing(
            token=token.reshape(G, E * C),
            expert=expert.reshape(G, E * C),
            slot=slot.reshape(G, E * C),
            weight=weight.reshape(G, E * C),
            group_size=S,
            num_experts=E,
            capacity=C,
        )
