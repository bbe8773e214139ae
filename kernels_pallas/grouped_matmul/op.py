"""The public op: a matrix multiply for dropless experts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.activations import ACTIVATIONS, Activation
from kernels_pallas.grouped_matmul import reference, xla
from kernels_pallas.indexing import check_index_pair, no_gradients, rows_of
from kernels_pallas.per_platform import PerPlatform, check_name
from kernels_pallas.rows import gather_sum

KERNELS = {"tpu": "kernels_pallas.grouped_matmul.tpu", "gpu": "kernels_pallas.grouped_matmul.gpu"}
# On TPU the kernel is the default: by the compiler's count, XLA's ragged_dot copies every matrix for the gradient of x,
# and multiplies every row by every group for that of w (README.md).
PREFERRED = ("tpu",)

_matmul = PerPlatform("grouped_matmul", xla=xla.grouped_matmul, kernels=KERNELS, preferred=PREFERRED)
_outer = PerPlatform(
    "grouped_outer",
    title="grouped_outer (the gradient of grouped_matmul)",
    xla=xla.grouped_outer,
    kernels=KERNELS,
    preferred=PREFERRED,
)
KERNEL = _matmul


def grouped_matmul(
    x: Float[Array, "r k"],
    w: Float[Array, "e k n"],
    group_sizes: Int[Array, " e"],
    *,
    rows: tuple[Int[Array, "r c"], Int[Array, " m"]] | None = None,
    bias: Float[Array, "e n"] | None = None,
    activation: Activation | None = None,
    implementation: str | None = None,
) -> Float[Array, "m n"]:
    """Multiplies each row of x by the matrix of the group that owns it.

    Rows are sorted by group: the first group_sizes[0] rows use w[0], the next group_sizes[1] use w[1], and so on.
    Rows beyond sum(group_sizes) belong to no group and come out zero. See MegaBlocks, arXiv:2211.15841.

    Args:
      x: [m, k], float32 or bfloat16. float32 is multiplied at jax.default_matmul_precision, as everywhere in JAX.
      w: [e, k, n], dtype of x.
      group_sizes: [e] integers, rows per group; zeros allowed. Their sum is known only at run time and is not checked:
        where it passes m, the rows beyond the last one do not exist, nothing is read or written for them.
      rows: (slots [r, c], choice [m]), the pair of index arrays that `gather_rows` takes: then x is [r, k], and it is
        gather_rows(x, slots, choice) that is multiplied, without being written where the kernel can do that.
      bias: [e, n], dtype of x, added to the rows of its group.
      activation: "gelu" (the tanh form), "relu", "silu" or None, of the sum in float32.
      implementation: "pallas", "xla" (jax.lax.ragged_dot), "reference", or None for the fastest on the platform that it
        is compiled for (kernels_pallas/README.md; "interpret-tpu" runs a kernel step by step, for tests).

    Returns:
      [m, n], dtype of x, accumulated in float32. Differentiable in x, w and bias. With an activation, what it was
      applied to is kept for the gradient, in the dtype of x: with few rows per group, multiplying again would cost
      reading every matrix again. Gathered rows are not kept but gathered again.

    Raises:
      ValueError: the shapes or dtypes do not fit together.
      NotImplementedError: the named implementation is unknown, or cannot take these arguments; it says why.
    """
    _check(x, w, group_sizes, rows, bias, activation)
    check_name("grouped_matmul", implementation)
    if implementation == "reference":
        return reference.grouped_matmul(x, w, group_sizes, None if rows is None else rows_of(*rows), bias, activation)
    return _grouped_matmul(_Options(activation, implementation), x, w, bias, group_sizes, rows)


@dataclasses.dataclass(frozen=True)
class _Options:
    activation: Activation | None
    implementation: str | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(options, x, w, bias, group_sizes, rows):
    return _multiply(options, x, w, bias, group_sizes, rows, keep=False)[0]


def _multiply(options, x, w, bias, group_sizes, rows, keep):
    named = {"index": None if rows is None else rows_of(*rows), "bias": bias}
    more = {name: array for name, array in named.items() if array is not None}
    return _matmul(
        x,
        w,
        group_sizes,
        *more.values(),
        extras=tuple(more),
        activation=options.activation,
        keep=keep,
        implementation=options.implementation,
    )


def _forward(options, x, w, bias, group_sizes, rows):
    keep = options.activation is not None
    out, *before = _multiply(options, x, w, bias, group_sizes, rows, keep)
    return out, (x, w, bias is not None, group_sizes, rows, before)


def _backward(options, residuals, dout):
    x, w, biased, group_sizes, rows, before = residuals
    implementation = options.implementation
    for kept in before:
        _, back = jax.vjp(ACTIVATIONS[options.activation], kept.astype(jnp.float32))
        dout = back(dout.astype(jnp.float32))[0].astype(x.dtype)
    dx = _matmul(dout, w, group_sizes, implementation=implementation, transposed=True)[0]
    if rows is not None:  # a row's gradient is the sum over the places that it was copied to, which `slots` lists
        dx = gather_sum(dx, rows[0], implementation=implementation)
        x = gather_sum(x, rows_of(*rows)[:, None], implementation=implementation)
    dw = _outer(x, dout, group_sizes, implementation=implementation)[0]
    dbias = xla.group_sums(dout, group_sizes).astype(x.dtype) if biased else None
    return dx, dw, dbias, *no_gradients(group_sizes), None if rows is None else no_gradients(*rows)


_grouped_matmul.defvjp(_forward, _backward)


def _check(x, w, group_sizes, rows, bias, activation) -> None:
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1]:
        raise ValueError(f"grouped_matmul wants x [m, k] and w [e, k, n]; it got {x.shape} and {w.shape}.")
    if group_sizes.shape != w.shape[:1]:
        raise ValueError(
            f"grouped_matmul wants one group size for each of the {w.shape[0]} matrices; it got {group_sizes.shape}."
        )
    if bias is not None and bias.shape != (w.shape[0], w.shape[2]):
        raise ValueError(f"grouped_matmul wants bias [e, n], {(w.shape[0], w.shape[2])}; it got {bias.shape}.")
    if x.dtype != w.dtype or (bias is not None and bias.dtype != w.dtype):
        came = f"{x.dtype} and {w.dtype}" if bias is None else f"{x.dtype}, {w.dtype} and {bias.dtype}"
        raise ValueError(
            f"grouped_matmul wants {'x and w' if bias is None else 'x, w and bias'} of one dtype; it got {came}."
        )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"grouped_matmul wants integers in group_sizes; it got {group_sizes.dtype}.")
    if activation not in ACTIVATIONS:
        known = ", ".join(repr(name) for name in ACTIVATIONS if name)
        raise ValueError(f"grouped_matmul has no activation {activation!r}; use one of {known}, or None.")
    if rows is not None:
        check_index_pair(x.shape[0], rows[0], rows[1], "grouped_matmul")
