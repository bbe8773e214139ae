"""gather_rows in plain XLA: one gather forward, k gathers backward, never a scatter of rows."""

import jax
import numpy as np

from kernels_pallas.combine_rows.xla import weighted_sum
from kernels_pallas.indexing import take_rows


@jax.custom_vjp
def gather_rows(x, slots, choice):
    """[n, d] -> [m, d]; out[i] = x[choice[i] // k]."""
    return take_rows(x, choice // slots.shape[1])


def _forward(x, slots, choice):
    return gather_rows(x, slots, choice), (slots, choice)


def _backward(residuals, dy):
    slots, choice = residuals
    # A token's gradient is the sum over the slots that it fills: they are listed in its row of `slots`.
    return weighted_sum(dy, slots, None), *(np.zeros(i.shape, jax.dtypes.float0) for i in (slots, choice))


gather_rows.defvjp(_forward, _backward)
