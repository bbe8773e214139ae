"""The public op: tokens to expert slots."""

from jaxtyping import Array, Float, Int

from kernels_pallas.dispatching import choose
from kernels_pallas.gather_rows import reference, xla
from kernels_pallas.indexing import check_index_pair

IMPLEMENTATIONS = {"xla": xla.gather_rows, "reference": reference.gather_rows}


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
      implementation: "xla", "reference", or None for the fastest here.

    Returns:
      [m, d], dtype of x: row i is x[choice[i] // k], zero where choice[i] is outside [0, n * k).
      Differentiable in x: the gradient reads `slots`, sums in float32 and returns the dtype of x.

    Raises:
      ValueError: the shapes or dtypes do not fit together.
      NotImplementedError: there is no such implementation.
    """
    check_index_pair(x.shape[0], slots, choice, "gather_rows")
    return choose("gather_rows", implementation, IMPLEMENTATIONS, "xla")(x, slots, choice)
