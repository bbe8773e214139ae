import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.train.mixup import mixup


def test_mixup_mixes_images_and_labels_alike_with_their_successors():
    images = jnp.arange(5.0)[:, None, None, None] * jnp.ones((1, 2, 3, 1))
    mixed, labels = jax.jit(mixup, static_argnums=3)(jax.random.key(1), images, jnp.eye(5), 0.5)
    own = labels[0, 0]
    assert 0.5 <= own < 1
    expected = own * np.eye(5) + (1 - own) * np.roll(np.eye(5), 1, axis=1)  # the label after one's own, cyclically
    np.testing.assert_allclose(labels, expected, atol=1e-6)
    np.testing.assert_allclose(mixed[:, 1, 2, 0], expected @ np.arange(5.0), atol=1e-5)


def test_mixup_weights_have_the_mean_of_the_sorted_dirichlet():
    # For concentration 1 the larger of the two weights is uniform on [1/2, 1]: mean 3/4, standard error 0.0032.
    keys = jax.random.split(jax.random.key(0), 2000)
    images, labels = jnp.zeros((2, 1, 1, 1)), jnp.eye(2)
    own = jax.vmap(lambda key: mixup(key, images, labels, 1.0)[1][0, 0])(keys)
    assert abs(float(own.mean()) - 0.75) < 0.015
    assert float(own.min()) >= 0.5


def test_mixup_of_a_single_image_is_the_image():
    image = jnp.full((1, 2, 2, 1), 0.25)
    mixed, labels = mixup(jax.random.key(0), image, jnp.ones((1, 3)), 0.2)
    np.testing.assert_allclose(mixed, image, rtol=1e-6)
    np.testing.assert_allclose(labels, jnp.ones((1, 3)), rtol=1e-6)


def test_mixup_without_concentration_is_refused():
    with pytest.raises(ValueError, match="mixup needs a positive concentration, but got 0"):
        mixup(jax.random.key(0), jnp.zeros((2, 1, 1, 1)), jnp.eye(2), 0.0)
