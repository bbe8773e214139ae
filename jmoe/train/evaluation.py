"""Evaluating what a run has saved, as it was trained or under other options."""

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jmoe.data import test_batches
from jmoe.errors import UserError
from jmoe.evaluate.accuracy import Evaluation, make_evaluator
from jmoe.train.checkpoint import Checkpointer
from jmoe.train.checks import check_classes, check_images, readable
from jmoe.train.config import TrainConfig
from jmoe.train.state import TrainState, graph_of, initial_state, make_model
from jmoe.train.workdir import CHECKPOINTS


def evaluator_of(config: TrainConfig) -> Callable[[TrainState], Evaluation]:
    """Returns a function that evaluates a state on the test images, with its averaged parameters if it has them."""
    check_classes(config)
    batch_size = config.evaluate.batch_size or config.data.batch_size
    moe, router = config.model.moe, config.evaluate.router
    with readable():
        if moe is not None and router is not None:
            model = dataclasses.replace(config.model, moe=dataclasses.replace(moe, router=router))
            config = dataclasses.replace(config, model=model)
        # Traced once on nothing, so that what cannot be routed is said before hours of training.
        shape = (batch_size, *config.model.image_size, config.model.channels)
        jax.eval_shape(lambda: make_model(config)(jnp.zeros(shape)).logits)
    evaluate = make_evaluator(graph_of(config), config.loss, config.model.members)

    def evaluator(state: TrainState) -> Evaluation:
        params = state.params if state.average is None else state.average
        with contextlib.closing(test_batches(config.data, batch_size=batch_size)) as batches:
            return evaluate((check_images(config, batch) for batch in batches), params, state.variables)

    return evaluator


def evaluate_checkpoint(
    config: TrainConfig, workdir: str | os.PathLike[str], step: int | None = None
) -> tuple[Evaluation, int]:
    """Evaluates a checkpoint of a run with the options of config, which may differ from those it was trained with.

    Args:
      config: must describe a model with the same parameters; its router, say, may differ.
      workdir: of the run.
      step: of the checkpoint; None for the newest.

    Returns:
      the evaluation and the step.

    Raises:
      UserError: there is no such checkpoint, it is damaged, or it is of another model.
    """
    directory = pathlib.Path(workdir) / CHECKPOINTS
    if not directory.is_dir():
        raise UserError(f"{workdir} holds no checkpoints. Train first: jmoe train EXPERIMENT --workdir {workdir}")
    # Only what is evaluated is restored, so that options of training may differ.
    abstract = dataclasses.replace(jax.eval_shape(lambda: initial_state(config, optax.identity())), optimizer=None)
    with Checkpointer(directory) as checkpointer:
        if step is None:
            state, _, step = checkpointer.restore_latest(abstract, partial=True)
        else:
            state, _ = checkpointer.restore(step, abstract, partial=True)
    return evaluator_of(config)(state), step
