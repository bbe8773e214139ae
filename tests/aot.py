"""Programs compiled for TPU chips that are not there."""

from collections.abc import Sequence

import pytest

from jmoe.parallel import compile_for_chip as compile_for  # noqa: F401
from jmoe.parallel.topology import ONE_CHIP

CHIPS = tuple(ONE_CHIP)
WIDTHS = (512, 768, 1024, 1280, 1408)  # of the published models


def slow_but(quick, values: Sequence):
    """Values of a parameter, of which all but one are for slow tests."""
    assert quick in values
    return [value if value == quick else _slow(value) for value in values]


def _slow(value):
    return pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
