"""Learned position embeddings for another grid of patches, as when an image has more pixels in fine-tuning."""

import math

import numpy as np

from jmoe.errors import UserError
from jmoe.notation import Float


def zoom(x: Float[np.ndarray, "..."], shape: tuple[int, ...]) -> Float[np.ndarray, "..."]:
    """Resizes an array by linear interpolation with aligned corners, one axis after the other.

    Entry i of n is read at i * (o - 1) / (n - 1) of an axis of length o: first and last entries stay as they are. That
    is what the published trainers do (`scipy.ndimage.zoom` of order 1). Their program loses the last entry to rounding
    for some lengths, such as 28 to 14, where it writes zeros; none of the published resolutions is among them, and
    here it is kept.

    Args:
      x: floats of any shape.
      shape: of the result, an entry for each axis of x, all at least 1.

    Returns:
      the resized array in the dtype of x, computed in float64.
    """
    assert x.ndim == len(shape), f"{x.shape} and {shape} have different numbers of axes"
    resized = x.astype(np.float64)
    for axis, (o, n) in enumerate(zip(x.shape, shape, strict=True)):
        if o == n:
            continue
        place = np.arange(n) * (o - 1) / max(n - 1, 1)  # the product first: it is exact, so the last place is o - 1
        before = place.astype(np.int64)
        after = np.minimum(before + 1, o - 1)
        share = (place - before).reshape(-1, *[1] * (x.ndim - 1 - axis))
        resized = (1 - share) * resized.take(before, axis) + share * resized.take(after, axis)
    return resized.astype(x.dtype)


def resize_positions(
    positions: Float[np.ndarray, "1 N D"],
    grid: tuple[int, int],
    *,
    class_token: Float[np.ndarray, "1 1 D"] | None,
    source_grid: tuple[int, int] | None = None,
) -> Float[np.ndarray, "1 M D"]:
    """Returns learned positions for another grid of patches; the row of the class token is kept as it is.

    Args:
      positions: [1, N, D], a row for each patch in row-major order, behind that of the class token if there is one.
      grid: H, W of the result.
      class_token: the row to begin with if the result has a class token and `positions` has none; None for a result
        without one, which drops the row that `positions` may have.
      source_grid: H, W of `positions`; None for a square, which is what N can tell.

    Returns:
      [1, H * W, D], or [1, 1 + H * W, D] with a class token, in the dtype of `positions`.

    Raises:
      UserError: N rows are no such grid, neither with a class token nor without.
    """
    _, N, D = positions.shape
    height, width = source_grid or (square_grid(N)[0],) * 2
    rest = N - height * width
    if rest not in (0, 1):
        raise UserError(
            f"A table of {N} positions is no grid of {height} by {width} patches, neither with a class token "
            f"({height * width + 1} would be) nor without ({height * width})."
        )
    patches = positions[:, rest:].reshape(1, height, width, D)
    resized = zoom(patches, (1, *grid, D)).reshape(1, math.prod(grid), D)
    if class_token is None:
        return resized
    token = positions[:, :1] if rest else class_token.astype(positions.dtype)
    return np.concatenate([token, resized], axis=1)


def square_grid(N: int) -> tuple[int, bool]:
    """Returns the side of the square grid that a table of N positions is, and whether it begins with a class token.

    Raises:
      UserError: it is no square, neither with a class token nor without.
    """
    side = math.isqrt(N)
    if N < 1 or N - side**2 > 1:
        raise UserError(
            f"A table of {N} positions is no square grid, neither with a class token nor without "
            f"({side**2} or {side**2 + 1} would be). Only a model's own config can tell the sides of another grid."
        )
    return side, side**2 < N
