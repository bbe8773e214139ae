"""Switch routing (Fedus et al. 2021, arXiv:2101.03961, section 2)."""

import dataclasses

from jmoe.notation import Array, Bool, Float
from jmoe.routing.capacity import check_capacity_options
from jmoe.routing.decision import Routing
from jmoe.routing.gating import check_noise
from jmoe.routing.losses import Balance, Loss
from jmoe.routing.top_k import TopK


@dataclasses.dataclass(frozen=True, kw_only=True)
class Switch:
    """Every token goes to its best expert only; exploration comes from jitter on the gate's input, not from noise.

    Attributes:
      capacity_factor: slots per expert are ceil(S * capacity_factor / E); 1.25 in training as published (2.0 in
        evaluation).
      jitter: in training the gate's input is multiplied by uniform draws from [1 - jitter, 1 + jitter].
      batch_priority: whether confident tokens come first, as in V-MoE.
      noise_std: as in TopK; none as published.
    """

    capacity_factor: float = 1.25
    jitter: float = 0.01
    batch_priority: bool = False
    noise_std: float = 0.0

    def __post_init__(self):
        check_capacity_options(self.capacity_factor, None, "up", 1, "Switch")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"Switch wants a jitter from 0 to below 1; it got {self.jitter}.")
        check_noise(self.noise_std, "Switch")

    @property
    def losses(self) -> tuple[Loss, ...]:
        """The auxiliary loss published with it."""
        return (Balance(),)

    @property
    def batch_invariant(self) -> bool:
        """Whether the result of a token is independent of the rest of its group."""
        return False

    def __call__(self, gates: Float[Array, "G S E"], *, mask: Bool[Array, "G S"] | None = None) -> Routing:
        """Routes groups of tokens; arguments, result and errors as in TopK with k = 1."""
        top_1 = TopK(k=1, capacity_factor=self.capacity_factor, multiple=1, batch_priority=self.batch_priority)
        return top_1(gates, mask=mask)
