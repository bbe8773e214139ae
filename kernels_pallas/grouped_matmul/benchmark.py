"""Times of grouped_matmul beside one dense matrix multiply of as many FLOPs."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels_pallas.cases import Case
from kernels_pallas.grouped_matmul.op import grouped_matmul
from kernels_pallas.timing import OpTimes, default_dtype, time_op, with_gradients


def benchmark(
    case: Case, implementations: Sequence[str] | None = None, runs: int = 20, dtype: str | None = None
) -> OpTimes:
    """Times the op, forward and with its gradients in rows and matrices, as the first layer of the experts uses it.

    There is a row for every choice of every token, as in a list sorted by expert; those that were dropped stand at its
    end and belong to no expert. The dense multiply is of the others alone.

    Args:
      case: the size.
      implementations: names; None for all that can run here, without the slow "reference".
      runs: how often each is timed.
      dtype: of rows and matrices; None for float32 on CPU, bfloat16 elsewhere.

    Raises:
      NotImplementedError: a named implementation is unknown, or cannot run here; it says why.
    """
    dtype, rows = dtype or default_dtype(), case.rows
    D, F, E = case.width, case.hidden_dim, case.num_experts
    x = jax.random.normal(jax.random.key(0), (rows.slots.size, D), dtype)
    w = jax.random.normal(jax.random.key(1), (E, D, F), dtype)
    dout = jax.random.normal(jax.random.key(2), (rows.filled, F), dtype)
    dense = (x[: rows.filled], w[0])
    return time_op(
        "grouped_matmul",
        case,
        grouped_matmul,
        (x, w),
        (jnp.asarray(rows.group_sizes),),
        bound="dense",
        bounds={"forward": (jnp.matmul, dense), "both": with_gradients(jnp.matmul, dense, (), dout)},
        implementations=implementations,
        runs=runs,
    )
