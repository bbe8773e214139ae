"""From the images that a process has read to arrays that all devices of the mesh share."""

import bisect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jmoe.evaluate.devices import Devices
from jmoe.parallel.mesh import batch_parts
from jmoe.train.compiled import divided, exchange_of, images_per_unit, rows_of, whole
from jmoe.train.config import TrainConfig

Batch = dict[str, Any]


def feeder(mesh: jax.sharding.Mesh, num_rows: int) -> tuple[list[int], Callable[[Batch], Batch]]:
    """Prepares to divide batches among devices.

    Args:
      mesh: of the devices.
      num_rows: images of a batch, of all processes together; a multiple of `batch_parts(mesh)`.

    Returns:
      the rows of each batch that this process is to read, in order; and a function that makes global arrays of what it
      has read of a batch.
    """
    sharding = divided(mesh)
    rows = rows_of(sharding, num_rows)

    def put(batch: Batch) -> Batch:
        return {name: _global(value, sharding, rows, num_rows) for name, value in batch.items()}

    return rows, put


def evaluation_devices(config: TrainConfig, mesh: jax.sharding.Mesh, batch_size: int) -> tuple[list[int], Devices]:
    """Prepares evaluation on a mesh: the rows that this process reads, and where they go.

    Batches are filled up, with images that are masked, to as many as can be divided among the devices in whole groups.
    """
    unit = batch_parts(mesh) * images_per_unit(config)
    rows, put = feeder(mesh, batch_size if mesh.size == 1 else -(-batch_size // unit) * unit)
    return rows, Devices(exchange=exchange_of(mesh), put=put, everywhere=whole(mesh))


def _global(value: np.ndarray, sharding: jax.sharding.Sharding, rows: Sequence[int], num_rows: int) -> jax.Array:
    """The array of all processes, of which this one has some rows."""

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(num_rows)
        first = bisect.bisect_left(rows, start)  # a device's rows follow each other, here as there
        return value[first : first + stop - start]

    return jax.make_array_from_callback((num_rows, *value.shape[1:]), sharding, part)
