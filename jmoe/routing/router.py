"""What a router is: a frozen dataclass with these members. There is no base class to inherit."""

from typing import Protocol, runtime_checkable

from jmoe.notation import Array, Bool, Float
from jmoe.routing.decision import Decision
from jmoe.routing.losses import Loss


@runtime_checkable
class Router(Protocol):
    """A router's fields are its options, its call is the algorithm."""

    @property
    def noise_std(self) -> float:
        """Noise that its gate adds to the logits in training, in units of 1 / E; 0.0 for none."""
        ...

    @property
    def losses(self) -> tuple[Loss, ...]:
        """The auxiliary losses published with it, which a config takes unless it names others."""
        ...

    @property
    def batch_invariant(self) -> bool:
        """Whether a token's result is independent of the other tokens of its group."""
        ...

    def __call__(self, gates: Float[Array, "G S E"], *, mask: Bool[Array, "G S"] | None = None) -> Decision:
        """Decides where the tokens of each group go; mask is False for padding, which goes nowhere."""
        ...
