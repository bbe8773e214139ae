"""Stopping after the same step on every host, although a signal comes to one of them or to each at another time."""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class AgreedStop:
    """Agrees over the devices on whether to stop, one answer for each step.

    Every process puts the number of the signal that came to it into a tiny global array, and all read its maximum. That
    is dispatched like a step and read `lag` steps later, when it has long been there: no process waits for the step in
    flight, and all read the same value in the same step, because it is the same value. As a consequence no process
    is ahead of its devices by more than `lag` steps.
    """

    def __init__(self, mesh: Mesh | None = None, *, lag: int = 2):
        """Takes the mesh of the run, or None for one of all devices of all processes, and the lag in steps."""
        mesh = Mesh(np.array(jax.devices()), ("all",)) if mesh is None else mesh
        self._lag = lag
        self._pending: deque[jax.Array] = deque()
        self._alone = len({device.process_index for device in mesh.devices.flat}) == 1
        if self._alone:
            return
        self._split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._maximum = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._flags: dict[int, jax.Array] = {}  # by signal: nearly always the same, already on the devices

    def update(self, signum: int | None) -> int | None:
        """Called by all processes once in every step; returns the signal to stop by after this step, on all or on none.

        Args:
          signum: the signal that has come to this process, or None. Once given, it is to be given again.

        Returns:
          In one process what it was given. In many, the largest that any of them gave `lag` steps ago.
        """
        if self._alone:
            return signum
        self._pending.append(self._maximum(self._flag(signum or 0)))
        if len(self._pending) <= self._lag:
            return None
        agreed = int(np.asarray(self._pending.popleft().addressable_data(0)))
        return agreed or None

    def _flag(self, signum: int) -> jax.Array:
        if signum not in self._flags:
            shape = (self._split.mesh.size,)
            self._flags[signum] = jax.make_array_from_callback(
                shape, self._split, lambda index: np.full((1,), signum, np.int32)
            )
        return self._flags[signum]
