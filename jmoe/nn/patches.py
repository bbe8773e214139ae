"""Images to tokens: patches and where they are."""

import math

import jax.numpy as jnp
from flax import nnx

from jmoe.notation import Array, Float


class PatchEmbedding(nnx.Module):
    """Cuts an image into squares and projects each linearly to a token."""

    def __init__(self, patch_size: int, channels: int, D: int, *, dtype=None, rngs: nnx.Rngs):
        """Makes kernel [p, p, channels, D], LeCun-normal, and bias [D]."""
        shape = (patch_size, patch_size, channels, D)
        init = nnx.initializers.lecun_normal(in_axis=(0, 1, 2), out_axis=3)
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((D,), jnp.float32))
        self.patch_size = patch_size
        self.dtype = dtype

    def __call__(self, images: Float[Array, "B Y X channels"]) -> Float[Array, "B H W D"]:
        """Embeds images of Y by X pixels, patches in row-major order.

        Raises:
          ValueError: the patch does not divide the image.
        """
        B, Y, X, channels = images.shape
        p = self.patch_size
        H, W = patch_grid((Y, X), p)
        dtype = self.dtype or images.dtype
        squares = images.astype(dtype).reshape(B, H, p, W, p, channels)
        kernel, bias = self.kernel[...].astype(dtype), self.bias[...].astype(dtype)
        return jnp.einsum("BHpWqc,pqcD->BHWD", squares, kernel) + bias[None, None, None]


def patch_grid(image_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Returns H, W, the patches of an image of that many pixels.

    Raises:
      ValueError: the patch does not divide the image.
    """
    height, width = image_size
    if height % patch_size or width % patch_size:
        nearest = [max(1, round(side / patch_size)) * patch_size for side in image_size]
        raise ValueError(
            f"patch_size={patch_size} does not divide images of {height} by {width} pixels. "
            f"Use images of {nearest[0]} by {nearest[1]}, or another patch_size."
        )
    return height // patch_size, width // patch_size


def sincos2d(H: int, W: int, D: int, temperature: float = 10_000.0) -> Float[Array, "T D"]:
    """Fixed positions: sines and cosines of x, then of y, at D / 4 frequencies from 1 to 1 / temperature (MoCo v3).

    Raises:
      ValueError: D is not a multiple of 4, or too small for two frequencies.
    """
    if D % 4 or D < 8:
        raise ValueError(f"sincos2d positions want a model width that is a multiple of 4, at least 8; it got {D}.")
    y, x = jnp.mgrid[:H, :W].reshape(2, -1)  # [T] each
    omega = jnp.exp(-math.log(temperature) * jnp.arange(D // 4) / (D // 4 - 1))
    x, y = x[:, None] * omega[None], y[:, None] * omega[None]  # [T, D / 4]
    return jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=1)
