import pathlib

import numpy as np
import pytest

from jmoe.routing import expert_capacity

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"


def test_capacity_is_that_of_the_published_code():
    with np.load(GOLDENS / "routing_topk_capacity_table.npz", allow_pickle=False) as table:
        rows = [table[name].tolist() for name in ("num_tokens", "num_experts", "capacity_factor", "is_round")]
        rows += [table["multiple_of"].tolist(), table["capacity"].tolist()]
    assert len(rows[0]) == 1500
    for assignments, experts, factor, nearest, multiple, expected in zip(*rows, strict=True):
        options = {"rounding": "nearest" if nearest else "up", "multiple": multiple or 1}
        if expected == -1:  # the published code raises
            with pytest.raises(ValueError, match="rounds to 0; it must be at least 1"):
                expert_capacity(assignments, experts, factor, **options)
        else:
            assert expert_capacity(assignments, experts, factor, **options) == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((16, 8, 1.0), 4),  # 2, up to a multiple of 4
        ((16, 8, 1.0, "up", 1), 2),
        ((16, 8, 1.01, "up", 1), 3),
        ((20, 8, 1.0, "nearest", 1), 2),  # 2.5: ties to even
        ((28, 8, 1.0, "nearest", 1), 4),  # 3.5: ties to even
        ((1, 8, 1.0, "up", 1), 1),
    ],
)
def test_slots_are_rounded_then_brought_to_a_multiple(arguments, expected):
    assert expert_capacity(*arguments) == expected


def test_no_slot_is_refused_with_what_would_do():
    with pytest.raises(ValueError, match="rounds to 0") as error:
        expert_capacity(16, 8, 0.2, "nearest")
    assert str(error.value) == (
        "capacity_factor=0.2 gives each of the 8 experts 0.4 slots for 16 assignments, which rounds to 0; it must be "
        "at least 1. Choose a capacity_factor of at least 0.5, or larger groups."
    )
    assert expert_capacity(16, 8, 0.5, "nearest") == 4  # the advice is good


def test_the_advice_is_good_for_any_sizes():
    for assignments, experts in ((7, 64), (3, 32), (1000, 4096)):
        factor = float(f"{experts / assignments:.3g}")  # as the sentence says it
        assert expert_capacity(assignments, experts, factor, "nearest", 1) == 1
