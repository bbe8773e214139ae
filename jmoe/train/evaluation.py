"""Evaluating what a run has saved, as it was trained or under other options."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jmoe.data import test_batches
from jmoe.errors import UserError
from jmoe.evaluate.accuracy import Evaluation, make_evaluator
from jmoe.train.checkpoint import Checkpointer
from jmoe.train.checks import check_classes, check_images, readable
from jmoe.train.compiled import mesh_of, placed, state_shardings
from jmoe.train.config import TrainConfig
from jmoe.train.feed import Batch, evaluation_devices
from jmoe.train.state import TrainState, graph_of, initial_state, make_model
from jmoe.train.workdir import CHECKPOINTS, local


def evaluator_of(config: TrainConfig, mesh: jax.sharding.Mesh | None = None) -> Callable[..., Evaluation]:
    """Returns a function that evaluates a state on the test images, with its averaged parameters if it has them.

    The state lies on the devices of the mesh; on all, as the experiment's mesh has them, if None. A second argument of
    the function is called before every batch, and ends the evaluation by raising what it likes.
    """
    check_classes(config)
    mesh = mesh_of(config) if mesh is None else mesh
    config = for_evaluation(config)
    batch_size = evaluation_batch_size(config)
    rows, devices = evaluation_devices(config, mesh, batch_size)
    evaluate = make_evaluator(graph_of(config), config.loss, config.model.members, devices)

    def evaluator(state: TrainState, before_batch: Callable[[], None] = nothing) -> Evaluation:
        batches = test_batches(config.data, batch_size=batch_size, rows=rows)
        with contextlib.closing(batches), jax.set_mesh(mesh):
            return evaluate(checked(config, batches, before_batch), *arrays_of(state))

    return evaluator


def nothing() -> None:
    """What is done before a batch if nothing is to be."""


def checked(config: TrainConfig, batches: Iterable[Batch], before_batch: Callable[[], None]) -> Iterator[Batch]:
    """Yields batches whose images are of the size that the model takes; calls a function before each."""
    for batch in batches:
        before_batch()
        yield check_images(config, batch)


def for_evaluation(config: TrainConfig) -> TrainConfig:
    """Returns the config with the router of evaluation as the model's.

    The model is traced once on nothing, so that what cannot be routed is said before hours of training.

    Raises:
      UserError: a batch of evaluation cannot be routed.
    """
    moe, router = config.model.moe, config.evaluate.router
    with readable():
        if moe is not None and router is not None:
            model = dataclasses.replace(config.model, moe=dataclasses.replace(moe, router=router))
            config = dataclasses.replace(config, model=model)
        shape = (evaluation_batch_size(config), *config.model.image_size, config.model.channels)
        jax.eval_shape(lambda: make_model(config)(jnp.zeros(shape)).logits)
    return config


def evaluation_batch_size(config: TrainConfig) -> int:
    """Images per step of evaluation."""
    return config.evaluate.batch_size or config.data.batch_size


def arrays_of(state: TrainState) -> tuple[nnx.State, nnx.State]:
    """What is evaluated of a state: its averaged parameters if it has them, and its variables."""
    return state.params if state.average is None else state.average, state.variables


def evaluate_checkpoint(
    config: TrainConfig, workdir: str | os.PathLike[str], step: int | None = None
) -> tuple[Evaluation, int]:
    """Evaluates a checkpoint of a run with the options of config, which may differ from those it was trained with.

    Args, errors and the step returned are those of `restore`.
    """
    mesh = mesh_of(config)
    state, step = restore(config, workdir, step, mesh)
    return evaluator_of(config, mesh)(state), step


def restore(
    config: TrainConfig, workdir: str | os.PathLike[str], step: int | None, mesh: jax.sharding.Mesh
) -> tuple[TrainState, int]:
    """Reads what is evaluated of a checkpoint.

    Args:
      config: must describe a model with the same parameters; its router, say, may differ.
      workdir: of the run.
      step: of the checkpoint; None for the newest.
      mesh: of the devices that it is to lie on.

    Returns:
      the state without that of the optimizer, and the step.

    Raises:
      UserError: there is no such checkpoint, it is damaged, or it is of another model.
    """
    directory = local(workdir) / CHECKPOINTS
    if not directory.is_dir():
        raise UserError(f"{workdir} holds no checkpoints. Train first: jmoe train EXPERIMENT --workdir {workdir}")
    # Only what is evaluated is restored, so that options of training may differ.
    abstract = dataclasses.replace(jax.eval_shape(lambda: initial_state(config, optax.identity())), optimizer=None)
    abstract = placed(abstract, state_shardings(config, abstract, mesh))
    with Checkpointer(directory) as checkpointer:
        if step is None:
            state, _, step = checkpointer.restore_latest(abstract, partial=True)
        else:
            state, _ = checkpointer.restore(step, abstract, partial=True)
    return state, step
