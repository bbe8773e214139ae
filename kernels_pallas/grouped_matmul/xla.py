"""Matrix multiplies of grouped rows through XLA's own ragged product."""

import jax
import jax.numpy as jnp

from kernels_pallas.activations import ACTIVATIONS
from kernels_pallas.rows.xla import take_rows

_OUTER = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def grouped_matmul(x, w, group_sizes, *more, extras=(), transposed=False, activation=None, keep=False):
    """[m, k] by [e, k, n], or by [e, n, k] if transposed -> [m, n]; rows of no group come out zero.

    Args:
      x: rows sorted by group, or with "index" the rows that it reads.
      w: matrices.
      group_sizes: [e].
      *more: what extras names.
      extras: "index" [m], the rows of x that are meant, and "bias" [e, n]; in this order, each or not.
      transposed: multiply by the transposed matrices.
      activation: a name of ACTIVATIONS.
      keep: also return what the activation was applied to.
    """
    named = dict(zip(extras, more, strict=True))
    if "index" in named:
        x = take_rows(x, named["index"])
    w = w.swapaxes(1, 2) if transposed else w
    m, sizes = x.shape[0], _sizes_within(x.shape[0], group_sizes)
    out = jax.lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32)
    if "bias" in named:
        out = out + take_rows(named["bias"].astype(jnp.float32), group_of_rows(m, group_sizes))
    # What ragged_dot does with rows of no group differs between platforms.
    before = jnp.where(owned(m, group_sizes), out, 0)
    after = ACTIVATIONS[activation](before)  # of zero all of them are zero
    return tuple(a.astype(x.dtype) for a in ((after, before) if keep else (after,)))


def grouped_outer(x, dout, group_sizes):
    """[m, k], [m, n] -> [e, k, n]: for each group the product of its rows of x, transposed, with those of dout."""
    mask = owned(x.shape[0], group_sizes)
    sizes = _sizes_within(x.shape[0], group_sizes)
    x, dout = jnp.where(mask, x, 0), jnp.where(mask, dout, 0)  # rows of no group may hold anything
    # Not the transpose of a ragged_dot, which inside jax.shard_map would sum over devices, and the caller once more.
    product = jax.lax.ragged_dot_general(x, dout, sizes, _OUTER, preferred_element_type=jnp.float32)
    return (product.astype(x.dtype),)


def group_sums(rows, group_sizes):
    """[m, n] -> [e, n], float32: for each group the sum of its rows."""
    m = rows.shape[0]
    one_hot = group_of_rows(m, group_sizes)[:, None] == jnp.arange(group_sizes.shape[0])[None]
    rows = jnp.where(owned(m, group_sizes), rows, 0)
    # A product with 0 and 1 is exact in bfloat16 and its sums are float32; float32 rows are not to be rounded to it.
    return jnp.einsum(
        "me,mn->en", one_hot.astype(rows.dtype), rows, precision="highest", preferred_element_type=jnp.float32
    )


def group_of_rows(rows: int, group_sizes):
    """[rows]: the group of each row; the number of groups for rows of none."""
    return jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(rows), side="right")


def owned(rows: int, group_sizes):
    """[rows, 1]: which rows belong to a group."""
    return (jnp.arange(rows) < jnp.sum(group_sizes))[:, None]


def _sizes_within(rows: int, group_sizes):
    """int32 sizes whose sum is at most rows: rows beyond that do not exist."""
    ends = jnp.minimum(jnp.cumsum(group_sizes.astype(jnp.int32)), rows)
    return jnp.diff(ends, prepend=jnp.zeros(1, jnp.int32))
