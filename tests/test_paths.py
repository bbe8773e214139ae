import dataclasses

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jmoe.paths import path_names


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: jax.Array
    value: list


def test_dicts_sequences_and_dataclasses_are_joined_by_slashes():
    tree = State(step=jnp.zeros(()), value=[jnp.zeros(2), {"b": jnp.zeros(1), "a": (jnp.zeros(3),)}])
    assert path_names(tree) == ["step", "value/0", "value/1/a/0", "value/1/b"]


def test_variables_of_nnx_are_named_by_their_place_in_the_model():
    state = nnx.state(nnx.Dict(blocks=nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0))])))
    assert path_names(state) == ["blocks/0/bias", "blocks/0/kernel"]
    moments = optax.scale_by_adam().init(state)
    assert path_names(moments) == [
        "count", "mu/blocks/0/bias", "mu/blocks/0/kernel", "nu/blocks/0/bias", "nu/blocks/0/kernel",
    ]  # fmt: skip


def test_names_are_in_the_order_of_the_leaves():
    tree = {"b": 1, "a": {"d": 2, "c": 3}, "e/f": 4}
    assert dict(zip(path_names(tree), jax.tree.leaves(tree), strict=True)) == {"a/c": 3, "a/d": 2, "b": 1, "e/f": 4}


def test_a_lone_leaf_called_value_keeps_its_name():
    lone = jax.tree_util.register_dataclass(dataclasses.make_dataclass("Lone", ["value"]))
    assert path_names(lone(jnp.zeros(1))) == ["value"]
