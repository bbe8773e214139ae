"""From the name of a parameter to where it lies."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jmoe import MoEConfig, Soft
from jmoe.errors import UserError
from jmoe.models import vit
from jmoe.parallel.mesh import AXES
from jmoe.parallel.rules import RULES, place, shardings, state_shardings
from jmoe.paths import path_names
from jmoe.train.optimizer import Adafactor, AdamW

MESH = jax.sharding.AbstractMesh((2, 2, 4, 2), AXES)


def parameters(**options):
    config = vit.variant("Ti/16", **options)
    return nnx.state(nnx.eval_shape(lambda: vit.VisionTransformer(config, rngs=nnx.Rngs(0))), nnx.Param)


def specs_of(tree):
    return {name: s.spec for name, s in zip(path_names(tree), jax.tree.leaves(tree), strict=True)}


MODELS = {
    "sparse": {"moe": MoEConfig(layers="every-2", num_experts=8)},
    "soft": {"moe": MoEConfig(num_experts=8, router=Soft()), "pool": "map", "qk_norm": True},
}


@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_has_a_rule_and_lies_as_it_says(model):
    params = parameters(**MODELS[model])
    shapes = {n: tuple(p.shape) for n, p in zip(path_names(params), jax.tree.leaves(params), strict=True)}
    placement = place(shapes, MESH)
    assert placement.unmatched == ()
    specs = placement.specs
    assert specs["blocks/1/moe/experts/w_in"] == P("expert", "fsdp", "model")
    assert specs["blocks/1/moe/experts/w_out"] == P("expert", "model", "fsdp")
    assert specs["blocks/0/mlp/w_in"] == P("fsdp", "model")
    assert specs["head/kernel"] == P("fsdp", "model")
    assert not any(specs["norm/scale"])
    # Ti has 3 heads, which 2 do not divide.
    assert ("blocks/0/attention/query/kernel", 1, "model") in placement.whole
    assert specs["blocks/0/attention/query/kernel"] == P("fsdp", None, None)
    # What is divided by nothing is small: under 5 % of the parameters.
    alone = sum(jnp.prod(jnp.array(shapes[n])) for n, spec in specs.items() if not any(spec))
    assert alone < 0.05 * sum(jnp.prod(jnp.array(s)) for s in shapes.values())


def test_what_one_might_not_have_meant_is_reported():
    rules = (("kernel$", ("data",)), ("nothing$", ()), ("odd", ("expert",)))
    placement = place({"a/kernel": (4, 3), "odd": (6,), "b/bias": (3,)}, MESH, rules)
    assert placement.specs == {"a/kernel": P("data"), "odd": P(None), "b/bias": P()}
    assert placement.report() == [
        "No sharding rule matches 'b/bias': kept whole on every device.",
        "Sharding rules that match no parameter: 'nothing$'.",
        "Sizes that the mesh does not divide, kept whole: axis 0 of odd over 'expert'.",
    ]
    assert place({"a/kernel": (4, 3)}, MESH, rules[:1]).report() == []


def test_the_first_rule_that_matches_counts():
    rules = (("experts/w", ("expert",)), ("w", ("data",)))
    assert place({"experts/w": (4,), "w": (4,)}, MESH, rules).specs == {"experts/w": P("expert"), "w": P("data")}


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        (("w", ("experts",)), "names the mesh axis 'experts'; the mesh has 'data', 'fsdp', 'expert', 'model'"),
        (("w(", ("data",)), "is not a regular expression"),
        (("w", ("data", None)), r"has 2 axes, \('data', None\); w has the shape \(4,\)"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(rule, sentence):
    with pytest.raises(UserError, match=sentence):
        place({"w": (4,)}, MESH, [rule])


def test_an_optimizers_state_lies_as_its_parameters():
    params = parameters(**MODELS["sparse"])
    where = specs_of(shardings(params, MESH))
    state = jax.eval_shape(AdamW(peak_lr=1.0).build(params, 10).init, params)
    found = specs_of(state_shardings(params, state, MESH))
    moments = {name for name in found if "/mu/" in name or "/nu/" in name}
    assert len(moments) == 2 * len(where)
    for name in moments:
        assert found[name] == where[name.split("/", 2)[2]], name
    assert not any(found["direction/count"])


def test_the_factors_of_a_second_moment_lie_as_the_axes_that_they_keep():
    params = parameters(**MODELS["sparse"])
    state = jax.eval_shape(Adafactor(peak_lr=1.0).build(params, 10).init, params)
    found = specs_of(state_shardings(params, state, MESH))
    shapes = {n: leaf.shape for n, leaf in zip(path_names(state), jax.tree.leaves(state), strict=True)}
    rows = next(n for n in found if n.endswith("v_row/blocks/1/moe/experts/w_in"))
    columns = next(n for n in found if n.endswith("v_col/blocks/1/moe/experts/w_in"))
    by_shape = {(8, 192): P("expert", "fsdp"), (8, 768): P("expert", "model")}
    assert {shapes[rows], shapes[columns]} == by_shape.keys()
    assert found[rows] == by_shape[shapes[rows]]
    assert found[columns] == by_shape[shapes[columns]]


def test_the_rules_are_all_used_by_some_model():
    used = set()
    for options in MODELS.values():
        params = parameters(**options)
        shapes = {n: tuple(p.shape) for n, p in zip(path_names(params), jax.tree.leaves(params), strict=True)}
        used |= {pattern for pattern, _ in RULES} - set(place(shapes, MESH).unused)
    assert used == {pattern for pattern, _ in RULES}
