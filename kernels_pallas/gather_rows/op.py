"""The public op: tokens to expert slots."""

import functools

import jax
from jaxtyping import Array, Float, Int

from kernels_pallas.gather_rows import reference
from kernels_pallas.indexing import check_index_pair, no_gradients, rows_of
from kernels_pallas.per_platform import check_name
from kernels_pallas.rows import gather_sum


def gather_rows(
    x: Float[Array, "n d"],
    slots: Int[Array, "n k"],
    choice: Int[Array, " m"],
    *,
    implementation: str | None = None,
) -> Float[Array, "m d"]:
    """Copies each token's row into the slots that it fills; an empty slot comes out zero.

    The two index arrays say the same thing from both sides, which is what makes the gradient a gather as well:
    slot `slots[t, j]` holds token t, and `choice[i] = t * k + j` for the i-th slot. `combine_rows` takes the same pair.

    Args:
      x: [n, d] rows of tokens.
      slots: [n, k] integers, the up to k slots that each token fills; an index outside [0, m) means none.
      choice: [m] integers, for each slot the flat position in `slots` that names it; n * k for an empty slot.
      implementation: "pallas", "xla", "reference", or None for the fastest on the platform that it is compiled for
        (kernels_pallas/README.md lists them; "interpret-tpu" and "interpret-gpu" run a kernel step by step, for tests).

    Returns:
      [m, d], dtype of x: row i is x[choice[i] // k], zero where choice[i] is outside [0, n * k).
      Differentiable in x: the gradient reads `slots`, sums in float32 and returns the dtype of x.

    Raises:
      ValueError: the shapes or dtypes do not fit together.
      NotImplementedError: the named implementation is unknown, or cannot take these arguments; it says why.
    """
    check_index_pair(x.shape[0], slots, choice, "gather_rows")
    check_name("gather_rows", implementation)
    if implementation == "reference":
        return reference.gather_rows(x, slots, choice)
    return _gather_rows(x, slots, choice, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _gather_rows(x, slots, choice, implementation):
    return gather_sum(x, rows_of(slots, choice)[:, None], implementation=implementation)


def _forward(x, slots, choice, implementation):
    return _gather_rows(x, slots, choice, implementation), (slots, choice)


def _backward(implementation, residuals, dy):
    slots, choice = residuals
    # A token's gradient is the sum over the slots that it fills: they are listed in its row of `slots`.
    dx = gather_sum(dy, slots, implementation=implementation)
    return dx, *no_gradients(slots, choice)


_gather_rows.defvjp(_forward, _backward)
