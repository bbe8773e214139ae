"""The two-layer perceptron of a transformer block, dense and as E experts side by side."""

import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jmoe.notation import Array, Float, Int, PRNGKeyArray
from kernels_pallas import expert_mlp, grouped_matmul

ExpertInit = Literal["identical", "independent"]

gelu = functools.partial(jax.nn.gelu, approximate=True)  # tanh form, as published


class Mlp(nnx.Module):
    """The dense twin of the experts: linear, GELU, linear, with dropout after each."""

    def __init__(self, D: int, hidden_dim: int, *, dropout: float = 0.0, dtype=None, rngs: nnx.Rngs):
        """Makes w_in [D, F], b_in [F], w_out [F, D], b_out [D], in float32.

        Args:
          D: model width.
          hidden_dim: F.
          dropout: rate.
          dtype: of the computation; that of the tokens if None.
          rngs: its stream "params" is used.
        """
        self.w_in, self.b_in, self.w_out, self.b_out = map(nnx.Param, mlp_parameters(rngs.params(), D, hidden_dim))
        self.dropout = dropout
        self.dtype = dtype

    def __call__(self, x: Float[Array, "... D"], *, key: PRNGKeyArray | None = None) -> Float[Array, "... D"]:
        """Applies it to every token; dropout is on where a key is given."""
        dtype = self.dtype or x.dtype
        keys = (None, None) if key is None else jax.random.split(key)
        w_in, b_in, w_out, b_out = (p[...].astype(dtype) for p in (self.w_in, self.b_in, self.w_out, self.b_out))
        ones = (None,) * (x.ndim - 1)
        hidden = drop(gelu(x.astype(dtype) @ w_in + b_in[ones]), self.dropout, keys[0])
        return drop(hidden @ w_out + b_out[ones], self.dropout, keys[1])


class ExpertMlp(nnx.Module):
    """E perceptrons side by side, each with its own tokens."""

    AXES: ClassVar = {"w_in": "EDF", "b_in": "EF", "w_out": "EFD", "b_out": "ED"}  # of the parameters

    def __init__(
        self,
        num_experts: int,
        D: int,
        hidden_dim: int,
        *,
        dropout: float = 0.0,
        init: ExpertInit = "identical",
        dtype=None,
        rngs: nnx.Rngs,
    ):
        """Makes w_in [E, D, F], b_in [E, F], w_out [E, F, D], b_out [E, D], in float32.

        Args:
          num_experts: E.
          D: model width.
          hidden_dim: F.
          dropout: rate.
          init: "identical" starts all experts alike and lets them share dropout masks, as published; "independent"
            draws each on its own.
          dtype: of the computation; that of the tokens if None.
          rngs: its stream "params" is used.
        """
        E = num_experts
        if init == "identical":
            one = mlp_parameters(rngs.params(), D, hidden_dim)
            parameters = [jnp.broadcast_to(p, (E, *p.shape)) for p in one]
        else:
            parameters = jax.vmap(lambda key: mlp_parameters(key, D, hidden_dim))(jax.random.split(rngs.params(), E))
        self.w_in, self.b_in, self.w_out, self.b_out = map(nnx.Param, parameters)
        self.dropout = dropout
        self.shared_dropout = init == "identical"
        self.dtype = dtype

    def __call__(self, x: Float[Array, "E N D"], *, key: PRNGKeyArray | None = None) -> Float[Array, "E N D"]:
        """Applies expert e to the rows x[e]; dropout is on where a key is given."""
        dtype = self.dtype or x.dtype
        keys = (None, None) if key is None else jax.random.split(key)
        w_in, b_in, w_out, b_out = (p[...].astype(dtype) for p in (self.w_in, self.b_in, self.w_out, self.b_out))
        shared = 0 if self.shared_dropout else None
        hidden = gelu(jnp.einsum("END,EDF->ENF", x.astype(dtype), w_in) + b_in[:, None])
        hidden = drop(hidden, self.dropout, keys[0], shared)
        return drop(jnp.einsum("ENF,EFD->END", hidden, w_out) + b_out[:, None], self.dropout, keys[1], shared)

    def ragged(
        self,
        rows: Float[Array, "N D"],
        group_sizes: Int[Array, " E"],
        *,
        keys: tuple[PRNGKeyArray, PRNGKeyArray] | None = None,
        implementation: str | None = None,
    ) -> Float[Array, "N D"]:
        """Applies each expert to its rows of a list sorted by expert; rows of no expert come out zero.

        Dropout is on where keys are given, one for hidden units and one for outputs. Its masks are drawn per row: with
        it, this form equals the other in distribution only.
        """
        dtype = self.dtype or rows.dtype
        hidden_key, output_key = keys or (None, None)
        w_in, b_in, w_out, b_out = (p[...].astype(dtype) for p in (self.w_in, self.b_in, self.w_out, self.b_out))
        multiply = functools.partial(grouped_matmul, group_sizes=group_sizes, implementation=implementation)
        hidden = drop(multiply(rows.astype(dtype), w_in, bias=b_in, activation="gelu"), self.dropout, hidden_key)
        return drop(multiply(hidden, w_out, bias=b_out), self.dropout, output_key)

    def fused(
        self,
        x: Float[Array, "N D"],
        slots: Int[Array, "N K"],
        choice: Int[Array, " M"],
        *,
        implementation: str | None = None,
    ) -> Float[Array, "M D"]:
        """Applies each expert to the tokens in its slots, and keeps nothing hidden; without dropout.

        Args:
          x: [N, D] tokens.
          slots: [N, K], of the pair of index arrays of `kernels_pallas.expert_mlp`, slots in the order of experts.
          choice: [M], the other.
          implementation: of that op.
        """
        dtype = self.dtype or x.dtype
        parameters = (p[...].astype(dtype) for p in (self.w_in, self.b_in, self.w_out, self.b_out))
        return expert_mlp(x.astype(dtype), slots, choice, *parameters, implementation=implementation)


def mlp_parameters(key: PRNGKeyArray, D: int, hidden_dim: int) -> tuple[Array, Array, Array, Array]:
    """Draws w_in, b_in, w_out, b_out of one perceptron: Xavier-uniform kernels, biases normal(1e-6), as published."""
    keys = jax.random.split(key, 4)
    kernel, bias = nnx.initializers.xavier_uniform(), nnx.initializers.normal(1e-6)
    return (
        kernel(keys[0], (D, hidden_dim), jnp.float32),
        bias(keys[1], (hidden_dim,), jnp.float32),
        kernel(keys[2], (hidden_dim, D), jnp.float32),
        bias(keys[3], (D,), jnp.float32),
    )


def drop(
    x: Float[Array, "..."], rate: float, key: PRNGKeyArray | None, shared_axis: int | None = None
) -> Float[Array, "..."]:
    """Dropout: zeroes entries at `rate` and scales the rest; off without a key. One mask serves the shared axis."""
    if key is None or rate == 0:
        return x
    shape = tuple(1 if axis == shared_axis else size for axis, size in enumerate(x.shape))
    keep = jax.random.bernoulli(key, 1 - rate, shape)
    return jnp.where(keep, x / (1 - rate), 0)
