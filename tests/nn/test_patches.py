import functools
import re

import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.nn.patches import PatchEmbedding, patch_grid, sincos2d
from tests.drawn import drawn, normal
from tests.tolerance import tolerance

B, H, W, P, D = 2, 2, 3, 4, 5


def test_each_square_is_projected_to_its_token():
    embed, images = drawn(functools.partial(PatchEmbedding, P, 3, D)), normal(B, H * P, W * P, 3)
    tokens = embed(images)
    kernel, bias, pixels = (np.asarray(a, np.float64) for a in (embed.kernel, embed.bias, images))
    for b in range(B):
        for row in range(H):
            for column in range(W):
                square = pixels[b, row * P : (row + 1) * P, column * P : (column + 1) * P]
                expected = (square[..., None] * kernel).sum(axis=(0, 1, 2)) + bias
                np.testing.assert_allclose(tokens[b, row, column], expected, **tolerance(jnp.float32, 10))


@pytest.mark.parametrize("temperature", [10_000.0, 1_000.0])
def test_fixed_positions_are_sines_and_cosines_of_column_and_row(temperature):
    D, q = 12, 3
    positions = np.asarray(sincos2d(H, W, D, temperature))
    assert positions.shape == (H * W, D)
    omega = [temperature ** (-i / (q - 1)) for i in range(q)]
    for row in range(H):
        for column in range(W):
            expected = [f(p * w) for p in (column, row) for f in (np.sin, np.cos) for w in omega]
            np.testing.assert_allclose(positions[row * W + column], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("D", [4, 10])
def test_fixed_positions_of_another_width_are_refused(D):
    message = f"sincos2d positions want a model width that is a multiple of 4, at least 8; it got {D}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sincos2d(H, W, D)


def test_the_grid_counts_patches_and_names_the_nearest_image_that_has_one():
    assert patch_grid((224, 32), 16) == (14, 2)
    message = "patch_size=16 does not divide images of 225 by 5 pixels. Use images of 224 by 16, or another patch_size."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        patch_grid((225, 5), 16)
