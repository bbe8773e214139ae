"""Where an evaluation runs: here on one device, or on all of a mesh that is passed in."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from jmoe.nn.exchange import ONE_DEVICE, Exchange


def _as_it_is(batch: dict[str, Any]) -> dict[str, Any]:
    return batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """What an evaluator needs to know of the devices.

    Attributes:
      exchange: how tokens get to experts on other devices.
      put: makes global arrays of a batch of this process.
      everywhere: the sharding of results, which every process reads; None on one device.
    """

    exchange: Exchange = ONE_DEVICE
    put: Callable[[dict[str, Any]], dict[str, Any]] = _as_it_is
    everywhere: jax.sharding.Sharding | None = None


HERE = Devices()
