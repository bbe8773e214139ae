"""Modules with parameters drawn by NumPy: none is zero or alike by design, and no initialisation is compiled."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def drawn(make, seed: int = 0, scale: float = 0.4):
    """The module that make(rngs=...) returns, with normal parameters of that standard deviation."""
    draw = np.random.default_rng(seed)
    graph, state = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    state = jax.tree.map(lambda p: jnp.asarray(draw.normal(scale=scale, size=p.shape), p.dtype), state)
    return nnx.merge(graph, state)


def normal(*shape: int, seed: int = 1, dtype=jnp.float32) -> jax.Array:
    """Standard normal values."""
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)
