"""Folders of runs without training: states full of random values, saved as a run saves its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.paths import path_names
from jmoe.train import workdir as folders
from jmoe.train.checkpoint import Checkpointer
from jmoe.train.state import initial_state, make_optimizer

STEP = 7


def by_name(state):
    return dict(zip(path_names(state), jax.tree.leaves(state), strict=True))


def filled(config, value):
    """The state of a run with value(name, shape) in its arrays; drawing it properly would be compiled."""

    def leaf(name, like):
        return jax.random.key(config.seed) if name == "key" else jnp.asarray(value(name, like.shape), like.dtype)

    abstract = jax.eval_shape(lambda: initial_state(config, make_optimizer(config, 12)))
    return jax.tree.unflatten(jax.tree.structure(abstract), [leaf(*item) for item in by_name(abstract).items()])


def drawn(config):
    """As before the first step: parameters all different, their average the same, all else zero."""
    draw = np.random.default_rng(0)
    state = filled(config, lambda name, shape: draw.normal(size=shape) if name[0] == "p" else np.zeros(shape))
    return dataclasses.replace(state, average=state.params)


def trained(config):
    """As after step 7: no two arrays are alike, and second moments are positive."""
    draw = np.random.default_rng(1)

    def value(name, shape):
        if name == "step" or name.endswith("count"):
            return STEP
        return np.abs(draw.normal(size=shape)) if "/nu/" in name else draw.normal(size=shape)

    return filled(config, value)


def save(config, folder, state=None, step=STEP):
    """Writes what a run leaves in its folder, and returns the arrays by name."""
    state = trained(config) if state is None else state
    folders.prepare(folder, config)
    with Checkpointer(folder / folders.CHECKPOINTS) as checkpointer:
        checkpointer.save(step, state, {}, wait=True)
    return by_name(state)


def assert_same(actual, expected):
    np.testing.assert_array_equal(np.asarray(actual), np.asarray(expected))
