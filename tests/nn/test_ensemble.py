import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.nn.ensemble import log_probabilities, mean_of_members, prediction_loss, predictions, repeat_members, task_loss
from tests.drawn import normal

B, M, CLASSES = 3, 2, 5
LIKELIHOODS = ("softmax", "sigmoid")


def test_softmax_by_hand():
    logits = jnp.log(jnp.array([[1.0, 2.0, 5.0]]))  # probabilities 1/8, 2/8, 5/8
    loss = task_loss(logits, jnp.array([[0.0, 0.25, 0.75]]), "softmax")
    np.testing.assert_allclose(loss, [-0.25 * np.log(2 / 8) - 0.75 * np.log(5 / 8)], rtol=1e-6)


def test_sigmoid_is_summed_over_classes():
    loss = task_loss(jnp.zeros((2, 7)), jnp.eye(2, 7), "sigmoid")
    np.testing.assert_allclose(loss, [7 * np.log(2)] * 2, rtol=1e-6)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_sure_and_wrong_is_large_but_finite_and_bfloat16_logits_give_float32(likelihood):
    logits, labels = jnp.array([[300.0, -300.0]], jnp.bfloat16), jnp.array([[0.0, 1.0]])
    value, gradient = jax.value_and_grad(lambda z: task_loss(z, labels, likelihood)[0])(logits)
    assert value.dtype == jnp.float32
    assert 500 < float(value) < 700
    assert np.isfinite(np.asarray(gradient, np.float32)).all()


def test_a_prediction_is_that_of_the_mean_probability():
    logits = jnp.log(jnp.array([[0.9, 0.06, 0.04], [0.1, 0.5, 0.4]]))  # one image; the mean is 0.5, 0.28, 0.22
    np.testing.assert_allclose(log_probabilities(logits, 2, "softmax"), np.log([[0.5, 0.28, 0.22]]), rtol=1e-5)
    assert predictions(logits, 2, "softmax").tolist() == [0]
    loss = prediction_loss(logits, jnp.array([[0.0, 1.0, 0.0]]), 2, "softmax")
    np.testing.assert_allclose(loss, [-np.log(0.28)], rtol=1e-5)


def test_sigmoids_are_averaged_on_both_sides():
    logits = normal(B * M, CLASSES)
    labels = jax.nn.one_hot(jnp.arange(B), CLASSES)
    p = 1 / (1 + np.exp(-np.asarray(logits, np.float64))).reshape(B, M, CLASSES)
    p, q = p.mean(axis=1), (1 - p).mean(axis=1)
    expected = -(labels * np.log(p) + (1 - labels) * np.log(q)).sum(axis=-1)
    np.testing.assert_allclose(prediction_loss(logits, labels, M, "sigmoid"), expected, rtol=1e-5)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_members_that_agree_are_like_one(likelihood):
    logits, labels = normal(B, CLASSES), jax.nn.softmax(normal(B, CLASSES, seed=1))
    copies = repeat_members(logits, M)
    assert copies.shape == (B * M, CLASSES)
    np.testing.assert_array_equal(copies[0], copies[1])
    one, many = (prediction_loss(z, labels, m, likelihood) for z, m in ((logits, 1), (copies, M)))
    np.testing.assert_allclose(one, many, rtol=1e-5)
    np.testing.assert_allclose(one, task_loss(logits, labels, likelihood), rtol=1e-6)
    np.testing.assert_allclose(mean_of_members(copies, M), logits, rtol=1e-6)


def test_an_impossible_class_that_is_not_the_label_adds_nothing():
    loss = prediction_loss(jnp.array([[0.0, -jnp.inf]]), jnp.array([[1.0, 0.0]]), 1, "softmax")
    np.testing.assert_array_equal(loss, [0.0])
