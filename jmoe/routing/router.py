"""What a router is: a frozen dataclass with these members. There is no base class to inherit."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from jmoe.routing.decision import Decision
from jmoe.routing.gating import Gating
from jmoe.routing.losses import Loss


@runtime_checkable
class Router(Protocol):
    """A router's fields are its options, its call is the algorithm.

    One that needs something else of the gate than its gates says so by a class attribute `takes`; see `decide`.
    """

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

    @property
    def __call__(self) -> Callable[..., Decision]:
        """Decides where the tokens of each group go, from what it takes of a gate.

        Called with gates [G, S, E] and mask=[G, S] (or None), False for padding, which goes nowhere.
        """
        ...


def decide(router: Any, gating: Gating) -> Decision:
    """Calls a router with what it takes of a gate.

    That is the gates [G, S, E] (and the mask), unless the router has a class attribute `takes`: "logits" for the noisy
    logits (and the mask), or "gating" for the whole record, which an ensemble does not have.

    Raises:
      ValueError: the router takes what the gate of an ensemble cannot give, or something unknown.
    """
    takes = getattr(router, "takes", "gates")
    if takes == "gates":
        return router(gating.group_gates, mask=gating.group_mask)
    if gating.members > 1:
        raise ValueError(
            f"{type(router).__name__} cannot route the {gating.members} members of an ensemble; use one in which every "
            "token chooses among the experts of its member, such as TopK."
        )
    if takes == "logits":
        return router(gating.noisy_logits, mask=gating.mask)
    if takes == "gating":
        return router(gating)
    raise ValueError(f"{type(router).__name__}.takes must be 'gates', 'logits' or 'gating'; it is {takes!r}.")
