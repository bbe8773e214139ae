import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jmoe import Importance, Load
from jmoe.data import train_batches
from jmoe.train.optimizer import SGD
from jmoe.train.state import graph_of, initial_state, make_model, make_optimizer
from jmoe.train.step import make_step
from tests.tolerance import tolerance
from tests.train.tiny import tiny_config


def run(config, steps=1):
    """The state and the metrics after some steps."""
    optimizer = make_optimizer(config, 12)
    step = jax.jit(make_step(config, graph_of(config), optimizer, 12))
    state, metrics = jax.jit(lambda: initial_state(config, optimizer))(), {}
    batches = train_batches(config.data, seed=0)
    for _ in range(steps):
        batch = next(batches)
        state, metrics = step(state, {"image": batch["image"], "label": batch["label"]})
    batches.close()
    return state, metrics


def without_randomness(**changes):
    """The tiny run without noise and dropout, and with enough room in every group.

    Plain gradient descent: Adam would divide gradients that are zero up to rounding by their own size.
    """
    config = tiny_config(optimizer=SGD(peak_lr=0.1, momentum=0.0, clip_norm=1.0), **changes)
    router = dataclasses.replace(config.model.moe.router, noise_std=0.0, capacity_factor=3.0)
    moe = dataclasses.replace(config.model.moe, router=router, dropout=0.0)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe, dropout=0.0))


def test_the_loss_is_that_of_the_task_and_of_the_routers():
    config = tiny_config()
    _, metrics = run(config)
    parts = [metrics["loss/task"], metrics["loss/importance"], metrics["loss/load"]]
    np.testing.assert_allclose(metrics["loss"], sum(parts), **tolerance("float32"))
    # A head that starts at zero, with the bias -log(10): every class has probability 1/10.
    np.testing.assert_allclose(metrics["loss/task"], np.log(10), rtol=1e-6)


def test_labels_may_be_weights_of_classes():
    config = without_randomness(loss="sigmoid")
    step = make_step(config, graph_of(config), optimizer := make_optimizer(config, 12), 12)
    state = jax.jit(lambda: initial_state(config, optimizer))()
    batch = next(train_batches(config.data, seed=0))

    label = jnp.asarray(np.where(np.arange(10) < 3, 0.5, 0.0) * np.ones((48, 1)), jnp.float32)
    loss = jax.jit(lambda image, label: step(state, {"image": image, "label": label})[1]["loss/task"])
    # A head that starts at zero: every class has probability 1/11, whatever the image.
    expected = 10 * np.log(11 / 10) + 3 * 0.5 * np.log(10)
    np.testing.assert_allclose(loss(batch["image"], label), expected, rtol=1e-6)


@pytest.mark.slow
def test_every_member_of_an_ensemble_learns_by_its_own_loss():
    config = without_randomness(accumulate=2)
    moe = dataclasses.replace(config.model.moe, num_experts=4, members=2)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe, head_zero=False))
    _, metrics = run(config)
    batch, model = next(train_batches(config.data, seed=0)), make_model(config)
    log_p = jax.nn.log_softmax(nnx.jit(model)(jnp.asarray(batch["image"], jnp.float32) / 127.5 - 1.0).logits)
    labels = np.repeat(batch["label"], 2)
    np.testing.assert_allclose(metrics["loss/task"], -np.mean(log_p[np.arange(len(labels)), labels]), rtol=1e-5)


def test_one_step_is_the_gradient_of_the_loss_through_the_optimizer():
    config = without_randomness()
    optimizer = make_optimizer(config, 12)
    before = jax.jit(lambda: initial_state(config, optimizer))()
    after, _ = run(config)
    batch = next(train_batches(config.data, seed=0))

    def loss(model):
        output = model(jnp.asarray(batch["image"], jnp.float32) / 127.5 - 1.0, key=jax.random.key(7))
        log_p = output.logits - jax.nn.logsumexp(output.logits, axis=-1, keepdims=True)
        return -jnp.mean(log_p[jnp.arange(48), batch["label"]]) + sum(output.losses.values())

    gradients = nnx.jit(nnx.grad(loss))(make_model(config))
    updates, _ = optimizer.update(gradients, before.optimizer, before.params)
    expected = optax.apply_updates(before.params, updates)
    for a, b in zip(jax.tree.leaves(after.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, **tolerance("float32"))
    assert int(after.step) == 1


def test_accumulated_parts_give_the_gradient_of_the_whole_batch():
    # 48 images are 12 groups of 4: three parts of 16 images hold the same groups as the batch.
    whole, whole_metrics = run(without_randomness(), steps=3)
    parts, parts_metrics = run(without_randomness(accumulate=3), steps=3)
    np.testing.assert_allclose(parts_metrics["loss"], whole_metrics["loss"], rtol=1e-5)
    np.testing.assert_allclose(parts_metrics["gradient_norm"], whole_metrics["gradient_norm"], rtol=1e-4)
    for a, b in zip(jax.tree.leaves(parts.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, **tolerance("float32"))


@pytest.mark.slow
def test_the_average_follows_the_parameters():
    state0, _ = run(tiny_config(ema_decay=0.5), steps=0)
    state1, _ = run(tiny_config(ema_decay=0.5), steps=1)
    state2, _ = run(tiny_config(ema_decay=0.5), steps=2)
    p0, p1, p2, average = (
        jax.tree.leaves(tree) for tree in (state0.params, state1.params, state2.params, state2.average)
    )
    for a, b, c, mean in zip(p0, p1, p2, average, strict=True):
        np.testing.assert_allclose(mean, 0.25 * a + 0.25 * b + 0.5 * c, **tolerance("float32"))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"loss": "sigmoid"}, {"mixup": 0.5}], ids=str)
def test_other_objectives_change_the_loss(changes):
    _, plain = run(tiny_config(), steps=3)
    _, other = run(tiny_config(**changes), steps=3)
    assert np.isfinite(other["loss"])
    assert other["loss/task"] != plain["loss/task"]


@pytest.mark.slow
def test_named_losses_replace_those_of_the_router():
    config = tiny_config()
    moe = dataclasses.replace(config.model.moe, losses=(Importance(weight=2.0), Load(weight=0.0)))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    _, metrics = run(config)
    _, published = run(tiny_config())
    np.testing.assert_allclose(metrics["loss/importance"], 400 * published["loss/importance"], rtol=1e-5)
    assert metrics["loss/load"] == 0


@pytest.mark.slow
def test_each_step_draws_its_own_noise_and_a_run_repeats():
    _, first = run(tiny_config(), steps=2)
    _, again = run(tiny_config(), steps=2)
    _, other = run(tiny_config(seed=1), steps=2)
    assert first["loss"] == again["loss"] != other["loss"]
