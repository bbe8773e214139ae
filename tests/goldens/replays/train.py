"""Whole steps of training, by the real step: losses, metrics and norms of each, and the parameters at the end."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jmoe.convert.names import our_name
from jmoe.data import DataConfig, Digits
from jmoe.models.vit import VisionTransformer
from jmoe.routing import Balance, Importance, Load
from jmoe.train.config import TrainConfig
from jmoe.train.optimizer import Optimizer
from jmoe.train.state import TrainState
from jmoe.train.step import make_step
from tests.goldens.case import Case
from tests.goldens.replays.networks import apply_recorded, flat, to_ours, with_parameters
from tests.goldens.replays.optim import optimizer_of
from tests.goldens.replays.parts import SparsePart, take, with_prefix
from tests.goldens.replays.vit import LOSS, network_of, vit_config


def replay(case: Case) -> dict[str, np.ndarray]:
    config, names = case.config, list(case.group("params"))
    model, part = vit_config(config["model"], config["image_size"], config["deterministic"], {})
    if part is not None:
        moe = dataclasses.replace(model.moe, losses=losses_of(part))
        model = dataclasses.replace(model, moe=moe)
    loss = LOSS.fullmatch(config["loss"])
    members = take(config.get("loss_kwargs") or {}, "ensemble_size").get("ensemble_size", 1)
    if loss is None or members != model.members:
        raise ValueError(f"the loss {config['loss']!r} of {members} members is not one of this network here")
    optimizer, total_steps = optimizer_of(config["optimizer"], config["total_steps"], names)
    run = TrainConfig(
        model=model,
        data=DataConfig(source=Digits(), batch_size=config["batch"]),  # for its number of images alone
        optimizer=renamed(optimizer, names),
        steps=total_steps,
        loss=loss[2],
    )
    graph, params = with_parameters(network_of(config["model"], model), to_ours(case.group("params")))
    transformation = run.optimizer.build(params, total_steps)
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        variables=nnx.State({}),
        optimizer=transformation.init(params),
        average=None,
        key=jax.random.key(0),  # of the noise, of which there is none
    )
    update = make_step(run, graph, transformation, total_steps)

    @jax.jit
    def step(state, images, labels):
        routers = router_metrics(nnx.merge(graph, state.params), part, images)
        # The step scales pixels from 0 to 255 to what was recorded.
        after, metrics = update(state, {"image": 127.5 * (images + 1), "label": labels})
        updates = jax.tree.map(jnp.subtract, after.params, state.params)
        return after, routers | {
            "main_loss": metrics["loss/task"],
            "total_loss": metrics["loss"],
            "global_norm/grads": metrics["gradient_norm"],
            "global_norm/updates": optax.tree.norm(updates),
            "global_norm/params": optax.tree.norm(after.params),
        }

    rows = []
    for images, labels in zip(case.arrays["images"], case.arrays["labels"], strict=True):
        state, row = step(state, images, labels)
        rows.append(row)
    metrics = jax.tree.map(lambda *values: jnp.stack(values), *rows)
    after = flat(nnx.to_pure_dict(state.params), case.group("params"), to_ours)
    return jax.device_get(with_prefix("metrics/", metrics) | with_prefix("params_after/", after))


def losses_of(part: SparsePart) -> tuple[Importance | Load | Balance, ...]:
    """The reference's auxiliary losses as ours; one that does not weigh more than nothing is left out."""
    if "num_selected_experts" not in part.options:
        return ()
    losses = (
        Importance(weight=float(part.options.get("importance_loss_weight", 1.0))),
        Load(weight=float(part.options.get("load_loss_weight", 1.0))),
        Balance(weight=float(part.options.get("gshard_loss_weight", 0.0))),
    )
    return tuple(loss for loss in losses if loss.weight > 0)


def router_metrics(network: VisionTransformer, part: SparsePart | None, images: jax.Array) -> dict[str, jax.Array]:
    """Those of each sparse block, averaged over its groups, and the sum of their auxiliary losses."""
    found, auxiliary = {}, jnp.zeros(())
    for block, metrics in apply_recorded(network, part, images)[1].items():
        metrics = {name: jnp.mean(metric, dtype=jnp.float32) for name, metric in metrics.items()}
        found |= with_prefix(f"{block}/", metrics)
        auxiliary += metrics["auxiliary_loss"]
    return found | {"auxiliary_loss": auxiliary}


def renamed(optimizer: Optimizer, names: list[str]) -> Optimizer:
    """An optimizer whose regular expressions are of the reference's names, as one of ours: parameter by parameter."""
    patterns = {name: f"^{re.escape(our_name(name))}$" for name in names}

    def by_name(pairs):
        values = {name: [value for regex, value in pairs if re.search(regex, name)] for name in names}
        return tuple((patterns[name], found[0]) for name, found in values.items() if found)

    def any_of(regex):
        return None if regex is None else "|".join(patterns[name] for name in names if re.search(regex, name))

    decay = optimizer.weight_decay
    return dataclasses.replace(
        optimizer,
        weight_decay=decay if isinstance(decay, float) else by_name(decay),
        gradient_scale=by_name(optimizer.gradient_scale),
        frozen=any_of(optimizer.frozen),
        trainable=any_of(optimizer.trainable),
    )
