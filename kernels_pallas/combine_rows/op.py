"""The public op: expert slots to tokens."""

from jaxtyping import Array, Float, Int

from kernels_pallas.combine_rows import reference, xla
from kernels_pallas.dispatching import choose
from kernels_pallas.indexing import check_index_pair

IMPLEMENTATIONS = {"xla": xla.combine_rows, "reference": reference.combine_rows}


def combine_rows(
    y: Float[Array, "m d"],
    slots: Int[Array, "n k"],
    weights: Float[Array, "n k"],
    choice: Int[Array, " m"],
    *,
    implementation: str | None = None,
) -> Float[Array, "n d"]:
    """Sums, for each token, the rows of its up to k slots by weight; a token without a slot comes out zero.

    Args:
      y: [m, d] rows of slots.
      slots: [n, k] integers, the slots that each token reads; an index outside [0, m) reads nothing. No slot may
        be named twice.
      weights: [n, k] combine weights, float32 as a rule.
      choice: [m] integers, the inverse of slots: for each slot the flat position in `slots` that names it, n * k
        where none does (see `gather_rows`). Only the gradient reads it.
      implementation: "xla", "reference", or None for the fastest here.

    Returns:
      [n, d], dtype of y, accumulated in float32: row t is sum_j weights[t, j] * y[slots[t, j]].
      Differentiable in y (a gather) and in weights (products of rows).

    Raises:
      ValueError: the shapes or dtypes do not fit together.
      NotImplementedError: there is no such implementation.
    """
    check_index_pair(slots.shape[0], slots, choice, "combine_rows")
    if weights.shape != slots.shape:
        raise ValueError(f"combine_rows wants weights of the shape of slots, {slots.shape}; it got {weights.shape}.")
    if choice.shape[0] != y.shape[0]:
        raise ValueError(f"combine_rows wants a choice for each of the {y.shape[0]} rows of y; it got {choice.shape}.")
    return choose("combine_rows", implementation, IMPLEMENTATIONS, "xla")(y, slots, weights, choice)
