"""The exchange: index arithmetic against loops, and what is sent in programs compiled for TPU slices."""

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
from jmoe.parallel import Exchange, Mesh, build, shardings, topology_devices
from jmoe.parallel.exchange import _block_places, _sorted_places
from jmoe.parallel.mesh import BATCH
from jmoe.parallel.topology import compiling_for

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


def sent(topology, mesh, **options):
    """(kind, axes) of every exchange in value and gradient of a layer, and how many bytes each of an all-to-all has."""
    devices = build(mesh, topology_devices(topology), 8)
    router = TopK(k=2, capacity_factor=1.05)
    config = MoEConfig(num_experts=8, hidden_dim=256, router=router, images_per_group=2, **options)
    graph, state = nnx.split(nnx.eval_shape(lambda: MoEMlp(config, 128, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))
    where = shardings(state, devices)
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, where)
    x = jax.ShapeDtypeStruct((16, 20, 128), jnp.float32, sharding=NamedSharding(devices, PartitionSpec(BATCH)))
    exchange = Exchange(devices)

    def loss(state, x):
        output = nnx.merge(graph, state)(x, key=jax.random.key(0), exchange=exchange)
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
