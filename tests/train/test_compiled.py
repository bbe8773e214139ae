"""The real step of a published model, compiled for a slice: what its chips send each other."""

import collections
import math

import jax
import pytest

from jmoe.analysis.bound import CHIPS, bound
from jmoe.analysis.collectives import axes_of, collectives
from jmoe.analysis.hlo import parse
from jmoe.parallel import Mesh, topology_devices
from jmoe.parallel.topology import compiling_for
from jmoe.train.compiled import make_program, rows_of
from jmoe.train.experiment import load_experiment


@pytest.mark.slow
def test_the_step_of_b16_sends_tokens_to_experts_and_gradients_and_nothing_else():
    config = load_experiment("experiments/vmoe_b16_imagenet21k.py", ["data.batch_size=256"])
    program = make_program(config, config.steps, topology_devices("v5e:4x4"))
    assert program.mesh.shape == {"data": 2, "fsdp": 1, "expert": 8, "model": 1}
    with compiling_for(program.mesh):
        compiled = program.step.lower(program.state, program.batch).compile()
    found = collectives(parse(compiled.as_text()))
    counts, sizes = collections.Counter(), collections.defaultdict(set)
    for one in found:
        key = one.kind, axes_of(one.groups, dict(program.mesh.shape))
        counts[key] += one.times
        sizes[key].add(one.bytes)

    # Routing is local: no tokens, gates or one-hot masks are gathered, and all slots are exchanged once in each
    # direction and layer, forward and backward, in bfloat16: one group after the other.
    exchange = "all-to-all", ("expert",)
    assert counts[exchange] == 4 * len(config.model.moe_layers) * 2 == 48
    E, C, D = 8, 416, 768  # of each of the 2 groups of a chip
    assert sizes[exchange] == {E * C * D * 2}
    # Most of the time of the exchange the chip has something to compute.
    chip, coordinates = CHIPS["v5e"], [device.coords for device in program.mesh.devices.flat]
    rows = bound(compiled.as_text(), chip, mesh=dict(program.mesh.shape), coordinates=coordinates).traffic
    (row,) = (row for row in rows if row.kind == "all-to-all")
    assert row.exposed < row.seconds / 2
    # Mixup takes an image and its label from the neighbour.
    (permute,) = (key for key in counts if key[0] == "collective-permute")
    assert max(sizes[permute]) <= 4 * max(math.prod(config.model.image_size) * 3, config.model.num_classes) * 2
    # Everything else is sums: of gradients, over the devices that have the same parameters, and of scalars.
    assert {key[0] for key in counts} == {"all-to-all", "collective-permute", "all-reduce"}
    params = jax.tree.leaves(program.state.params)
    of_a_chip = sum(math.prod(p.sharding.shard_shape(p.shape)) * p.dtype.itemsize for p in params)
    reduced = sum(one.bytes * one.times for one in found if one.kind == "all-reduce")
    assert reduced <= 1.01 * of_a_chip


def test_a_slice_takes_as_many_experts_as_divide_its_chips():
    config = load_experiment("experiments/digits_vmoe.py", ["steps=200", "epochs=none"])
    program = make_program(config, 200, topology_devices("v5e:4x4"))
    assert program.mesh.shape == {"data": 2, "fsdp": 1, "expert": 8, "model": 1}
    assert Mesh(data=2, expert=8) != config.mesh  # which leaves it to the devices
    w_in = program.state.params["blocks"][1]["moe"]["experts"]["w_in"]
    assert w_in.sharding.shard_shape(w_in.shape)[0] == 1
    assert program.batch["image"].sharding.shard_shape(program.batch["image"].shape)[0] == 8
    rows = [row for process in range(4) for row in rows_of(program.batch["image"].sharding, 128, process)]
    assert sorted(rows) == list(range(128))
