"""The exchange: index arithmetic against loops, and what is sent in programs compiled for TPU slices."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jmoe import MoEConfig, MoEMlp, TopK
from jmoe.analysis.collectives import axes_of, collectives
from jmoe.analysis.hlo import parse
from jmoe.nn.exchange import EXCHANGED, ONE_DEVICE
from jmoe.nn.moe import MOST_CHUNKS, ROWS_OF_CHUNK, _chunks, _whole_tiles
from jmoe.parallel import Exchange, Mesh, build, shardings, topology_devices
from jmoe.parallel.exchange import _block_places, _sorted_places
from jmoe.parallel.mesh import BATCH
from jmoe.parallel.topology import compiling_for
from jmoe.routing import decide, gating

sizes = st.lists(st.lists(st.integers(0, 4), min_size=3, max_size=3), min_size=2, max_size=4)


@given(sizes=sizes, more=st.integers(0, 3))
def test_rows_go_into_the_block_of_their_device(sizes, more):
    totals = np.sum(sizes, axis=1)
    limit = int(totals.max()) + more
    expected = [block * limit + i for block, total in enumerate(totals) for i in range(total)]
    expected += [len(totals) * limit] * more  # rows of nobody go nowhere
    places = _block_places(jnp.array(totals), int(totals.sum()) + more, limit)
    assert places.tolist() == expected


@given(sizes=sizes, more=st.integers(0, 3))
def test_blocks_that_arrived_are_sorted_by_expert_and_then_by_device(sizes, more):
    limit = int(np.sum(sizes, axis=1).max()) + more
    rows = {}  # (device, expert, number): place in the blocks
    for device, counts in enumerate(sizes):
        place = device * limit
        for expert, count in enumerate(counts):
            for number in range(count):
                rows[device, expert, number] = place
                place += 1
    expected = [len(sizes) * limit] * (len(sizes) * limit)
    for position, row in enumerate(sorted(rows, key=lambda row: (row[1], row[0], row[2]))):
        expected[rows[row]] = position
    assert _sorted_places(jnp.array(sizes), limit).tolist() == expected


def sent(topology, mesh, images=16, remat=False, **options):
    """(kind, axes) of every exchange in value and gradient of a layer, and how many bytes each of an all-to-all has."""
    devices = build(mesh, topology_devices(topology), 8)
    router = TopK(k=2, capacity_factor=1.05)
    config = MoEConfig(num_experts=8, hidden_dim=256, router=router, images_per_group=2, **options)
    graph, state = nnx.split(nnx.eval_shape(lambda: MoEMlp(config, 128, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))
    where = shardings(state, devices)
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, where)
    x = jax.ShapeDtypeStruct((images, 20, 128), jnp.float32, sharding=NamedSharding(devices, PartitionSpec(BATCH)))
    exchange = Exchange(devices)

    def layer(state, x):
        return nnx.merge(graph, state)(x, key=jax.random.key(0), exchange=exchange)

    if remat:
        layer = jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(EXCHANGED))

    def loss(state, x):
        output = layer(state, x)
        return jnp.sum(jnp.square(output.y)) + sum(output.losses.values())

    with compiling_for(devices):
        program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(state, x).compile()
    found = collectives(parse(program.as_text()))
    kinds = sorted((one.kind, axes_of(one.groups, dict(devices.shape))) for one in found)
    return kinds, {one.bytes for one in found if "all-to-all" in one.kind and one.bytes > 1000}


C = 12  # 40 tokens * 2 * 1.05 / 8 experts, rounded up to a multiple of 4
SLOTS = 8 * 2 * C * 128 * 2  # E * G * C * D in bfloat16, of the 2 groups of a device


def test_tokens_travel_four_times_in_the_dtype_of_the_experts_and_nothing_else_but_gradients_does():
    kinds, sizes = sent("v5e:2x2", Mesh(data=2, expert=2))
    assert [kind for kind in kinds if kind[0] != "all-reduce"] == [("all-to-all", ("expert",))] * 4
    assert sizes == {SLOTS}
    assert {axes for kind, axes in kinds if kind == "all-reduce"} <= {("data",), ("data", "expert")}


@pytest.mark.slow
@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("options", [{}, {"fused": True}])
def test_groups_may_go_one_after_the_other_and_nothing_goes_twice(options, remat):
    kinds, sizes = sent("v5e:2x2", Mesh(data=2, expert=2), remat=remat, exchange_chunks=2, **options)
    assert [kind for kind in kinds if kind[0] != "all-reduce"] == [("all-to-all", ("expert",))] * 8
    assert sizes == {SLOTS // 2}


@pytest.mark.slow
@pytest.mark.parametrize(("options", "numbers"), [({}, 0), ({"fused": True}, 0), ({"method": "ragged"}, 1)])
def test_layers_that_are_computed_again_for_their_gradient_send_nothing_again(options, numbers):
    (kinds, sizes), without = (
        sent("v5e:2x2", Mesh(data=2, expert=2), remat=remat, **options) for remat in (True, False)
    )
    # But for how many rows come, a few integers, where that is not known before.
    assert (kinds, sizes) == (sorted([*without[0], *[("all-to-all", ("expert",))] * numbers]), without[1])


def test_parts_are_no_smaller_than_pays_off_and_whole_groups():
    def routed(tokens):
        return decide(TopK(k=2, capacity_factor=1.0), gating(jnp.zeros((48, tokens, 8))))

    decision = routed(256)
    assert decision.capacity == 64
    four, one = (Exchange(build(Mesh(expert=n), topology_devices("v5e:2x2"), 8)) for n in (4, 1))

    def chunks(wanted=None, exchange=four):
        return _chunks(MoEConfig(exchange_chunks=wanted), decision, exchange)

    # Each device has 12 groups.
    assert 4 * 12 * 64 // ROWS_OF_CHUNK == 1  # rows for an expert, of all devices
    assert chunks() == 1
    assert [chunks(wanted) for wanted in (1, 2, 3, 4, 5, 12, 100)] == [1, 2, 3, 4, 4, 12, 12]
    decision = dataclasses.replace(decision, capacity=256)  # a dropless layer, whose slots are mostly empty
    assert chunks() == 1
    decision = routed(512)
    assert chunks() == 3
    decision = routed(1024)
    assert chunks() == MOST_CHUNKS == 4  # of 6
    assert chunks(4, one) == 1
    assert chunks(exchange=Exchange(four.mesh, overlaps=False)) == 1
    assert chunks(2, Exchange(four.mesh, overlaps=False)) == 2


@pytest.mark.parametrize(
    ("groups", "capacity", "more"),
    [
        (1, 508, 512),
        (2, 508, 512),
        (4, 508, 508),
        (3, 16, 16),
        (1, 12, 12),
        (2, 252, 256),
        (1, 244, 244),
        (1, 1732, 1744),
    ],
)
def test_slots_are_added_until_those_of_an_expert_fill_whole_tiles(groups, capacity, more):
    router = TopK(k=2, capacity_factor=None)
    logits = jax.random.normal(jax.random.key(0), (groups, 40, 8))
    decision = decide(router, gating(logits))
    decision = dataclasses.replace(decision, capacity=capacity)
    decision = dataclasses.replace(decision, slot=decision.slot + capacity - 5)
    assert (decision.slot >= capacity).any()  # something is dropped
    ours = _whole_tiles(decision, Exchange(build(Mesh(expert=2), topology_devices("v5e:2x2"), 8)))
    assert ours.capacity == more
    kept = np.asarray(decision.slot < capacity)
    np.testing.assert_array_equal(np.asarray(ours.slot)[kept], np.asarray(decision.slot)[kept])
    assert (np.asarray(ours.slot)[~kept] >= more).all()
    assert _whole_tiles(decision, ONE_DEVICE) is decision


def test_devices_of_this_machine_and_those_that_exchange_nothing_need_no_options():
    for mesh in (build(Mesh(), num_experts=8), build(Mesh(expert=1), topology_devices("v5e:2x2"), 8)):
        exchange = Exchange(mesh)
        assert (exchange.overlaps, exchange.compiler_options) == (False, {})
    told = Exchange(build(Mesh(), topology_devices("v5e:2x2"), 8), overlaps=False)
    assert (told.overlaps, told.compiler_options) == (False, {})


def waits(topology, num_experts, options=None):
    """Whether chips wait for an exchange beside which they have enough to compute."""
    mesh = build(Mesh(), topology_devices(topology), num_experts)
    n, exchange = mesh.shape["expert"], Exchange(mesh)

    def function(x, other, w):
        moved = jax.lax.all_to_all(x, "expert", split_axis=0, concat_axis=0, tiled=True)
        return moved.reshape(-1, 256) @ w, jnp.tanh(jnp.tanh(other @ w) @ w) @ w

    divided = PartitionSpec((*BATCH,))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=(divided, divided, PartitionSpec()), out_specs=divided)
    shapes = [(mesh.size * n, 128, 256), (mesh.size * 8192, 256), (256, 256)]
    with compiling_for(mesh):
        options = exchange.compiler_options if options is None else options
        jitted = jax.jit(mapped, compiler_options=options)
        program = jitted.lower(*(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)).compile()
    assert " all-to-all" in program.as_text()
    return "all-to-all-start(" not in program.as_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "num_experts"),
    [("v5e:4x4", 16), ("v6e:16x16", 8), ("v5p:8x8x8", 16), ("v4:4x4x4", 8), ("v5e:4x8", 8), ("v5p:4x4x4", 32)],
)
def test_chips_compute_while_tokens_travel_where_the_compiler_can(topology, num_experts):
    mesh = build(Mesh(), topology_devices(topology), num_experts)
    assert Exchange(mesh).overlaps == (topology not in ("v5e:4x8", "v5p:4x4x4"))
    assert waits(topology, num_experts) == (not Exchange(mesh).overlaps)


@pytest.mark.slow
def test_a_slice_that_cannot_would_refuse_to_compile():
    with pytest.raises(jax.errors.JaxRuntimeError, match="Async all-to-all not supported on limited ICI"):
        waits("v5e:4x8", 8, {"xla_tpu_enable_async_all_to_all": "true"})


@pytest.mark.slow
def test_parameters_that_are_kept_in_parts_are_brought_together_and_their_gradients_parted():
    kinds, sizes = sent("v5e:2x2", Mesh(expert=2, fsdp=2))
    assert [kind for kind in kinds if kind[0] == "all-to-all"] == [("all-to-all", ("expert",))] * 4
    assert ("all-gather", ("fsdp",)) in kinds
    assert sizes == {SLOTS}


@pytest.mark.slow
def test_fused_experts_exchange_as_much():
    kinds, sizes = sent("v5e:2x2", Mesh(data=2, expert=2), fused=True)
    assert [kind for kind in kinds if kind[0] == "all-to-all"] == [("all-to-all", ("expert",))] * 4
    assert sizes == {SLOTS}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "kind"),
    [
        ("v5e:2x2", "all-to-all"),
        ("v4:2x2x1", "ragged-all-to-all"),
        ("v5p:2x2x1", "ragged-all-to-all"),
        ("v6e:2x2", "ragged-all-to-all"),
    ],
)
def test_rows_without_slots_go_by_the_ragged_form_where_there_is_one(topology, kind):
    kinds, sizes = sent(topology, Mesh(data=2, expert=2), method="ragged")
    rows = [one for one in kinds if one == (kind, ("expert",))]
    numbers = 1 if kind == "all-to-all" else 0  # how many rows come is said by a small all-to-all of its own
    assert len(rows) == 4 + numbers
    # Blocks of the most rows that can go from one device to another; the compiler lets each row of the ragged form take
    # a whole number of words for each column, which are two of bfloat16.
    blocks = 2 * min(2 * 40 * 2, 4 * 2 * C) * 128 * 2
    assert sizes == {blocks if kind == "all-to-all" else 2 * blocks}
