"""Mixup."""

import jax
import jax.numpy as jnp

from jmoe.notation import Array, Float, Key


def mixup(
    key: Key[Array, ""],
    images: Float[Array, "B H W channels"],
    labels: Float[Array, "B classes"],
    concentration: float,
) -> tuple[Float[Array, "B H W channels"], Float[Array, "B classes"]]:
    """Mixes each image and its label with the next of the batch (Zhang et al. 2018, arXiv:1710.09412).

    The two weights are one Dirichlet(concentration, concentration) draw for the whole batch; the larger is the image's
    own, so that the mixture stays nearer to it. `concentration` must be positive.
    """
    if concentration <= 0:
        raise ValueError(f"mixup needs a positive concentration, but got {concentration}; leave it out for no mixup.")
    weights = jax.random.dirichlet(key, jnp.full(2, concentration, jnp.float32))
    weights = jnp.sort(weights, descending=True)[None]
    return mix_with_next(images, weights), mix_with_next(labels, weights)


def mix_with_next(x: Float[Array, "B ..."], weights: Float[Array, "#B n"]) -> Float[Array, "B ..."]:
    """The sum over j < n of weights[i, j] * x[(i + j) mod B]; one row of weights serves the whole batch."""
    weights = weights.reshape(*weights.shape, *(1,) * (x.ndim - 1))  # [1 or B, n, 1, ...]
    return sum((weights[:, j] * jnp.roll(x, -j, axis=0) for j in range(weights.shape[1])), jnp.zeros_like(x))
