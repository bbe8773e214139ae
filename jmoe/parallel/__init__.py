"""Many devices: the mesh, where parameters lie on it, how tokens cross it; and TPU topologies to compile for."""

from jmoe.parallel.exchange import Exchange as Exchange
from jmoe.parallel.mesh import Mesh as Mesh
from jmoe.parallel.mesh import build as build
from jmoe.parallel.rules import RULES as RULES
from jmoe.parallel.rules import shardings as shardings
from jmoe.parallel.topology import compile_for_chip as compile_for_chip
from jmoe.parallel.topology import topology_devices as topology_devices
