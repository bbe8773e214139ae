"""What is known of the chip that a program is compiled for."""

import dataclasses

import jax

from kernels_pallas import compat

MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a kernel for TPU is laid out for.

    Attributes:
      cores: that share a device; a parallel grid axis is divided among them.
      vector_memory: bytes of each core.
    """

    cores: int
    vector_memory: int


UNKNOWN = Chip(cores=2, vector_memory=16 * MIB)  # what runs on this runs on all
CHIPS = {
    "TPU v4": Chip(cores=2, vector_memory=16 * MIB),
    "TPU v5": Chip(cores=2, vector_memory=64 * MIB),
    "TPU v5p": Chip(cores=2, vector_memory=64 * MIB),
    "TPU v5 lite": Chip(cores=1, vector_memory=128 * MIB),
    "TPU v5e": Chip(cores=1, vector_memory=128 * MIB),
    "TPU v6 lite": Chip(cores=1, vector_memory=128 * MIB),
    "TPU v6e": Chip(cores=1, vector_memory=128 * MIB),
    "TPU7x": Chip(cores=1, vector_memory=64 * MIB),
}


def device_kind(platform: str) -> str | None:
    """The kind of device of a platform ("tpu" or "gpu") that is compiled for; None if that is not known.

    It is that of the mesh in `jax.set_mesh`, or else of this machine. A program that is compiled ahead of time with
    nothing but shardings does not say.
    """
    device = compat.target_device()
    return device.device_kind if device is not None and compat.platform_of(device) == platform else None


def chip() -> Chip:
    """The TPU chip that is compiled for."""
    return CHIPS.get(device_kind("tpu") or "", UNKNOWN)


def compute_capability() -> float | None:
    """That of the GPU of this machine; None if there is none, or another is compiled for."""
    device = compat.target_device()
    if not isinstance(device, jax.Device) or compat.platform_of(device) != "gpu":
        return None
    capability = getattr(device, "compute_capability", None)
    return float(capability) if capability else None
