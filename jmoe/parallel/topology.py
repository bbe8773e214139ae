"""TPU topologies on a machine without TPUs: with libtpu installed, programs compile for them, and do not run."""

import contextlib
import functools
import importlib.util
import itertools
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jmoe.errors import UserError

# What libtpu otherwise asks a server of Google's cloud for, and waits.
ENVIRONMENT = {
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any that exists: the topology is given by name
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # other processes may compile at the same time
}
GENERATIONS = ("v4", "v5e", "v5p", "v6e")
ONE_CHIP = {"v4": "v4:2x2x1", "v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1"}  # the smallest slice of each
# The slices that Google offers, as chips in each direction; libtpu would compile for others, too.
# Those of v5e and v6e: https://cloud.google.com/tpu/docs/v5e and .../v6e.
FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
# Those of v4 and v5p have multiples of 4 chips in each direction, up to the largest, or are one of the small ones.
SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
LARGEST = {"v4": (16, 16, 16), "v5p": (16, 20, 28)}


@functools.cache
def topology_devices(topology: str) -> tuple[jax.Device, ...]:
    """The devices of a TPU slice, to build a `jax.sharding.Mesh` of and compile for.

    Args:
      topology: such as "v5e:16x16" or "v5p:4x4x8"; "v5e:1x1" and "v6e:1x1" are one chip.

    Raises:
      UserError: libtpu is not installed, or there is no such topology.
    """
    generation, _, shape = _common_name(topology).partition(":")
    if generation not in GENERATIONS or not re.fullmatch(r"\d{1,6}(x\d{1,6}){0,2}", shape):
        raise UserError(
            f"There is no TPU topology {topology!r}; use one of {', '.join(GENERATIONS)} with the chips in each "
            "direction, such as v5e:4x4 or v5p:2x2x2."
        )
    if topology != (nearest := nearest_topology(f"{generation}:{shape}")):
        offered = ", ".join(map(_text, FLAT))
        if generation in LARGEST:
            offered = (
                f"{', '.join(map(_text, SMALL))}, or multiples of 4 chips in three directions, the shortest first, "
                f"up to {_text(LARGEST[generation])}"
            )
        raise UserError(
            f"There is no TPU topology {topology!r}: slices of {generation} are {offered}. The nearest is {nearest}."
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("Compiling for a TPU needs its compiler, libtpu: pip install 'jmoe[plan]'.")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict = {}
    if generation == "v4":
        options["chip_config_name"] = "megacore"  # a chip is one device
    if shape == "1x1":
        options["chips_per_host_bounds"] = (1, 1, 1)
    from jax.experimental import topologies

    try:
        return tuple(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)
    except (jax.errors.JaxRuntimeError, RuntimeError, AttributeError, ImportError, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"libtpu refuses the topology {topology!r}: {reason}. See whether another program uses libtpu, whether it "
            "knows this generation, and whether it is whole: pip install --force-reinstall 'jmoe[plan]'."
        ) from None


def nearest_topology(topology: str) -> str:
    """The slice that is offered and has about as many chips in each direction, in whatever order; the same if it is.

    Args:
      topology: such as "v5e:3x5", of a generation that exists.
    """
    generation, _, shape = topology.partition(":")
    sizes = [max(1, int(size or 1)) for size in shape.split("x")]
    offered = _offered(generation)
    if len(sizes) == 1:  # that many chips
        return f"{generation}:{_text(min(offered, key=lambda s: (abs(math.prod(s) - sizes[0]), max(s))))}"
    directions = len(offered[0])
    sizes += [1] * (directions - len(sizes))
    sizes = sorted([*sizes[: directions - 1], math.prod(sizes[directions - 1 :])])  # the last has what is left over

    def distance(slice_: tuple[int, ...]) -> tuple[float, int]:
        ratios = (math.log(has / wanted) for has, wanted in zip(sorted(slice_), sizes, strict=True))
        return sum(ratio**2 for ratio in ratios), -math.prod(slice_)  # the larger of two as near

    return f"{generation}:{_text(min(offered, key=distance))}"


def _common_name(topology: str) -> str:
    """What is meant by a name of Google's, such as v5litepod-16, in capitals, or without chips."""
    name = topology.strip().casefold().replace("v5litepod", "v5e").replace("-", ":", 1)
    return f"{name}:1" if name in GENERATIONS else name


def _offered(generation: str) -> list[tuple[int, ...]]:
    """The chips in each direction of every slice of a generation."""
    if generation not in LARGEST:
        return list(FLAT)
    large = itertools.product(*(range(4, limit + 1, 4) for limit in LARGEST[generation]))
    return [*SMALL, *(sizes for sizes in large if sorted(sizes) == list(sizes))]


def _text(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def compile_for_chip(generation: str, function: Callable[..., Any], *shapes: Any) -> jax.stages.Compiled:
    """Compiles a function for one TPU chip that is not there.

    Args:
      generation: "v4", "v5e", "v5p" or "v6e".
      function: of arrays, or trees of them.
      shapes: its arguments, as `jax.ShapeDtypeStruct`s.

    Raises:
      UserError: libtpu is not installed, or there is no such generation.
    """
    if generation not in ONE_CHIP:
        raise UserError(f"There is no TPU generation {generation!r} to compile for; use one of {', '.join(ONE_CHIP)}.")
    mesh = Mesh(np.array(topology_devices(ONE_CHIP[generation])[:1]), ("chip",))
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), shapes)
    with compiling_for(mesh):
        return jax.jit(function, in_shardings=shardings).lower(*shapes).compile()


@contextlib.contextmanager
def compiling_for(mesh: Mesh) -> Iterator[None]:
    """Within, programs are compiled for the devices of a mesh, by which kernels know the chip."""
    with warnings.catch_warnings(), jax.set_mesh(mesh):
        # Such programs are written to the cache of compiled programs, but cannot be read from it.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
        yield
