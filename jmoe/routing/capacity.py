"""How many slots an expert has."""

import math
from typing import Literal

Rounding = Literal["up", "nearest"]


def expert_capacity(
    num_assignments: int, num_experts: int, factor: float, rounding: Rounding = "up", multiple: int = 4
) -> int:
    """Returns C, the slots of each expert for one group: num_assignments * factor / num_experts, rounded.

    In double precision from left to right, as published: 100 * 1.1 / 10 is a little above 11, and rounded up 12.

    Args:
      num_assignments: S * K where tokens choose, S where experts choose.
      num_experts: E.
      factor: 1.0 gives exactly the slots needed if all experts are chosen equally often.
      rounding: "up", or "nearest" (ties to even).
      multiple: the result is then rounded up to a multiple of this; 4 as published, 1 for no such rounding.

    Raises:
      ValueError: no slot would be left.
    """
    share = num_assignments * factor / num_experts
    slots = math.ceil(share) if rounding == "up" else round(share)
    if slots < 1:
        raise ValueError(
            f"capacity_factor={factor} gives each of the {num_experts} experts {share:.3g} slots for "
            f"{num_assignments} assignments, which rounds to {slots}; it must be at least 1. Choose a capacity_factor "
            f"of at least {num_experts / num_assignments:.3g}, or larger groups."
        )
    return -(-slots // multiple) * multiple


def check_capacity_options(
    factor: float | None, capacity: int | None, rounding: str, multiple: int, owner: str
) -> None:
    """Raises ValueError if the options of a router's capacity do not make sense together."""
    if factor is not None and not (factor > 0 and math.isfinite(factor)):
        raise ValueError(f"{owner} wants a capacity_factor above 0; it got {factor}.")
    if capacity is not None and capacity < 1:
        raise ValueError(f"{owner} wants a capacity of at least 1 slot per expert; it got {capacity}.")
    if factor is not None and capacity is not None:
        raise ValueError(
            f"{owner} takes capacity_factor or capacity, not both; it got {factor} and {capacity}. "
            "Set capacity_factor=None to give the number of slots."
        )
    if rounding not in ("up", "nearest"):
        raise ValueError(f"{owner} wants rounding 'up' or 'nearest'; it got {rounding!r}.")
    if multiple < 1:
        raise ValueError(f"{owner} wants a multiple of at least 1; it got {multiple}.")
