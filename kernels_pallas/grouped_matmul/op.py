"""The public op: a matrix multiply for dropless experts."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.dispatching import choose
from kernels_pallas.grouped_matmul import reference, xla

IMPLEMENTATIONS = {"xla": xla.grouped_matmul, "reference": reference.grouped_matmul}


def grouped_matmul(
    x: Float[Array, "m k"],
    w: Float[Array, "e k n"],
    group_sizes: Int[Array, " e"],
    *,
    implementation: str | None = None,
) -> Float[Array, "m n"]:
    """Multiplies each row of x by the matrix of the group that owns it.

    Rows are sorted by group: the first group_sizes[0] rows use w[0], the next group_sizes[1] use w[1], and so on.
    Rows beyond sum(group_sizes) belong to no group and come out zero. See MegaBlocks, arXiv:2211.15841.

    Args:
      x: [m, k], float32 or bfloat16.
      w: [e, k, n], dtype of x.
      group_sizes: [e] integers, rows per group; zeros allowed, sum at most m (not checked: it is known only at run
        time).
      implementation: "xla" (jax.lax.ragged_dot), "reference", or None for the fastest here.

    Returns:
      [m, n], dtype of x, accumulated in float32. Differentiable in x and w.

    Raises:
      ValueError: the shapes or dtypes do not fit together.
      NotImplementedError: there is no such implementation.
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1]:
        raise ValueError(f"grouped_matmul wants x [m, k] and w [e, k, n]; it got {x.shape} and {w.shape}.")
    if group_sizes.shape != w.shape[:1]:
        raise ValueError(
            f"grouped_matmul wants one group size for each of the {w.shape[0]} matrices; it got {group_sizes.shape}."
        )
    if x.dtype != w.dtype:
        raise ValueError(f"grouped_matmul wants x and w of one dtype; it got {x.dtype} and {w.dtype}.")
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"grouped_matmul wants integers in group_sizes; it got {group_sizes.dtype}.")
    return choose("grouped_matmul", implementation, IMPLEMENTATIONS, "xla")(x, w, group_sizes)
