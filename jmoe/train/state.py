"""What a training run changes: everything that has to survive it."""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jmoe.models.vit import VisionTransformer
from jmoe.train.config import TrainConfig


@typing.no_type_check  # JAX rebuilds it with shapes and shardings as leaves; checking those would reject them.
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Parameters and everything that goes with them.

    Attributes:
      step: updates made so far, an int32 scalar.
      params: of the model.
      variables: of the model that no gradient trains, such as the state of a router.
      optimizer: state of the optimizer.
      average: moving average of params, or None.
      key: randomness of training; step t uses fold_in(key, t), so that it never changes.
    """

    step: jax.Array
    params: nnx.State
    variables: nnx.State
    optimizer: Any
    average: nnx.State | None
    key: jax.Array


def make_model(config: TrainConfig) -> VisionTransformer:
    """The network with its parameters drawn from config.seed."""
    return VisionTransformer(config.model, rngs=nnx.Rngs(params=config.seed))


def graph_of(config: TrainConfig) -> nnx.GraphDef:
    """The model without its arrays."""
    return nnx.split(nnx.eval_shape(lambda: make_model(config)))[0]


def make_optimizer(config: TrainConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of so many steps."""
    return config.optimizer.build(nnx.state(nnx.eval_shape(lambda: make_model(config)), nnx.Param), steps)


def initial_state(config: TrainConfig, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; jit it, or take its eval_shape, to restore a checkpoint into."""
    _, params, variables = nnx.split(make_model(config), nnx.Param, ...)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        variables=variables,
        optimizer=optimizer.init(params),
        # A copy: the step donates its arguments, and one buffer cannot be donated twice.
        average=None if config.ema_decay is None else jax.tree.map(jnp.copy, params),
        key=jax.random.fold_in(jax.random.key(config.seed), 1),
    )
