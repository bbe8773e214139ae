"""Many devices: the mesh, where parameters lie on it, how tokens cross it, hosts; and TPU topologies to compile for."""

import importlib
from typing import TYPE_CHECKING, Any

from jmoe.parallel.exchange import Exchange as Exchange
from jmoe.parallel.hosts import Hosts as Hosts
from jmoe.parallel.hosts import current as current
from jmoe.parallel.mesh import Mesh as Mesh
from jmoe.parallel.mesh import build as build
from jmoe.parallel.rules import RULES as RULES
from jmoe.parallel.rules import place as place
from jmoe.parallel.rules import shardings as shardings
from jmoe.parallel.startup import Addresses as Addresses
from jmoe.parallel.startup import start as start
from jmoe.parallel.topology import compile_for_chip as compile_for_chip
from jmoe.parallel.topology import topology_devices as topology_devices

if TYPE_CHECKING:
    from collections.abc import Callable

    plan: Callable[..., Any]


def __getattr__(name: str) -> Any:
    # A plan compiles the step of a training run, which knows all parts of jmoe, and all but the command know nothing of
    # it. By this name it is looked for.
    if name == "plan":
        return importlib.import_module("jmoe.plan").plan
    raise AttributeError(f"module 'jmoe.parallel' has no attribute {name!r}")
