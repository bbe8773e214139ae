import dataclasses

import pytest

from jmoe.analysis.bound import Bound
from jmoe.analysis.cost import forward_cost
from jmoe.errors import UserError
from jmoe.parallel import Mesh
from jmoe.plan import sweep, sweeping
from jmoe.plan.result import Memory, Plan, mesh_text
from jmoe.plan.sweeping import estimated_traffic
from tests.train.tiny import tiny_config

TOPOLOGY = "v5e:2x4"


def config():
    tiny = tiny_config()
    moe = dataclasses.replace(tiny.model.moe, num_experts=4)
    data = dataclasses.replace(tiny.data, batch_size=64)
    return dataclasses.replace(tiny, model=dataclasses.replace(tiny.model, moe=moe), data=data)


@pytest.fixture
def compiled(monkeypatch):
    """Meshes in the order of planning; a step takes as many seconds as data, and expert=4 does not fit."""
    meshes = []

    def fake(config, topology, mesh, progress):
        meshes.append(mesh)
        axes = {name: getattr(mesh, name) for name in ("data", "fsdp", "expert", "model")}
        fits = mesh.expert != 4
        memory = Memory(
            parameters=1,
            optimizer=1,
            other_state=0,
            batch=1,
            activations=1,
            temporary=1,
            peak=1 if fits else 9,
            available=5,
        )
        bound = Bound(compiler=float(mesh.data), kernels=0.0, others=0.0, uncounted={}) if fits else None
        return Plan(
            topology=topology,
            mesh=axes,
            batch_size=64,
            steps=12,
            memory=memory,
            flops=1.0 if fits else None,
            bytes=1.0 if fits else None,
            bound=bound,
            notes=(),
            versions={},
        )

    monkeypatch.setattr(sweeping, "plan", fake)
    return meshes


def test_those_that_fit_come_first_and_the_fastest_of_them(compiled):
    found = sweep(config(), TOPOLOGY, tries=20)
    fits = [one.fits for one in found.plans]
    assert sorted(fits, reverse=True) == fits
    seconds = [one.step_seconds for one in found.plans if one.fits]
    assert seconds == sorted(seconds)
    assert {mesh.expert for mesh in compiled} == {1, 2, 4}
    assert {mesh.fsdp for mesh in compiled} >= {1, 2}


@pytest.mark.parametrize("fits_from", [6, 99])
def test_a_sweep_goes_on_until_one_fits(fits_from, compiled, monkeypatch):
    fake = sweeping.plan

    def later(config, topology, mesh, progress):
        one = fake(config, topology, mesh, progress=progress)
        fits = len(compiled) >= fits_from
        bound = Bound(compiler=1.0, kernels=0.0, others=0.0, uncounted={}) if fits else None
        values = {"bound": bound, "flops": 1.0 if fits else None, "bytes": 1.0 if fits else None}
        return dataclasses.replace(one, memory=dataclasses.replace(one.memory, peak=1 if fits else 9), **values)

    monkeypatch.setattr(sweeping, "plan", later)
    said = []
    found = sweep(config(), TOPOLOGY, tries=3, progress=said.append)
    possible = len(found.plans) + sum("number" in reason for reason in found.skipped.values())
    assert possible > 6
    assert len(compiled) == len(found.plans) == min(max(3, fits_from), possible)
    assert found.plans[0].fits == (fits_from <= possible)
    assert ["none fits yet" in line for line in said] == [rank > 3 for rank in range(1, len(said) + 1)]


def test_what_is_not_compiled_is_said_with_the_reason(compiled):
    said = []
    found = sweep(config(), TOPOLOGY, tries=3, progress=said.append)
    assert len(compiled) == 3
    assert [line[:5] for line in said] == ["[1/3]", "[2/3]", "[3/3]"]
    tried = {mesh_text(one.mesh) for one in found.plans}
    assert not tried & set(found.skipped)
    reasons = " | ".join(found.skipped.values())
    assert "number 4 by an estimate of what a chip sends" in reasons
    assert "model=4 does not divide the 2 heads" in reasons
    assert found.to_json()["skipped"] == found.skipped


def test_groups_that_do_not_split_and_memory_that_is_not_there_are_reasons(compiled, monkeypatch):
    small = config()
    small = dataclasses.replace(small, data=dataclasses.replace(small.data, batch_size=16))
    found = sweep(small, TOPOLOGY, tries=20)
    assert "16 images in groups of 4 cannot be divided among 8 devices" in found.skipped["data=8"]
    monkeypatch.setattr(sweeping, "available_memory", lambda topology: 100.0)
    with pytest.raises(UserError, match=r"No mesh of v5e:2x4 can take the experiment: .*state and batch alone take"):
        sweep(config(), TOPOLOGY)


def test_a_mesh_that_the_compiler_refuses_is_skipped(compiled, monkeypatch):
    def refuses(config, topology, mesh, progress):
        raise UserError(f"refused {mesh}")

    monkeypatch.setattr(sweeping, "plan", refuses)
    with pytest.raises(UserError, match="refused Mesh"):
        sweep(config(), TOPOLOGY, tries=2)


def test_more_of_an_axis_sends_what_it_should():
    small = config()
    cost = forward_cost(small.model)
    experts, others = cost.parts["experts"].parameters, cost.parameters - cost.parts["experts"].parameters

    def sent(**axes):
        return estimated_traffic(small, cost, Mesh(**axes))

    assert sent(data=1, expert=1) == 0.0
    assert sent(data=8, expert=1) == 2 * 4 * (others + experts)  # the sum of all gradients, there and back
    tokens = 64 / 8 * small.model.tokens * small.model.width * 2  # of a chip, in bytes
    exchanged = 4 * 1.05 * tokens * 3 / 4  # one sparse block, one expert for each token
    assert sent(data=2, expert=4) == pytest.approx(2 * 4 * (others + experts / 4) + exchanged)
    assert sent(data=1, fsdp=8, expert=1) == pytest.approx(3 * 4 * (others + experts) * 7 / 8)
    assert sent(data=1, expert=1, model=2) == pytest.approx(8 * 2 * 8 * tokens / 2)  # two blocks, all images
