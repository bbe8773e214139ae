"""One small step is compiled for a slice; the rest are stand-ins, because compiling takes long."""

import dataclasses
import importlib.metadata
import json
import pathlib

import jax
import pytest

from jmoe import TopK
from jmoe.errors import UserError
from jmoe.parallel import Mesh, build, topology_devices
from jmoe.plan import compiling, plan
from jmoe.plan.memory import Kept, abstract_state, kept, of_refusal
from jmoe.plan.result import mesh_text
from jmoe.train.compiled import make_program
from jmoe.train.experiment import load_experiment
from jmoe.train.optimizer import SGD
from tests.train.tiny import tiny_config

TOPOLOGY = "v5e:2x2"
FOUND = Kept(parameters=1, optimizer=2, other_state=3, batch=4)


def config_of_four_experts(**changes):
    """One sparse block, and no randomness, which takes the compiler long."""
    config = tiny_config(**changes)
    router = TopK(k=1, noise_std=0.0)
    moe = dataclasses.replace(config.model.moe, num_experts=4, router=router, layers=(0,), dropout=0.0)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, depth=1, dropout=0.0, moe=moe))


@pytest.fixture(scope="module")
def planned():
    said = []
    return plan(config_of_four_experts(), TOPOLOGY, Mesh(data=2, expert=2), progress=said.append), said


def test_a_plan_has_the_memory_that_arrays_and_their_sharding_need(planned):
    result, _ = planned
    config = config_of_four_experts()
    names_and_sizes = {"experts": 0, "others": 0}
    state = abstract_state(config, 12)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        names_and_sizes["experts" if "experts" in jax.tree_util.keystr(path) else "others"] += 4 * leaf.size
    parameters = names_and_sizes["experts"] // 2 + names_and_sizes["others"]  # two parts of the experts
    assert result.memory.parameters == parameters
    assert result.memory.optimizer == pytest.approx(2 * parameters, abs=64)  # Adam's moments, and counts of steps
    assert result.memory.batch == 12 * (8 * 8 + 4)  # of 48 images in 4 parts: pixels, and a label in int32
    assert result.fits
    kept_bytes = parameters + result.memory.optimizer + result.memory.other_state + result.memory.batch
    assert result.memory.peak >= kept_bytes + result.memory.temporary
    assert result.memory.activations < 1024  # vector memory holds nearly all of so small a step
    assert result.memory.available == int(15.75 * 2**30)


def test_a_plan_has_the_work_and_the_time_of_a_step(planned):
    result, _ = planned
    assert (result.chips, mesh_text(result.mesh)) == (4, "data=2,expert=2")
    assert result.flops > 0
    assert result.bytes > 0
    rows = {(row.kind, row.axes): row for row in result.bound.traffic}
    # Forward and backward of one sparse block, in a program that may do more with what it has exchanged.
    assert rows["all-to-all", ("expert",)].count >= 2
    assert result.step_seconds >= max(result.roofline["flops"], result.roofline["collectives"], result.bound.seconds)
    assert result.images_per_second == pytest.approx(48 / result.step_seconds)
    assert result.days == pytest.approx(12 * result.step_seconds / 86_400)
    assert result.chip_hours == pytest.approx(4 * 24 * result.days)
    assert result.versions["libtpu"] == importlib.metadata.version("libtpu")


def test_a_plan_is_plain_data_without_anything_that_changes_from_time_to_time(planned):
    result, said = planned
    data = json.loads(json.dumps(result.to_json()))
    assert data["memory_bytes_per_chip"]["peak"] == result.memory.peak
    assert data["step_bound_seconds"]["total"] == result.step_seconds
    assert [row["kind"] for row in data["collectives_per_chip"]] == [row.kind for row in result.bound.traffic]
    assert "compiled in" in said[-1]  # how long it took is told, not kept
    assert "compiled in" not in json.dumps(data)


def test_what_stays_on_a_chip_is_known_without_compiling():
    config = config_of_four_experts(optimizer=SGD(peak_lr=0.1, momentum=0.0, mu_dtype=None))
    state = abstract_state(config, 12)
    devices = topology_devices(TOPOLOGY)
    one = kept(config, state, build(Mesh(data=4), devices, 4))
    fewer = kept(config, state, build(Mesh(data=1, fsdp=4), devices, 4))
    assert fewer.parameters < one.parameters
    assert one.optimizer <= 64  # counts of steps
    assert fewer.batch == one.batch


@pytest.mark.parametrize(
    ("message", "peak", "available"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (51.70G) "
            "exceeds available HBM (15.75G).",
            51.70,
            15.75,
        ),
        (
            "XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 1.5T of 95.00G hbm. Exceeded "
            "hbm capacity by 1.4T.",
            1536.0,
            95.0,
        ),
    ],
)
def test_both_numbers_of_a_refusal_are_read(message, peak, available):
    memory = of_refusal(FOUND, message, 7.0)
    assert (memory.peak, memory.available) == (round(peak * 2**30), round(available * 2**30))
    assert (memory.activations, memory.temporary) == (None, None)
    assert not memory.fits


def test_another_refusal_is_not_taken_for_one_of_memory():
    assert of_refusal(FOUND, "RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.", 7.0) is None


def refusing(monkeypatch, message):
    """The real program, whose step the compiler refuses."""

    class Refused:
        def lower(self, *shapes):
            return self

        def compile(self):
            raise jax.errors.JaxRuntimeError(message)

    def make(*args):
        return dataclasses.replace(make_program(*args), step=Refused())

    monkeypatch.setattr(compiling, "make_program", make)


def test_a_step_that_does_not_fit_is_a_plan_that_says_what_to_change(monkeypatch):
    refusing(monkeypatch, "Ran out of memory on HBM, the total (20.00G) exceeds available HBM (15.75G).")
    said = []
    result = plan(config_of_four_experts(), TOPOLOGY, Mesh(data=4), progress=said.append)
    assert not result.fits
    assert (result.flops, result.step_seconds, result.days, dict(result.roofline)) == (None, None, None, {})
    assert result.notes[0] == (
        "It does not fit: a chip needs 20.00 GiB and has 15.75 GiB, 4.25 GiB too little. "
        "What would help, each by itself:"
    )
    assert result.notes[1].startswith("--set model.remat=true keeps")
    assert "does not fit" in said[-1]
    assert json.dumps(result.to_json())


def test_another_refusal_is_one_sentence(monkeypatch):
    refusing(monkeypatch, "INTERNAL: Mosaic failed\nto compile")
    with pytest.raises(
        UserError, match=r"^The compiler for v5e:2x2 refuses the step: INTERNAL: Mosaic failed to compile$"
    ):
        plan(config_of_four_experts(), TOPOLOGY, Mesh(data=4))


@pytest.mark.parametrize(
    ("topology", "mesh", "sentence"),
    [
        ("v5e:3x4", Mesh(), r"There is no TPU topology 'v5e:3x4': .* The nearest is v5e:4x4\."),
        (TOPOLOGY, Mesh(data=3), r"Mesh\(data=3\) is for a multiple of 3 devices; there are 4"),
        (TOPOLOGY, Mesh(expert=3), "divides the experts by 3, which num_experts=4 does not allow"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_compiled(topology, mesh, sentence):
    with pytest.raises(UserError, match=sentence):
        plan(config_of_four_experts(), topology, mesh)


def test_a_batch_that_does_not_split_is_refused():
    config = config_of_four_experts()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=8))
    with pytest.raises(UserError, match="8 images in groups of 4 cannot be divided among 4 devices"):
        plan(config, TOPOLOGY, Mesh(data=4))


@pytest.mark.slow
def test_the_compiler_refuses_what_is_too_large_and_takes_what_is_advised():
    experiment = pathlib.Path(__file__).parents[2] / "experiments/vmoe_s32_imagenet1k.py"
    small = ["model.depth=2", "model.moe.layers=(1,)", "mixup=0.0", "data.batch_size=65536"]
    refused = plan(load_experiment(experiment, small), TOPOLOGY)
    assert not refused.fits
    assert refused.memory.peak > refused.memory.available
    (advised,) = [note for note in refused.notes if note.startswith("--set accumulate=")]
    override = advised.split()[1]
    accepted = plan(load_experiment(experiment, [*small, override]), TOPOLOGY)
    assert accepted.fits
    assert accepted.flops > 0


@pytest.mark.slow
def test_a_batch_in_parts_sends_tokens_for_each_part(planned):
    config = config_of_four_experts()
    data = dataclasses.replace(config.data, batch_size=2 * config.data.batch_size)
    parts = plan(dataclasses.replace(config, data=data, accumulate=2), TOPOLOGY, Mesh(data=2, expert=2))
    whole = planned[0]
    assert parts.bound.uncounted == {}
    sent = [next(row for row in one.bound.traffic if row.kind == "all-to-all").bytes for one in (whole, parts)]
    assert sent[1] == 2 * sent[0]
    assert parts.flops > 1.5 * whole.flops
