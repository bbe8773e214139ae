"""Efficient ensembles (E3, arXiv:2110.03360): M copies of every image, and what M predictions for it are together.

Wherever members come in one axis, those of an image follow each other: image 0 member 0, image 0 member 1, ...
"""

from typing import Literal

import jax
import jax.numpy as jnp

from jmoe.notation import Array, Float, Int, Shaped

Likelihood = Literal["softmax", "sigmoid"]


def repeat_members(x: Shaped[Array, "B ..."], members: int) -> Shaped[Array, "N ..."]:
    """[B, ...] -> [B * M, ...]: every row M times in a row."""
    return x if members == 1 else jnp.repeat(x, members, axis=0)


def mean_of_members(x: Float[Array, "N ..."], members: int) -> Float[Array, "B ..."]:
    """[B * M, ...] -> [B, ...]: the mean of an image's M rows."""
    return x if members == 1 else jnp.mean(x.reshape(-1, members, *x.shape[1:]), axis=1)


def task_loss(
    logits: Float[Array, "N classes"], labels: Float[Array, "N classes"], likelihood: Likelihood
) -> Float[Array, " N"]:
    """Cross-entropy of each row, in float32; what training minimises, every member for itself.

    "softmax": minus the sum over classes of label * log softmax(logits). "sigmoid": the sum, not the mean, over classes
    of the binary cross-entropy between label and sigmoid(logit): each class is a question of its own (V-MoE).
    """
    return prediction_loss(logits, labels, 1, likelihood)


def prediction_loss(
    logits: Float[Array, "N classes"], labels: Float[Array, "B classes"], members: int, likelihood: Likelihood
) -> Float[Array, " B"]:
    """Cross-entropy of the mean probability of an image's members: the loss of an ensemble in evaluation.

    Args:
      logits: [B * M, classes].
      labels: [B, classes], from 0 to 1. A class of label 0 adds nothing, however improbable.
      members: M.
      likelihood: "softmax" or "sigmoid", as in `task_loss`, whose value this is for one member.
    """
    log_p = log_probabilities(logits, members, likelihood)
    loss = -jnp.sum(_product(labels, log_p), axis=-1)
    if likelihood == "sigmoid":
        loss -= jnp.sum(_product(1 - labels, log_probabilities(-logits, members, likelihood)), axis=-1)
    return loss


def log_probabilities(
    logits: Float[Array, "N classes"], members: int, likelihood: Likelihood
) -> Float[Array, "B classes"]:
    """Log of the mean over members of the probability of each class, by softmax or by sigmoid.

    Args:
      logits: [B * M, classes].
      members: M.
      likelihood: what makes probabilities of logits.
    """
    logits = logits.astype(jnp.float32)
    log_p = jax.nn.log_softmax(logits) if likelihood == "softmax" else jax.nn.log_sigmoid(logits)
    if members == 1:
        return log_p
    return jax.nn.logsumexp(log_p.reshape(-1, members, log_p.shape[-1]), axis=1) - jnp.log(members)


def predictions(logits: Float[Array, "N classes"], members: int, likelihood: Likelihood) -> Int[Array, " B"]:
    """The class of the largest mean probability of each image; the first of equals."""
    return jnp.argmax(logits if members == 1 else log_probabilities(logits, members, likelihood), axis=-1)


def _product(labels: Float[Array, "B classes"], log_p: Float[Array, "B classes"]) -> Float[Array, "B classes"]:
    return jnp.where(labels == 0, 0.0, labels * log_p)  # not NaN for 0 * log(0)
