"""Programs compiled for TPU chips that are not there."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jmoe.parallel import topology_devices

CHIPS = {"v4": "v4:2x2x1", "v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1"}  # generation: its smallest slice
WIDTHS = (512, 768, 1024, 1280, 1408)  # of the published models


def compile_for(chip: str, function, *shapes):
    """The function compiled for one chip of a generation; shapes are jax.ShapeDtypeStructs."""
    mesh = Mesh(np.array(topology_devices(CHIPS[chip])[:1]), ("x",))
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), shapes)
    with jax.set_mesh(mesh):  # so that kernels know the chip
        return jax.jit(function, in_shardings=shardings).lower(*shapes).compile()
