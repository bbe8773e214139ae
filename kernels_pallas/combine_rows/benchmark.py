"""Times of combine_rows beside a copy of as many bytes as it must move."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels_pallas.cases import Case
from kernels_pallas.combine_rows.op import combine_rows
from kernels_pallas.timing import OpTimes, copy_work, default_dtype, time_op


def benchmark(
    case: Case, implementations: Sequence[str] | None = None, runs: int = 20, dtype: str | None = None
) -> OpTimes:
    """Times the op, forward and with its gradients in rows and weights.

    Forward, every filled slot is read, and every token written; backward, the gradients of tokens that have a slot are
    read at least once, every filled slot again for the gradient of its weight, and the gradient of every slot is
    written. Indices and weights are small and not counted.

    Args:
      case: the size.
      implementations: names; None for all that can run here, without the slow "reference".
      runs: how often each is timed.
      dtype: of the rows; None for float32 on CPU, bfloat16 elsewhere. Weights are float32.

    Raises:
      NotImplementedError: a named implementation is unknown, or cannot run here; it says why.
    """
    dtype, rows = dtype or default_dtype(), case.rows
    (n, k), m = rows.slots.shape, len(rows.choice)
    y = jax.random.normal(jax.random.key(0), (m, case.width), dtype)
    weights = jax.random.uniform(jax.random.key(1), (n, k))
    forward, backward = rows.filled + n, rows.served + rows.filled + m

    def function(y, weights, slots, choice, implementation):
        return combine_rows(y, slots, weights, choice, implementation=implementation)

    return time_op(
        "combine_rows",
        case,
        function,
        (y, weights),
        (jnp.asarray(rows.slots), jnp.asarray(rows.choice)),
        bound="copy",
        bounds={
            "forward": copy_work(forward, case.width, dtype),
            "both": copy_work(forward + backward, case.width, dtype),
        },
        implementations=implementations,
        runs=runs,
    )
