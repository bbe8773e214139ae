"""TPU topologies on a machine without TPUs: with libtpu installed, programs compile for them, and do not run."""

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
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
    with warnings.catch_warnings(), jax.set_mesh(mesh):  # kernels see the chip by the mesh
        # Such programs are written to the cache of compiled programs, but cannot be read from it.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
        return jax.jit(function, in_shardings=shardings).lower(*shapes).compile()
