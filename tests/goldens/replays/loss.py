"""Losses in training and in evaluation, of single networks and of ensembles."""

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.nn.ensemble import Likelihood, prediction_loss, predictions, repeat_members, task_loss
from tests.goldens.case import Case
from tests.goldens.replays.parts import select, with_prefix


def replay(case: Case) -> dict[str, np.ndarray]:
    kinds: tuple[Likelihood, ...] = ("softmax", "sigmoid")
    found = {}
    for kind in kinds:
        found |= with_prefix(f"{kind}_xent/", results(case, "logits", 1, kind))
        members = case.config["ensemble_size"]
        found |= with_prefix(f"ensemble_{kind}_xent/", results(case, "logits_ensemble", members, kind))
    return jax.device_get(found)


def results(case: Case, name: str, members: int, likelihood: Likelihood) -> dict[str, jax.Array]:
    """All that is recorded of one loss: by kind of labels, the loss and its state after one batch of evaluation."""
    logits, valid = jnp.asarray(case.arrays[name]), case.arrays["valid"]
    found = {"pred": predictions(logits, members, likelihood)}
    for kind, labels in select(jax.tree.map(jnp.asarray, case.arrays), "labels_").items():

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
