"""A run's program on eight devices: its state, its batches, its steps and its evaluation are those of one."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jmoe import MoEConfig, TopK
from jmoe.analysis.collectives import KINDS
from jmoe.analysis.hlo import arrays, executed, parse
from jmoe.data import train_batches
from jmoe.errors import UserError
from jmoe.parallel import Mesh
from jmoe.paths import path_names
from jmoe.train.compiled import check_batch, make_program, mesh_of
from jmoe.train.evaluation import evaluator_of
from jmoe.train.feed import feeder
from tests.train.tiny import tiny_config

ONE = jax.devices()[:1]
STEPS = 2


def config_with(mesh=None, **changes):
    config = tiny_config(**{"steps": 12} | changes)
    moe = MoEConfig(num_experts=4, router=TopK(k=2), layers=(1,), images_per_group=2, dropout=0.1)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe, remat=True))
    return config if mesh is None else dataclasses.replace(config, mesh=mesh)


def trained(config, devices=None):
    """The state and the losses after some steps."""
    program = make_program(config, config.steps, devices)
    state, losses = program.init(), []
    rows, put = feeder(program.mesh, config.data.batch_size)
    batches = train_batches(config.data, seed=0, rows=rows)
    with contextlib.closing(batches), jax.set_mesh(program.mesh):
        for _ in range(STEPS):
            batch = next(batches)
            state, metrics = program.step(state, put({name: batch[name] for name in ("image", "label")}))
            losses.append(float(metrics["loss"]))
    return program, state, losses


def by_name(*trees):
    """The leaves of trees of one structure, side by side."""
    leaves = ([np.asarray(leaf) for leaf in jax.tree.leaves(tree)] for tree in trees)
    return zip(path_names(trees[0]), zip(*leaves, strict=True), strict=True)


@pytest.mark.slow
def test_steps_with_remat_and_parts_of_a_batch_are_those_of_one_device():
    config = config_with(Mesh(data=2, expert=2, fsdp=2), accumulate=3, mixup=0.3)
    program, state, losses = trained(config)
    _, expected, expected_losses = trained(dataclasses.replace(config, mesh=Mesh()), ONE)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for name, (ours, theirs) in by_name(state.params, expected.params):
        # Adam's first steps divide rounding by rounding where there is nothing else.
        np.testing.assert_allclose(ours, theirs, atol=1e-2 if "key/bias" in name else 2e-4, err_msg=name)
    where = dict(zip(path_names(program.state), jax.tree.leaves(program.state), strict=True))
    state = dict(zip(path_names(state), jax.tree.leaves(state), strict=True))
    assert {name: leaf.sharding.spec for name, leaf in state.items()} == {n: w.sharding.spec for n, w in where.items()}
    w_in = state["optimizer/direction/mu/blocks/1/moe/experts/w_in"]  # [4, 8, 12]
    assert {shard.data.shape for shard in w_in.addressable_shards} == {(2, 4, 12)}


@pytest.mark.slow
def test_parts_of_a_batch_are_divided_among_devices_once_and_as_bytes():
    program = make_program(config_with(Mesh(data=2, expert=4), accumulate=3), 12)
    with jax.set_mesh(program.mesh):
        compiled = parse(program.step.lower(program.state, program.batch).compile().as_text())
    exchanged = [(o, times) for o, times in executed(compiled) if o.opcode.removesuffix("-start") in KINDS]
    images = [(o.shape, times) for o, times in exchanged if any(axes[-3:] == (8, 8, 1) for _, axes in arrays(o.shape))]
    assert images
    assert all("u8[" in shape and times == 1 for shape, times in images), images


def test_a_state_is_drawn_as_on_one_device():
    ours, theirs = make_program(config_with(), 12).init(), make_program(config_with(), 12, ONE).init()
    for name, (a, b) in by_name(ours.params, theirs.params):
        np.testing.assert_array_equal(a, b, err_msg=name)


def test_an_evaluation_counts_every_image_once_whatever_the_batch():
    config = config_with(Mesh(data=4, expert=2))
    config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, batch_size=70))
    alone = mesh_of(dataclasses.replace(config, mesh=Mesh()), ONE)
    results = []
    for mesh in (mesh_of(config), alone):
        devices = list(mesh.devices.flat)
        on = dataclasses.replace(config, mesh=Mesh()) if mesh is alone else config
        state = make_program(on, 12, devices).init()
        results.append(evaluator_of(config, mesh)(state))
    ours, theirs = results
    assert ours.images == theirs.images == 360
    assert ours.accuracy == theirs.accuracy
    np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-6)
    np.testing.assert_allclose(ours.dropped_tokens, theirs.dropped_tokens, atol=1e-6)


@pytest.mark.parametrize(
    ("images", "mesh", "sentence"),
    [
        (
            36,
            Mesh(expert=4),
            r"36 images in groups of 2 cannot be divided among 8 devices \(Mesh\(data=2, expert=4\)\): "
            r"use data.batch_size=32\.$",
        ),
        (4, Mesh(expert=4), "use data.batch_size=16"),
    ],
)
def test_a_batch_that_does_not_split_is_refused(images, mesh, sentence):
    config = config_with(mesh)
    with pytest.raises(UserError, match=sentence):
        check_batch(images, config, mesh_of(config))


def test_a_layer_refuses_groups_that_do_not_split():
    from flax import nnx

    from jmoe import MoEMlp
    from jmoe.parallel import Exchange, build

    layer = MoEMlp(MoEConfig(num_experts=8, hidden_dim=4, images_per_group=3), 8, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match="The groups of 12 images of 5 tokens, 15 tokens each, cannot be divided among 8"
    ):
        layer(jax.numpy.ones((12, 5, 8)), exchange=Exchange(build(Mesh(), num_experts=8)))


def test_rules_of_an_experiment_come_before_ours_and_what_they_miss_is_said(caplog):
    caplog.set_level("INFO", logger="jmoe")
    config = config_with(Mesh(fsdp=4, model=2), sharding=(("pre_head|norm/scale", ("model",)), ("nobody", ())))
    program = make_program(config, 12)
    assert program.state.params["norm"]["scale"].sharding.spec == PartitionSpec("model")
    assert program.state.optimizer["direction"].mu["norm"]["scale"].sharding.spec == PartitionSpec("model")
    assert "Sharding rules that match no parameter: 'nobody'." in caplog.messages
    assert [line for line in caplog.messages if "head" in line] == []  # our own may match nothing
