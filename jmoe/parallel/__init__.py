"""Many devices, and devices that are not there: TPU topologies to compile for."""

from jmoe.parallel.topology import compile_for_chip as compile_for_chip
from jmoe.parallel.topology import topology_devices as topology_devices
