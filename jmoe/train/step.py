"""One update of the parameters, as a pure function."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jmoe.evaluate.accuracy import scale_pixels
from jmoe.models.vit import Output
from jmoe.nn.ensemble import repeat_members, task_loss
from jmoe.nn.exchange import ONE_DEVICE, Exchange
from jmoe.train.config import TrainConfig
from jmoe.train.mixup import mixup
from jmoe.train.state import TrainState

Batch = dict[str, Any]
Metrics = dict[str, jax.Array]


def make_step(
    config: TrainConfig,
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    total_steps: int,
    exchange: Exchange = ONE_DEVICE,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns (state, batch) -> (state, metrics), to be jitted with the state donated; see `jmoe.train.compiled`.

    A batch holds "image" [B, Y, X, channels], pixels from 0 to 255, and "label": classes [B], or [B, num_classes] the
    weight of each class from 0 to 1, as of an image that shows several things.

    The metrics are scalars: "loss" (of the task and auxiliary), its parts "loss/...", "accuracy", "gradient_norm",
    "learning_rate", and "block_i/..." of the routers.
    """
    assert config.model.num_classes is not None  # TrainConfig sees to it
    num_classes = config.model.num_classes

    def loss_and_metrics(
        params: nnx.State, variables: nnx.State, image: jax.Array, label: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, tuple[nnx.State, Metrics]]:
        mixup_key, model_key = jax.random.split(key)
        images = scale_pixels(image)
        targets = jax.nn.one_hot(label, num_classes) if label.ndim == 1 else label
        if config.mixup > 0:
            images, targets = mixup(mixup_key, images, targets, config.mixup)
        model = nnx.merge(graph, params, variables)
        output: Output = model(images, key=model_key, exchange=exchange)
        targets = repeat_members(targets, config.model.members)  # every member learns for itself
        task = jnp.mean(task_loss(output.logits, targets, config.loss))
        total = task + sum(output.losses.values())
        metrics = {"loss": total, "loss/task": task}
        metrics |= {f"loss/{name}": value for name, value in output.losses.items()}
        metrics["accuracy"] = jnp.mean(jnp.argmax(output.logits, axis=-1) == jnp.argmax(targets, axis=-1))
        for block, values in output.metrics.items():
            metrics |= {f"block_{block}/{name}": value for name, value in values.items() if value.ndim == 0}
        return total, (nnx.state(model, nnx.Not(nnx.Param)), metrics)

    gradient = jax.grad(loss_and_metrics, has_aux=True)

    def accumulated(state: TrainState, batch: Batch, key: jax.Array) -> tuple[nnx.State, tuple[nnx.State, Metrics]]:
        """Gradients and metrics of a batch, as the mean over config.accumulate parts of it."""
        if config.accumulate == 1:
            return gradient(state.params, state.variables, batch["image"], batch["label"], key)
        # Each part is divided among all devices, here and not anew in every turn of the loop.
        parts = tuple(
            exchange.split(a.reshape(config.accumulate, -1, *a.shape[1:]), axis=1)
            for a in (batch["image"], batch["label"])
        )

        def add(carry: Any, part: Any) -> tuple[Any, None]:
            variables, sums = carry
            image, label, key = part
            gradients, (variables, metrics) = gradient(state.params, variables, image, label, key)
            return (variables, jax.tree.map(jnp.add, sums, (gradients, metrics))), None

        shapes = jax.eval_shape(gradient, state.params, state.variables, *jax.tree.map(lambda a: a[0], parts), key)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), (shapes[0], shapes[1][1]))
        keys = jax.random.split(key, config.accumulate)
        (variables, sums), _ = jax.lax.scan(add, (state.variables, zeros), (*parts, keys))
        gradients, metrics = jax.tree.map(lambda s: s / config.accumulate, sums)
        return gradients, (variables, metrics)

    learning_rate = config.optimizer.learning_rate(total_steps)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        gradients, (variables, metrics) = accumulated(state, batch, key)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if config.ema_decay is not None and average is not None:
            average = optax.incremental_update(params, average, 1 - config.ema_decay)
        metrics["gradient_norm"] = optax.tree.norm(gradients)
        metrics["learning_rate"] = jnp.float32(learning_rate(state.step))
        new = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            variables=variables,
            optimizer=optimizer_state,
            average=average,
        )
        return new, metrics

    return step
