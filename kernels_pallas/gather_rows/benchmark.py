"""Times of gather_rows beside a copy of as many bytes as it must move."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels_pallas.cases import Case
from kernels_pallas.gather_rows.op import gather_rows
from kernels_pallas.timing import OpTimes, copy_work, default_dtype, time_op


def benchmark(
    case: Case, implementations: Sequence[str] | None = None, runs: int = 20, dtype: str | None = None
) -> OpTimes:
    """Times the op, forward and with its gradient.

    Forward, the rows of tokens that have a slot are read at least once, and every slot is written; backward, every
    filled slot is read, and the gradient of every token written. Indices are small and not counted.

    Args:
      case: the size.
      implementations: names; None for all that can run here, without the slow "reference".
      runs: how often each is timed.
      dtype: of the rows; None for float32 on CPU, bfloat16 elsewhere.

    Raises:
      NotImplementedError: a named implementation is unknown, or cannot run here; it says why.
    """
    dtype, rows = dtype or default_dtype(), case.rows
    (n, _), m = rows.slots.shape, len(rows.choice)
    x = jax.random.normal(jax.random.key(0), (n, case.width), dtype)
    forward, backward = rows.served + m, rows.filled + n
    return time_op(
        "gather_rows",
        case,
        gather_rows,
        (x,),
        (jnp.asarray(rows.slots), jnp.asarray(rows.choice)),
        bound="copy",
        bounds={
            "forward": copy_work(forward, case.width, dtype),
            "both": copy_work(forward + backward, case.width, dtype),
        },
        implementations=implementations,
        runs=runs,
    )
