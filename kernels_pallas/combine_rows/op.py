"""The public op: expert slots to tokens."""

import functools

import jax
from jaxtyping import Array, Float, Int

from kernels_pallas.combine_rows import reference
from kernels_pallas.indexing import check_index_pair, no_gradients, rows_of
from kernels_pallas.per_platform import check_name
from kernels_pallas.rows import gather_dot, gather_sum
from kernels_pallas.rows.xla import take_rows


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
      implementation: "pallas", "xla", "reference", or None for the fastest on the platform that it is compiled for
        (kernels_pallas/README.md lists them; "interpret-tpu" and "interpret-gpu" run a kernel step by step, for tests).

    Returns:
      [n, d], dtype of y, accumulated in float32: row t is sum_j weights[t, j] * y[slots[t, j]].
      Differentiable in y (a gather) and in weights (products of rows), both from one pass over the rows.

    Raises:
      ValueError: the shapes or dtypes do not fit together.
      NotImplementedError: the named implementation is unknown, or cannot take these arguments; it says why.
    """
    check_index_pair(slots.shape[0], slots, choice, "combine_rows")
    if weights.shape != slots.shape:
        raise ValueError(f"combine_rows wants weights of the shape of slots, {slots.shape}; it got {weights.shape}.")
    if choice.shape[0] != y.shape[0]:
        raise ValueError(f"combine_rows wants a choice for each of the {y.shape[0]} rows of y; it got {choice.shape}.")
    check_name("combine_rows", implementation)
    if implementation == "reference":
        return reference.combine_rows(y, slots, weights, choice)
    return _combine_rows(y, slots, weights, choice, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _combine_rows(y, slots, weights, choice, implementation):
    del choice
    return gather_sum(y, slots, weights, implementation=implementation)


def _forward(y, slots, weights, choice, implementation):
    return _combine_rows(y, slots, weights, choice, implementation), (y, slots, weights, choice)


def _backward(implementation, residuals, dout):
    y, slots, weights, choice = residuals
    # A slot is read by one token only, so its gradient is that token's, times the weight it was read with; and the
    # product of the two rows is the gradient of that weight.
    weight = take_rows(weights.reshape(-1), choice)
    dy, products = gather_dot(dout, rows_of(slots, choice), weight, y, implementation=implementation)
    dweights = take_rows(products, slots).astype(weights.dtype)
    no_slots, no_choice = no_gradients(slots, choice)
    return dy, no_slots, dweights, no_choice


_combine_rows.defvjp(_forward, _backward)
