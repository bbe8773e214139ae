"""The public op: from tokens to what their experts make of them, in slots."""

import functools

import jax
from jaxtyping import Array, Float, Int

from kernels_pallas.activations import ACTIVATIONS, Activation
from kernels_pallas.expert_mlp import reference, xla
from kernels_pallas.indexing import check_index_pair, no_gradients, rows_of
from kernels_pallas.per_platform import PerPlatform, check_name
from kernels_pallas.rows import gather_sum

_expert_mlp = PerPlatform(
    "expert_mlp",
    xla=xla.expert_mlp,
    kernels={"tpu": "kernels_pallas.expert_mlp.tpu"},
    preferred=("tpu",),
)
KERNEL = _expert_mlp


def expert_mlp(
    x: Float[Array, "n d"],
    slots: Int[Array, "n k"],
    choice: Int[Array, " m"],
    w_in: Float[Array, "e d f"],
    b_in: Float[Array, "e f"],
    w_out: Float[Array, "e f d"],
    b_out: Float[Array, "e d"],
    *,
    activation: Activation = "gelu",
    implementation: str | None = None,
) -> Float[Array, "m d"]:
    """Gathers each token's row into the slots that it fills, and applies to each slot the perceptron of its expert.

    What `gather_rows`, two batched products and an activation do, in one pass: the kernel writes neither the gathered
    rows nor the hidden activation [m, f] to the memory of the device. `combine_rows` takes the result, with the same
    pair of indices. Slots are in the order of their experts, as many for each: with c = m / e, slot i is of expert
    i // c.

    Args:
      x: [n, d] rows of tokens, float32 or bfloat16.
      slots: [n, k] integers, the up to k slots that each token fills; an index outside [0, m) means none. Only the
        gradient reads it.
      choice: [m] integers, for each slot the flat position in `slots` that names it; n * k for an empty slot.
      w_in: [e, d, f], of the dtype of x, as the other parameters.
      b_in: [e, f].
      w_out: [e, f, d].
      b_out: [e, d].
      activation: "gelu" (tanh form), "relu" or "silu".
      implementation: "pallas" (TPU), "xla", "reference", or None for the fastest on the platform that it is compiled
        for ("interpret-tpu" runs the kernel step by step, for tests).

    Returns:
      [m, d], dtype of x: row i is activation(x[choice[i] // k] @ w_in[e] + b_in[e]) @ w_out[e] + b_out[e] with
      e = i // c. An empty slot holds what its expert makes of a row of zeros, which nobody reads. Sums are float32, and
      the hidden activation is rounded to the dtype of x.
      Differentiable in x and the parameters. Nothing hidden is kept for the gradient: it gathers the rows and computes
      the hidden activation again, and holds that of this one call in memory while it does.

    Raises:
      ValueError: the shapes or dtypes do not fit together, or there is no such activation.
      NotImplementedError: the named implementation is unknown, or cannot take these arguments; it says why.
    """
    check_index_pair(x.shape[0], slots, choice, "expert_mlp")
    parameters = (w_in, b_in, w_out, b_out)
    shapes = [a.shape for a in (x, *parameters)]
    e, d, f = w_in.shape if w_in.ndim == 3 else (0, 0, 0)
    if shapes != [(x.shape[0], d), (e, d, f), (e, f), (e, f, d), (e, d)]:
        raise ValueError(
            "expert_mlp wants x [n, d], w_in [e, d, f], b_in [e, f], w_out [e, f, d] and b_out [e, d]; it got "
            f"{', '.join(map(str, shapes[:-1]))} and {shapes[-1]}."
        )
    if e == 0 or choice.shape[0] % e:
        raise ValueError(
            f"expert_mlp wants the same number of slots for each expert; it got {choice.shape[0]} slots for {e} "
            "experts."
        )
    if any(a.dtype != x.dtype for a in parameters):
        raise ValueError(
            f"expert_mlp wants parameters of the dtype of x, {x.dtype}; it got "
            f"{', '.join(str(a.dtype) for a in parameters)}."
        )
    if activation is None or activation not in ACTIVATIONS:
        known = ", ".join(repr(name) for name in ACTIVATIONS if name)
        raise ValueError(f"expert_mlp has no activation {activation!r}; use one of {known}.")
    check_name("expert_mlp", implementation)
    if implementation == "reference":
        return reference.expert_mlp(x, slots, choice, *parameters, activation=activation)
    return _differentiable(x, slots, choice, *parameters, activation, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def _differentiable(x, slots, choice, w_in, b_in, w_out, b_out, activation, implementation):
    arrays = (x, rows_of(slots, choice), w_in, b_in, w_out, b_out)
    return _expert_mlp(*arrays, activation=activation, implementation=implementation)[0]


def _forward(x, slots, choice, w_in, b_in, w_out, b_out, activation, implementation):
    out = _differentiable(x, slots, choice, w_in, b_in, w_out, b_out, activation, implementation)
    return out, (x, slots, choice, w_in, b_in, w_out)


def _backward(activation, implementation, residuals, dout):
    x, slots, choice, w_in, b_in, w_out = residuals
    # What follows from x is computed again, and only once the gradient is there. XLA would otherwise see that the
    # forward pass computes the same, and keep it.
    x, dout = jax.lax.optimization_barrier((x, dout))
    rows = gather_sum(x, rows_of(slots, choice)[:, None], implementation=implementation)
    drows, *dparameters = xla.gradients(rows, dout, w_in, b_in, w_out, activation=activation)
    # A token's gradient is the sum over the slots that it fills: they are listed in its row of `slots`.
    dx = gather_sum(drows, slots, implementation=implementation)
    return dx, *no_gradients(slots, choice), *dparameters


_differentiable.defvjp(_forward, _backward)
