"""Times of expert_mlp beside one dense perceptron over as many rows."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kernels_pallas.cases import Case
from kernels_pallas.expert_mlp.op import expert_mlp
from kernels_pallas.timing import OpTimes, default_dtype, time_op, with_gradients


def benchmark(
    case: Case, implementations: Sequence[str] | None = None, runs: int = 20, dtype: str | None = None
) -> OpTimes:
    """Times the op, forward and with its gradients in tokens and parameters.

    The dense perceptron keeps what is hidden for its gradient; the op computes it again.

    Args:
      case: the size.
      implementations: names; None for all that can run here, without the slow "reference".
      runs: how often each is timed.
      dtype: of tokens and parameters; None for float32 on CPU, bfloat16 elsewhere.

    Raises:
      NotImplementedError: a named implementation is unknown, or cannot run here; it says why.
    """
    dtype, rows = dtype or default_dtype(), case.rows
    D, F, E = case.width, case.hidden_dim, case.num_experts
    n, m = len(rows.slots), len(rows.choice)
    shapes = ((n, D), (E, D, F), (E, F), (E, F, D), (E, D), (m, D))
    x, w_in, b_in, w_out, b_out, dense_rows = (
        jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)
    )

    def call(x, w_in, b_in, w_out, b_out, slots, choice, implementation=None):
        return expert_mlp(x, slots, choice, w_in, b_in, w_out, b_out, implementation=implementation)

    dense = (dense_rows, w_in[0], b_in[0], w_out[0], b_out[0])
    return time_op(
        "expert_mlp",
        case,
        call,
        (x, w_in, b_in, w_out, b_out),
        (jnp.asarray(rows.slots), jnp.asarray(rows.choice)),
        bound="dense",
        bounds={"forward": (_perceptron, dense), "both": with_gradients(_perceptron, dense, (), dense_rows)},
        implementations=implementations,
        runs=runs,
    )


def _perceptron(x, w_in, b_in, w_out, b_out):
    return jax.nn.gelu(x @ w_in + b_in[None], approximate=True) @ w_out + b_out[None]
