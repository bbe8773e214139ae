import dataclasses
import re

import pytest

from jmoe.analysis.bound import Bound
from jmoe.cli.plan import parse_mesh
from jmoe.parallel import Mesh, build, topology_devices
from jmoe.plan.advice import advice
from jmoe.plan.memory import abstract_state, kept
from jmoe.plan.result import Memory, Plan
from jmoe.train.compiled import check_batch, mesh_of
from jmoe.train.optimizer import SGD, AdamW
from jmoe.train.overrides import apply_overrides
from tests.train.tiny import tiny_config

GIB = 2**30
SLICE = topology_devices("v5e:4x4")


def advise(config, *, topology="v5e:4x4", mesh=None, peak=40 * GIB, available=15 * GIB, bound=None, **fields):
    mesh = mesh or Mesh(data=16, expert=1)
    built = build(mesh, topology_devices(topology), 3)
    state = abstract_state(config, 12)
    memory = {"parameters": 2 * GIB, "optimizer": 4 * GIB, "other_state": 0, "batch": 0}
    memory |= {"activations": None, "temporary": None} | fields
    plan = Plan(
        topology=topology,
        mesh=dict(built.shape),
        batch_size=config.data.batch_size,
        steps=config.steps,
        memory=Memory(**memory, peak=peak, available=available),
        flops=None,
        bytes=None,
        bound=bound,
        notes=(),
        versions={},
    )
    return advice(config, plan, built, state)


def large(*, batch_size=16 * 12, images_per_group=1, **changes):
    config = tiny_config(optimizer=AdamW(peak_lr=1e-2), **changes)
    assert config.model.moe is not None
    moe = dataclasses.replace(config.model.moe, images_per_group=images_per_group)
    model, data = dataclasses.replace(config.model, moe=moe), dataclasses.replace(config.data, batch_size=batch_size)
    return dataclasses.replace(config, model=model, data=data)


def test_advice_has_the_numbers_of_the_plan():
    first, *rest = advise(large())
    assert first.startswith("It does not fit: a chip needs 40.00 GiB and has 15.00 GiB, 25.00 GiB too little.")
    assert rest[0].startswith("--set model.remat=true keeps what goes into a block")
    assert "34.00 GiB of temporary memory" in rest[0]  # 40 less parameters and optimizer
    # 34 GiB in 4 parts are below the 9 that are left, in 3 they are not; 3 does not matter, as 12 images have both.
    assert rest[1].startswith("--set accumulate=4 computes the 12 images of a chip in 4 parts: about 8.50 GiB")
    assert rest[2].startswith("--set data.batch_size=48 saves as much and changes the recipe")
    assert any(
        re.match(r"--mesh data=\d+,fsdp=\d+ keeps parameters and optimizer in \d+ parts: ", line) for line in rest
    )
    assert any(
        line == "--set optimizer.mu_dtype=bfloat16 keeps the mean of gradients in half: 1.00 GiB." for line in rest
    )


def test_accumulation_that_is_set_is_multiplied():
    lines = advise(large(accumulate=3))
    assert any(line.startswith("--set accumulate=12 computes the 4 images of a chip in 4 parts") for line in lines)


@pytest.mark.parametrize(
    ("mesh", "images_per_group", "accumulate"),
    [(Mesh(), 8, 1), (Mesh(data=16, expert=1), 6, 2), (Mesh(fsdp=2, model=2), 3, 1)],
)
def test_what_is_advised_is_not_refused(mesh, images_per_group, accumulate):
    config = large(batch_size=16 * 48, images_per_group=images_per_group, accumulate=accumulate, mesh=mesh)
    lines = advise(config, mesh=mesh)
    sets = [found[1] for line in lines if (found := re.match(r"--set (accumulate=\d+|data\.batch_size=\d+) ", line))]
    assert len(sets) == 2  # 34 GiB and 9 left: 4 parts of whole groups, or 6 where 4 cut one
    for one in sets:
        changed = apply_overrides(config, [one])
        check_batch(changed.data.batch_size // changed.accumulate, changed, mesh_of(changed, SLICE))
    (more,) = [found for line in lines if (found := re.match(r"--topology (\S+)(?: --mesh (\S+))? has twice", line))]
    changed = dataclasses.replace(config, mesh=parse_mesh(more[2])) if more[2] else config
    check_batch(16 * 48 // accumulate, changed, mesh_of(changed, topology_devices(more[1])))
    assert (more[2] is None) == (mesh.data is None)


def test_no_part_of_a_batch_cuts_a_group():
    config = large(batch_size=16 * 16, images_per_group=8)  # on each chip two groups, which 4 parts would cut
    assert not any("accumulate" in line or "batch_size" in line for line in advise(config))
    assert any(line.startswith("--set accumulate=2 computes the 16 images") for line in advise(config, peak=20 * GIB))


def test_what_is_done_already_is_not_advised():
    config = large()
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, remat=True), optimizer=SGD(peak_lr=0.1, mu_dtype="bfloat16")
    )
    lines = "\n".join(advise(config))
    assert "remat" not in lines
    assert "mu_dtype" not in lines


def test_more_chips_are_advised_where_the_batch_splits_and_they_exist():
    config = large(batch_size=16 * 16)
    assert any(line.startswith("--topology v5e:4x8 has twice the chips") for line in advise(config))
    assert not any("--topology" in line for line in advise(large(batch_size=16 * 3)))
    assert not any("--topology" in line for line in advise(large(images_per_group=4)))  # 3 groups a chip
    largest = large(batch_size=512 * 4)
    lines = advise(largest, topology="v5e:16x16", mesh=Mesh(data=256, expert=1))
    assert not any("--topology" in line for line in lines)


def test_the_advised_mesh_is_one_that_exists_and_keeps_less():
    config = large()
    lines = [line for line in advise(config) if line.startswith("--mesh")]
    (axes,) = re.findall(r"--mesh (\S+) ", lines[0])
    sizes = {name: int(size) for name, size in (part.split("=") for part in axes.split(","))}
    devices = topology_devices("v5e:4x4")
    state = abstract_state(config, 12)
    after = kept(config, state, build(Mesh(**sizes), devices, 3)).total
    assert after < kept(config, state, build(Mesh(data=16), devices, 3)).total


def test_what_fits_needs_no_advice_but_says_what_it_leaves_out():
    bound = Bound(compiler=1.0, kernels=0.0, others=0.0, uncounted={"while": 2, "kernel": 1})
    assert advise(large(), peak=GIB, bound=bound) == (
        "Not in the bound of the step, for want of a figure: 1 x kernel, 2 x while (a loop counts once).",
    )


def test_epochs_want_the_steps_that_only_the_dataset_knows():
    config = dataclasses.replace(large(), steps=None, epochs=2.5)
    bound = Bound(compiler=1.0, kernels=0.0, others=0.0, uncounted={})
    assert advise(config, peak=GIB, bound=bound) == (
        "The recipe has epochs=2.5, and a plan opens no dataset: for days and chip-hours, give --set epochs=none "
        "--set steps=N, where N is epochs * images / batch_size.",
    )


def test_what_saves_next_to_nothing_is_not_advised():
    assert not any("mu_dtype" in line for line in advise(large(), parameters=GIB // 2))


@pytest.mark.parametrize("images", [16 * 4, 16])
def test_a_chip_with_nothing_left_gets_no_advice_to_accumulate(images):
    config = large(batch_size=images)
    lines = advise(config, parameters=14 * GIB)
    assert not any("accumulate" in line for line in lines)
