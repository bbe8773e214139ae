"""What differs between the versions of JAX that are supported, 0.10 to 0.12."""

from collections.abc import Sequence
from typing import Any

import jax
from jax.core import ShapedArray


def like_inputs(result: Any, inputs: Sequence[ShapedArray]) -> ShapedArray:
    """The abstract value of a result; inside `jax.shard_map` it varies over the mesh axes that an input varies over."""
    kinds = [aval.manual_axis_type for aval in inputs]
    varying = frozenset().union(*(kind.varying for kind in kinds))
    if not varying:
        return ShapedArray(result.shape, result.dtype)
    sharding = jax.sharding.NamedSharding(inputs[0].sharding.mesh, jax.sharding.PartitionSpec(*[None] * result.ndim))
    kind = type(kinds[0])(varying=varying)
    return ShapedArray(result.shape, result.dtype, sharding=sharding, manual_axis_type=kind)


def target_device() -> Any:
    """The device that is compiled for, real or abstract: that of the mesh in force, or else of this machine."""
    mesh = jax.sharding.get_abstract_mesh()
    return getattr(mesh, "abstract_device", None) or jax.devices()[0]


def platform_of(device: Any) -> str:
    """Returns "cpu", "gpu" or "tpu"."""
    platform = device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def result_of(shape: Sequence[int], dtype: Any, inputs: Sequence[Any]) -> jax.ShapeDtypeStruct:
    """The result of a kernel; inside `jax.shard_map` it varies over the mesh axes that an input varies over."""
    kinds = [jax.typeof(value).manual_axis_type for value in inputs]
    varying = frozenset().union(*(kind.varying for kind in kinds))
    return jax.ShapeDtypeStruct(tuple(shape), dtype, manual_axis_type=type(kinds[0])(varying=varying))
