"""TPU topologies on a machine without TPUs: with libtpu installed, programs compile for them, and do not run."""

import contextlib
import functools
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Iterator
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
# Chips in each direction of the largest slice that there is of each; libtpu would compile for larger ones.
LARGEST = {"v4": (16, 16, 16), "v5e": (16, 16), "v5p": (16, 20, 28), "v6e": (16, 16)}


@functools.cache
def topology_devices(topology: str) -> tuple[jax.Device, ...]:
    """The devices of a TPU slice, to build a `jax.sharding.Mesh` of and compile for.

    Args:
      topology: such as "v5e:16x16" or "v5p:4x4x8"; "v5e:1x1" and "v6e:1x1" are one chip.

    Raises:
      UserError: libtpu is not installed, or there is no such topology.
    """
    generation, _, shape = topology.partition(":")
    if generation not in GENERATIONS or not shape.replace("x", "").isdecimal():
        raise UserError(
            f"There is no TPU topology {topology!r}; use one of {', '.join(GENERATIONS)} with the chips in each "
            "direction, such as v5e:4x4 or v5p:2x2x2."
        )
    if topology != (nearest := nearest_topology(topology)):
        largest, directions = "x".join(map(str, LARGEST[generation])), len(LARGEST[generation])
        raise UserError(
            f"There is no TPU topology {topology!r}: slices of {generation} have {directions} directions, "
            f"hosts of 2x2 chips, and at most {largest} chips. The nearest is {nearest}."
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
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"libtpu refuses the topology {topology!r}: {reason} Hosts have 2x2 chips, so that v5e:2x2, v5e:4x4 or "
            "v5p:2x2x1 exist."
        ) from None


def nearest_topology(topology: str) -> str:
    """The topology that exists and has about as many chips in each direction; the same where it exists.

    Args:
      topology: such as "v5e:3x5", of a generation that exists.
    """
    generation, _, shape = topology.partition(":")
    largest = LARGEST[generation]
    sizes = [int(size or 1) for size in shape.split("x")]
    if len(largest) == 2 and all(size == 1 for size in sizes):
        return ONE_CHIP[generation]
    if len(sizes) < len(largest):
        sizes += [1] * (len(largest) - len(sizes))
    elif len(sizes) > len(largest):  # the chips of further directions go to the last
        kept = len(largest)
        sizes = [*sizes[: kept - 1], math.prod(sizes[kept - 1 :])]
    # A host has two chips in each of the first two directions.
    sizes = [max(2, size + size % 2) if d < 2 else max(1, size) for d, size in enumerate(sizes)]
    # The largest slice lies any way round.
    order = sorted(range(len(sizes)), key=lambda d: sizes[d])
    for d, limit in zip(order, sorted(largest), strict=True):
        sizes[d] = min(sizes[d], limit)
    return f"{generation}:{'x'.join(map(str, sizes))}"


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
