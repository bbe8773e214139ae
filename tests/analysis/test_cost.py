import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jmoe
from jmoe.analysis.cost import forward_cost
from jmoe.models.vit import VisionTransformer, ViTConfig, variant
from tests.published import PUBLISHED, soft_config, vmoe_config

TINY = ViTConfig(
    patch_size=4, width=24, depth=3, hidden_dim=40, num_heads=2, num_classes=7, image_size=(8, 12), channels=1
)
SPARSE = jmoe.MoEConfig(num_experts=6, hidden_dim=36, layers=(1,), images_per_group=5)


def published(family):
    return [pytest.param(row, id=row["name"]) for row in PUBLISHED[family]]


@pytest.mark.parametrize("row", published("vmoe"))
def test_counts_are_those_of_the_published_table(row):
    for case, gflops in row["gflops"].items():
        router = None
        if case != "dense":
            k, factor = re.fullmatch(r"K(\d)_C(\S+)", case).groups()
            router = jmoe.TopK(k=int(k), capacity_factor=float(factor))
        cost = forward_cost(vmoe_config(row, router))
        assert cost.flops / 1e9 == pytest.approx(gflops, rel=0.005), case
        assert round(cost.parameters / 1e6, 1) == row["params_m"]


@pytest.mark.parametrize("row", published("softmoe"))
def test_counts_of_soft_networks_are_those_published(row):
    # Theirs are all a third of a percent more, the dense ones as well.
    assert forward_cost(soft_config(row)).flops / 1e9 == pytest.approx(row["gflops"], rel=0.006)


def xla_flops(config, batch_size):
    """What XLA counts in the forward pass of the compiled network, per image."""
    graph, state = nnx.split(nnx.eval_shape(lambda: VisionTransformer(config, rngs=nnx.Rngs(0))))
    images = jax.ShapeDtypeStruct((batch_size, *config.image_size, config.channels), jnp.float32)
    lowered = jax.jit(lambda state, images: nnx.merge(graph, state)(images).logits).lower(state, images)
    return lowered.compile().cost_analysis()["flops"] / batch_size


@pytest.mark.parametrize(
    "name", ["S/32", "B/32", *(pytest.param(name, marks=pytest.mark.slow) for name in ("B/16", "L/16", "H/14"))]
)
def test_a_dense_network_costs_what_xla_counts(name):
    config = variant(name, num_classes=18_291)
    assert forward_cost(config).flops == pytest.approx(xla_flops(config, 1), rel=0.03)


@pytest.mark.parametrize("method", ["gather", "einsum"])
def test_a_sparse_network_costs_what_xla_counts_for_the_batch(method):
    router = jmoe.TopK(k=1, capacity_factor=1.05)  # 16 slots, where 13.1 are asked for
    moe = jmoe.MoEConfig(num_experts=32, layers="last-2", router=router, method=method)
    config = variant("S/32", moe=moe)
    cost = forward_cost(config, batch_size=8)
    flops = cost.flops + (cost.einsum_flops if method == "einsum" else 0)
    assert flops == pytest.approx(xla_flops(config, 8), rel=0.01)
    assert forward_cost(config).flops < 0.98 * cost.flops


def options(**changes):
    return dataclasses.replace(TINY, **changes)


@pytest.mark.parametrize(
    "config",
    [
        options(),
        options(pool="map", positions="sincos2d", qk_norm=True, representation_dim=11),
        options(pool="first", positions="none", num_classes=None, representation_dim=11),
        options(moe=SPARSE),
        options(moe=dataclasses.replace(SPARSE, layers=(0, 2), router=jmoe.Soft(slots_per_expert=3))),
        options(moe=dataclasses.replace(SPARSE, members=2, images_per_group=10)),
    ],
    ids=["dense", "map", "no head", "sparse", "soft", "ensemble"],
)
def test_parameters_are_those_of_the_network(config):
    model = nnx.eval_shape(lambda: VisionTransformer(config, rngs=nnx.Rngs(0)))
    sizes = [p.size for p in jax.tree.leaves(nnx.state(model, nnx.Param))]
    cost = forward_cost(config)
    assert cost.parameters == sum(sizes)
    assert sum(part.flops for part in cost.parts.values()) == cost.flops


def flops(config, batch_size=None):
    return {name: part.flops for name, part in forward_cost(config, batch_size=batch_size).parts.items()}


def test_parts_by_hand():
    parts = flops(options(moe=SPARSE))
    assert parts == {
        "patches": 2 * 6 * 16 * 24,  # 6 patches of 4 x 4 x 1
        "positions": 0,
        "norms": 0,
        "attention": 3 * (4 * 2 * 7 * 24 * 24 + 2 * 2 * 7 * 7 * 24),  # of 7 tokens
        "mlp": 2 * 2 * 2 * 7 * 24 * 40,
        "gate": 2 * 7 * 24 * 6,
        "experts": pytest.approx(2 * 1.05 * 2 * 2 * 7 * 24 * 36),
        "head": 2 * 24 * 7,
    }


def test_one_hot_dispatch_is_to_the_experts_as_the_group_is_to_their_width():
    cost = forward_cost(options(moe=SPARSE))
    assert cost.einsum_flops / cost.parts["experts"].flops == pytest.approx(35 / 36)  # S / F, for groups of 5 * 7


def test_a_batch_has_slots_in_whole_numbers_and_pads_the_last_group():
    # S = 35: 35 * 2 * 1.05 / 6 = 12.25 slots, rounded up to 16. 7 images are two groups.
    parts = flops(options(moe=SPARSE), 7)
    assert parts["experts"] == pytest.approx(2 * 6 * 16 * 4 * 24 * 36 / 7)
    assert parts["gate"] == pytest.approx(2 * 35 * 2 * 24 * 6 / 7)
    # Without slots every choice is a row, also that of a dropped token.
    ragged = dataclasses.replace(SPARSE, method="ragged")
    assert flops(options(moe=ragged), 5)["experts"] == pytest.approx(2 * 7 * 4 * 24 * 36)


def test_a_choice_by_transport_costs_what_it_costs_by_gates():
    by_plan = dataclasses.replace(SPARSE, router=jmoe.Transport(choice=SPARSE.router))
    assert flops(options(moe=by_plan)) == flops(options(moe=SPARSE))


def test_where_nothing_is_dropped_every_expert_has_a_slot_for_every_token():
    dropless = dataclasses.replace(SPARSE, router=jmoe.TopK(capacity_factor=None), method="gather")
    assert flops(options(moe=dropless))["experts"] == pytest.approx(6 * 7 * 4 * 24 * 36)


def test_an_ensemble_computes_a_copy_for_each_member_from_the_first_sparse_block_on():
    members = options(moe=dataclasses.replace(SPARSE, members=2, images_per_group=10))
    one, two = flops(options(moe=SPARSE)), flops(members)
    ratios = {name: two[name] / one[name] for name in one if one[name]}
    assert ratios == pytest.approx(
        {
            "patches": 1,
            "attention": 5 / 3,
            "mlp": 3 / 2,
            "gate": 1,
            "experts": 2,
            "head": 2,
        }  # a gate per member is half
    )


def test_without_groups_the_batch_is_needed():
    config = options(moe=dataclasses.replace(SPARSE, images_per_group=None))
    with pytest.raises(ValueError, match=r"^The whole batch is one group .* give forward_cost a batch_size\.$"):
        forward_cost(config)
    assert flops(config, 5) == flops(options(moe=SPARSE), 5)
    by_tokens = options(moe=dataclasses.replace(SPARSE, images_per_group=None, group_size=14))
    assert forward_cost(by_tokens).einsum_flops == pytest.approx(2 / 5 * forward_cost(options(moe=SPARSE)).einsum_flops)


def test_the_table_adds_up():
    lines = str(forward_cost(variant("B/16", moe=jmoe.MoEConfig()))).splitlines()
    rows = {name: (float(parameters), float(gflops)) for name, parameters, gflops in map(str.split, lines[1:10])}
    total = rows.pop("total")
    assert len(rows) == 8
    assert [sum(column) for column in zip(*rows.values(), strict=True)] == pytest.approx(total, abs=0.04)
    assert lines[10].startswith("and by one-hot dispatch")
