"""The public op: a matrix multiply for dropless experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul import reference, xla
from kernels_pallas.per_platform import PerPlatform, check_name

_matmul = PerPlatform("grouped_matmul", xla=xla.grouped_matmul, kernels={}, preferred=())
_outer = PerPlatform("grouped_outer", xla=xla.grouped_outer, kernels={}, preferred=())
KERNEL = _matmul


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
    check_name("grouped_matmul", implementation)
    if implementation == "reference":
        return reference.grouped_matmul(x, w, group_sizes)
    return _grouped_matmul(x, w, group_sizes, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_matmul(x, w, group_sizes, implementation):
    return _matmul(x, w, group_sizes, implementation=implementation)[0]


def _forward(x, w, group_sizes, implementation):
    return _grouped_matmul(x, w, group_sizes, implementation), (x, w, group_sizes)


def _backward(implementation, residuals, dout):
    x, w, group_sizes = residuals
    dx = _matmul(dout, w, group_sizes, implementation=implementation, transposed=True)[0]
    dw = _outer(x, dout, group_sizes, implementation=implementation)[0]
    return dx, dw, np.zeros(group_sizes.shape, jax.dtypes.float0)


_grouped_matmul.defvjp(_forward, _backward)
