import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.train.objective import mix_with_next, mixup, sigmoid_cross_entropy, softmax_cross_entropy

GOLDENS = pathlib.Path(__file__).parent.parent / "goldens"  # the "config" of each file names its origin
LOSSES = {"softmax_xent": softmax_cross_entropy, "sigmoid_xent": sigmoid_cross_entropy}


def golden(name):
    with np.load(GOLDENS / f"{name}.npz", allow_pickle=False) as file:
        return {key: jnp.asarray(file[key]) for key in file if key != "config"} | {"config": str(file["config"])}


@pytest.mark.parametrize("labels", ["onehot", "multi", "soft"])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradient_are_the_published_ones(name, labels):
    data = golden("loss_all_m2")
    targets = data[f"labels_{labels}"]
    np.testing.assert_allclose(
        LOSSES[name](data["logits"], targets), data[f"{name}/{labels}/train"], rtol=1e-5, atol=2e-6
    )
    gradient = jax.grad(lambda z: LOSSES[name](z, targets).mean())(data["logits"])
    expected = data[f"{name}/{labels}/grad_mean_train"]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5 * float(abs(expected).max()))


def test_softmax_by_hand():
    logits = jnp.log(jnp.array([[1.0, 2.0, 5.0]]))  # probabilities 1/8, 2/8, 5/8
    loss = softmax_cross_entropy(logits, jnp.array([[0.0, 0.25, 0.75]]))
    np.testing.assert_allclose(loss, [-0.25 * np.log(2 / 8) - 0.75 * np.log(5 / 8)], rtol=1e-6)


def test_sigmoid_is_summed_over_classes():
    loss = sigmoid_cross_entropy(jnp.zeros((2, 7)), jnp.eye(2, 7))
    np.testing.assert_allclose(loss, [7 * np.log(2)] * 2, rtol=1e-6)


@pytest.mark.parametrize("loss", LOSSES.values())
def test_sure_and_wrong_is_large_but_finite_and_bfloat16_logits_give_float32(loss):
    value = loss(jnp.array([[300.0, -300.0]], jnp.bfloat16), jnp.array([[0.0, 1.0]]))
    assert value.dtype == jnp.float32
    assert 500 < float(value[0]) < 700


@pytest.mark.parametrize("name", ["mixup_batch", "mixup_example"])
def test_mixing_with_recorded_weights_is_the_published_one(name):
    data = golden(name)
    weights = -jnp.sort(-data["dirichlet_sample"], axis=-1)
    assert json.loads(data["config"])["size"] == weights.shape[1]
    for x in ("images", "labels"):
        np.testing.assert_allclose(mix_with_next(data[x], weights), data[f"mixed_{x}"], rtol=1e-5, atol=2e-6)


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
