"""Losses in training and in evaluation, of single networks and of ensembles."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.nn.ensemble import Likelihood, prediction_loss, predictions, repeat_members, task_loss
from tests.goldens.case import Case
from tests.goldens.replays.parts import select, with_prefix


def replay(case: Case) -> dict[str, np.ndarray]:
    return jax.device_get(jax.jit(functools.partial(losses, case.config["ensemble_size"]))(case.arrays))


def losses(members: int, arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """By each loss, what it makes of the logits of a network and of those of an ensemble."""
    likelihoods: tuple[Likelihood, ...] = ("softmax", "sigmoid")
    found = {}
    for likelihood in likelihoods:
        found |= with_prefix(f"{likelihood}_xent/", results(arrays, arrays["logits"], 1, likelihood))
        of_members = results(arrays, arrays["logits_ensemble"], members, likelihood)
        found |= with_prefix(f"ensemble_{likelihood}_xent/", of_members)
    return found


def results(
    arrays: dict[str, jax.Array], logits: jax.Array, members: int, likelihood: Likelihood
) -> dict[str, jax.Array]:
    """By kind of labels, the loss, its gradient, and the state of an evaluation after one batch."""
    valid, found = arrays["valid"], {"pred": predictions(logits, members, likelihood)}
    for kind, labels in select(arrays, "labels_").items():

        def training(logits, labels=labels):
            return task_loss(logits, repeat_members(labels, members), likelihood)

        loss = prediction_loss(logits, labels, members, likelihood)
        correct = jnp.take_along_axis(labels, found["pred"][:, None], axis=1)[:, 0]
        found |= {
            f"{kind}/train": training(logits),
            f"{kind}/grad_mean_train": jax.grad(lambda logits, training=training: jnp.mean(training(logits)))(logits),
            f"{kind}/eval": loss,
            f"{kind}/eval_state": jnp.stack([jnp.sum(valid), jnp.sum(valid * correct), jnp.sum(valid * loss)]),
        }
    return found
