"""Cutting a batch of tokens into the groups in which they are routed, and putting it together again."""

import functools
import logging

import jax.numpy as jnp

from jmoe.notation import Array, Bool, Float

logger = logging.getLogger("jmoe")


def group_length(B: int, T: int, *, group_size: int | None, images_per_group: int | None) -> int:
    """Returns S, the tokens per group: group_size, or those of images_per_group images, or the whole batch if smaller.

    Args:
      B: images.
      T: tokens per image.
      group_size: tokens per group; takes precedence.
      images_per_group: images per group; None with group_size None makes one group of the whole batch.
    """
    wanted = group_size or (images_per_group or B) * T
    if wanted > B * T:
        say_once(f"A group of {wanted} tokens is larger than the batch (B={B} images of T={T}): it is one group.")
    return min(wanted, B * T)


def to_groups(
    x: Float[Array, "B T D"], mask: Bool[Array, "B T"] | None, S: int
) -> tuple[Float[Array, "G S D"], Bool[Array, "G S"] | None]:
    """Cuts the tokens of a batch, image after image, into groups of S; the rest is filled with masked zeros.

    Returns:
      tokens [G, S, D], zero where masked, and a mask [G, S] that is False for padding, or None if every token is real.
    """
    B, T, D = x.shape
    padding = -(B * T) % S
    tokens = x.reshape(B * T, D)
    if mask is not None:  # not even NaN may reach another token through a product with zero
        tokens = jnp.where(mask.reshape(-1, 1), tokens, 0)
    if padding:
        say_once(
            f"Groups of {S} tokens do not divide the {B * T} tokens of a batch (B={B} images of T={T}): "
            f"{padding} tokens of padding are processed for nothing."
        )
        real = jnp.ones(B * T, bool) if mask is None else mask.reshape(-1)
        tokens, mask = jnp.pad(tokens, ((0, padding), (0, 0))), jnp.pad(real, (0, padding))
    return tokens.reshape(-1, S, D), None if mask is None else mask.reshape(-1, S)


def from_groups(y: Float[Array, "G S D"], B: int, T: int) -> Float[Array, "B T D"]:
    """Undoes `to_groups`."""
    D = y.shape[-1]
    return y.reshape(-1, D)[: B * T].reshape(B, T, D)


@functools.cache
def say_once(message: str, level: int = logging.WARNING) -> None:
    """Logs a choice that was made for the user, once a process; as a warning if it costs speed."""
    logger.log(level, message)
