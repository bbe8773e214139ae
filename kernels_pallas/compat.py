"""What differs between the versions of JAX that are supported, 0.10 to 0.12."""

from collections.abc import Sequence
from typing import Any

from jax.core import ShapedArray


def like_inputs(result: Any, inputs: Sequence[ShapedArray]) -> ShapedArray:
    """The abstract value of a result; inside `jax.shard_map` it varies over the mesh axes that an input varies over."""
    varying = frozenset().union(*(getattr(aval, "vma", frozenset()) for aval in inputs))
    return ShapedArray(result.shape, result.dtype, **({"vma": varying} if varying else {}))
