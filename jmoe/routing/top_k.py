"""Token choice: every token takes its K best experts (V-MoE, Riquelme et al. 2021, arXiv:2106.05974, section 2)."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from jmoe.notation import Array, Bool, Float, Int
from jmoe.routing.capacity import Rounding, check_capacity_options, expert_capacity
from jmoe.routing.decision import Routing
from jmoe.routing.gating import check_noise
from jmoe.routing.losses import Importance, Load, Loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class TopK:
    """Every token goes to the K experts it gates highest, as long as they have slots left.

    All first choices come before all second choices, and so on. Among equal choices tokens come in the order of the
    group, or with batch priority in the order of their confidence (section 4.1): then low capacity drops the tokens
    that matter least. A choice that finds no slot is dropped; it does not try another expert.

    Attributes:
      k: K, experts per token.
      capacity_factor: slots per expert are S * K * capacity_factor / E, rounded; None with capacity None is
        dropless: every expert has room for the whole group.
      capacity: slots per expert and group as a number, instead of a factor; it is not rounded.
      rounding: "up" as published, or "nearest".
      multiple: the slots by factor are rounded up to a multiple of this; 4 as published.
      batch_priority: whether confident tokens come first. Published checkpoints were trained without.
      priority: what confidence is: the largest gate ("max", as published) or the sum of the K chosen gates.
      noise_std: standard deviation of the noise on the logits in training, in units of 1 / E; 1.0 as published.
      renormalize: whether the weights of a token's K experts are divided by their sum, so that identical experts with
        room for everybody compute what one of them does (Sparse Upcycling, arXiv:2212.05055). Published V-MoE routers
        do not. With k = 1 every weight is then 1, and no gradient of the task reaches the gate.
    """

    k: int = 2
    capacity_factor: float | None = 1.05
    capacity: int | None = None
    rounding: Rounding = "up"
    multiple: int = 4
    batch_priority: bool = False
    priority: Literal["max", "sum"] = "max"
    noise_std: float = 1.0
    renormalize: bool = False

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"TopK wants k of at least 1 expert per token; it got {self.k}.")
        if self.priority not in ("max", "sum"):
            raise ValueError(f"TopK wants priority 'max' or 'sum'; it got {self.priority!r}.")
        check_noise(self.noise_std, "TopK")
        check_capacity_options(self.capacity_factor, self.capacity, self.rounding, self.multiple, "TopK")

    @property
    def losses(self) -> tuple[Loss, ...]:
        """The auxiliary losses published with it."""
        return (Importance(), Load())

    @property
    def batch_invariant(self) -> bool:
        """Whether the result of a token is independent of the rest of its group: only if nothing can be dropped."""
        return self.capacity_factor is None and self.capacity is None

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
          mask: [G, S], False for padding, which takes no slot.
          weights: [G, S, E] where the combine weights are read, if the gates are to choose and nothing else.

        Returns:
          a Routing with choices = K; the weights are the gates of the chosen experts, dropped choices included.

        Raises:
          ValueError: k > E, or a capacity without a slot.
        """
        G, S, E = gates.shape
        K = self.k
        if K > E:
            raise ValueError(f"TopK has k={K}, but there are only {E} experts. Choose k from 1 to {E}.")
        C = self._capacity(S, E)

        _, expert = jax.lax.top_k(jax.lax.stop_gradient(gates), K)  # [G, S, K]; equal gates: the lower expert first
        # Read back by a one-hot product: exact, and its gradient is elementwise where that of an index is a scatter.
        chosen = jax.nn.one_hot(expert, E, dtype=gates.dtype)  # [G, S, K, E]
        read = functools.partial(jnp.einsum, "GSKE,GSE->GSK", chosen, precision="highest")
        gate = read(gates)  # [G, S, K]
        if mask is None:
            mask = jnp.ones((G, S), bool)

        if self.batch_priority:
            confidence = gate[..., 0] if self.priority == "max" else jnp.sum(gate, axis=-1)
            order = jnp.argsort(-jax.lax.stop_gradient(confidence), axis=-1, stable=True)  # [G, S]
            back = jnp.argsort(order, axis=-1)
            slot = first_free_slots(
                jnp.take_along_axis(expert, order[..., None], axis=1), jnp.take_along_axis(mask, order, axis=1), E
            )
            slot = jnp.take_along_axis(slot, back[..., None], axis=1)
        else:
            slot = first_free_slots(expert, mask, E)
        slot = jnp.where(mask[..., None], slot, C)
        weight = gate if weights is None else read(weights)
        if self.renormalize:
            total = jnp.sum(weight, axis=-1, keepdims=True)  # of gates, at least K / E; of other weights perhaps 0
            weight /= jnp.where(total > 0, total, 1.0)

        return Routing(
            token=jnp.broadcast_to(jnp.arange(S)[:, None], (G, S, K)).reshape(G, S * K),
            expert=expert.reshape(G, S * K),
            slot=slot.reshape(G, S * K),
            weight=weight.reshape(G, S * K),
            group_size=S,
            num_experts=E,
            capacity=C,
            choices=K,
        )

    def _capacity(self, S: int, E: int) -> int:
        """Slots per expert for a group of S tokens; S for dropless, as a token goes to an expert at most once."""
        if self.capacity is not None:
            return self.capacity
        if self.capacity_factor is None:
            return S
        return expert_capacity(S * self.k, E, self.capacity_factor, self.rounding, self.multiple)


def first_free_slots(expert: Int[Array, "G S K"], mask: Bool[Array, "G S"], num_experts: int) -> Int[Array, "G S K"]:
    """Numbers the takers of each expert: all first choices in the order of tokens, then all second choices, and so on.

    Returns, for every choice, how many earlier ones took the same expert; masked tokens do not count.
    """
    G, S, K = expert.shape
    taken = jax.nn.one_hot(expert, num_experts, dtype=jnp.int32) * mask[..., None, None]
    taken = taken.swapaxes(1, 2).reshape(G, K * S, num_experts)  # first choices before second choices
    earlier = jnp.cumsum(taken, axis=1) - taken
    slot = jnp.sum(earlier * taken, axis=-1)  # [G, K * S]
    return slot.reshape(G, K, S).swapaxes(1, 2)
