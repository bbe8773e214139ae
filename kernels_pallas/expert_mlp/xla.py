"""The perceptrons of all experts in plain XLA, and their gradient, for every platform.

On CPU one expert follows the other: what is hidden is [c, f] and not [e, c, f], and that is as fast or faster. On TPU
such a loop takes longer by the compiler's count, because it copies the weights of an expert before it multiplies by
them: there, and on GPU, experts run side by side, and the hidden activation of all of them is in memory while they do.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.activations import ACTIVATIONS
from kernels_pallas.rows.xla import take_rows


def expert_mlp(x, source, w_in, b_in, w_out, b_out, *, activation):
    """[n, d] -> [m, d]; row i is the perceptron of expert i // (m / e) applied to x[source[i]], or to zeros."""

    def perceptron(source, w_in, b_in, w_out, b_out):
        rows = take_rows(x, source)
        hidden = ACTIVATIONS[activation](_product("cd,df->cf", rows, w_in) + _row(b_in)).astype(x.dtype)
        return (_product("cf,fd->cd", hidden, w_out) + _row(b_out)).astype(x.dtype)

    out = _for_each_expert(perceptron, _by_expert(source, w_in), w_in, b_in, w_out, b_out)
    return (out.reshape(-1, x.shape[1]),)


def gradients(rows, dout, w_in, b_in, w_out, *, activation):
    """The gradients in rows, w_in, b_in, w_out and b_out, given rows [m, d] of slots and the gradient of the result."""

    def perceptron(rows, dout, w_in, b_in, w_out):
        # Only what is hidden is computed again: the result, which nobody wants here, is not.
        hidden, activation_back = jax.vjp(ACTIVATIONS[activation], _product("cd,df->cf", rows, w_in) + _row(b_in))
        (dhidden,) = activation_back(_product("cd,fd->cf", dout, w_out))
        db_in = jnp.sum(dhidden, axis=-2)
        hidden, dhidden = hidden.astype(rows.dtype), dhidden.astype(rows.dtype)
        return tuple(
            gradient.astype(rows.dtype)
            for gradient in (
                _product("cf,df->cd", dhidden, w_in),
                _product("cd,cf->df", rows, dhidden),
                db_in,
                _product("cf,cd->fd", hidden, dout),
                jnp.sum(dout.astype(jnp.float32), axis=-2),
            )
        )

    drows, *dparameters = _for_each_expert(
        perceptron, _by_expert(rows, w_in), _by_expert(dout, w_in), w_in, b_in, w_out
    )
    return drows.reshape(rows.shape), *dparameters


def _for_each_expert(function, *arrays):
    """Maps a function over the leading axis of arrays: one after the other on CPU, and elsewhere all at once."""
    return lax.platform_dependent(
        *arrays,
        cpu=lambda *arrays: lax.map(lambda one: function(*one), arrays),
        default=jax.vmap(function),
    )


def _by_expert(a, w_in):
    e = w_in.shape[0]
    return a.reshape(e, a.shape[0] // e, *a.shape[1:])


def _product(subscripts, a, b):
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def _row(bias):
    return bias.astype(jnp.float32)[None]
