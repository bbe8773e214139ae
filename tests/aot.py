"""Programs compiled for TPU chips that are not there."""

import warnings
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jmoe.parallel import topology_devices

CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1"}  # generation: its smallest slice
WIDTHS = (512, 768, 1024, 1280, 1408)  # of the published models


def slow_but(quick, values: Sequence):
    """Values of a parameter, of which all but one are for slow tests."""
    assert quick in values
    return [value if value == quick else pytest.param(value, marks=pytest.mark.slow) for value in values]


def compile_for(chip: str, function, *shapes):
    """The function compiled for one chip of a generation; shapes are jax.ShapeDtypeStructs."""
    mesh = Mesh(np.array(topology_devices(CHIPS[chip])[:1]), ("x",))
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), shapes)
    with warnings.catch_warnings(), jax.set_mesh(mesh):  # kernels see the chip by the mesh
        # Such programs are written to the cache of compiled programs, but cannot be read from it.
        warnings.filterwarnings("ignore", "Error reading persistent compilation cache entry")
        return jax.jit(function, in_shardings=shardings).lower(*shapes).compile()
