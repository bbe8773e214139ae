"""The definition of expert_mlp: rows gathered by a 0/1 matrix, and a perceptron for each expert in turn."""

import jax.numpy as jnp

from kernels_pallas.activations import ACTIVATIONS
from kernels_pallas.gather_rows import reference


def expert_mlp(x, slots, choice, w_in, b_in, w_out, b_out, *, activation):
    """[n, d] -> [m, d]; the e-th m / e rows by the e-th perceptron, float32 from the first product to the result."""
    rows = reference.gather_rows(x, slots, choice).reshape(w_in.shape[0], choice.shape[0] // w_in.shape[0], x.shape[1])
    outputs = []
    for row, *parameters in zip(rows, w_in, b_in, w_out, b_out, strict=True):
        row, w1, b1, w2, b2 = (a.astype(jnp.float32) for a in (row, *parameters))
        hidden = ACTIVATIONS[activation](jnp.dot(row, w1, precision="highest") + b1[None])
        outputs.append(jnp.dot(hidden, w2, precision="highest") + b2[None])
    return jnp.concatenate(outputs).astype(x.dtype)
