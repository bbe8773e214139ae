"""The command with plans that are given; tests/plan compiles one."""

import importlib.util
import json
import shlex

import pytest

import jmoe.plan
from jmoe.analysis.bound import Bound
from jmoe.analysis.collectives import Traffic
from jmoe.cli.main import main
from jmoe.cli.plan import parse_mesh
from jmoe.errors import UserError
from jmoe.parallel import Mesh, topology_devices
from jmoe.plan import Memory, Plan, Sweep

EXPERIMENT = "experiments/digits_vmoe.py"
GIB = 2**30
EXCHANGE = Traffic(kind="all-to-all", axes=("expert",), count=4, bytes=10**9, sent=875e6, seconds=0.006, exposed=0.002)


def planned(topology="v5e:2x2", mesh=None, *, fits=True, steps=1000):
    axes = {"data": (mesh.data if mesh and mesh.data else 4), "fsdp": 1, "expert": 1, "model": 1}
    return Plan(
        topology=topology,
        mesh=axes,
        batch_size=128,
        steps=steps,
        memory=Memory(
            parameters=GIB,
            optimizer=2 * GIB,
            other_state=0,
            batch=1,
            activations=2 * GIB if fits else None,
            temporary=3 * GIB if fits else None,
            peak=6 * GIB if fits else 20 * GIB,
            available=int(15.75 * GIB),
        ),
        flops=197e9 if fits else None,
        bytes=819e6 if fits else None,
        bound=Bound(compiler=0.05, kernels=0.02, others=0.001, collectives=0.002, traffic=(EXCHANGE,), uncounted={})
        if fits
        else None,
        notes=() if fits else ("It does not fit: a chip needs more.",),
        versions={"jmoe": "0.1.0", "jax": "0.10.2", "libtpu": "0.0.42"},
    )


@pytest.fixture
def asked(monkeypatch):
    """What was planned: (topology, mesh, seed) of each; v6e does not fit."""
    calls = []

    def fake(config, topology, mesh=None, progress=None):
        calls.append((topology, mesh, config.seed))
        progress(f"{topology}: compiled in 3 s")
        return planned(topology, mesh, fits=not topology.startswith("v6e"))

    monkeypatch.setattr(jmoe.plan, "plan", fake)
    return calls


def test_a_plan_is_text_that_says_bound_and_chip(asked, capsys):
    assert main(["plan", EXPERIMENT, "--topology", "v5e:2x2", "--set", "seed=7"]) == 0
    assert asked == [("v5e:2x2", None, 7)]
    out, err = capsys.readouterr()
    assert err == "v5e:2x2: compiled in 3 s\n"
    assert out.splitlines() == [
        "experiments/digits_vmoe.py compiled for v5e:2x2, not run: 4 chips, data=4",
        "with jmoe 0.1.0, jax 0.10.2, libtpu 0.0.42",
        "",
        "memory of a chip, GiB",
        "  parameters         1.000",
        "  optimizer          2.000",
        "  other state        0.000",
        "  batch              0.000",
        "  activations        2.000: from the forward to the backward pass, a part of temporary",
        "  temporary          3.000: activations, gradients and workspace",
        "  peak               6.000 of 15.750: fits",
        "",
        "work of a chip in a step of 128 images",
        "  FLOPs         0.197 TFLOP      1.00 ms at 197 TFLOP/s",
        "  memory        0.819 GB         1.00 ms at 819 GB/s, if none stayed on the chip",
        "  sent          0.875 GB         4.38 ms at 200 GB/s, all links",
        "    all-to-all along expert: 4 x, 0.875 GB, 6.00 ms at least, 2.00 ms of them waiting",
        "",
        "a step takes at least 73.00 ms: 50.00 by the compiler, 20.00 of kernels, 1.00 of gathers, scatters and sorts, "
        "2.00 waiting for other chips",
        "at most 1,753 images/s",
        "1,000 steps take at least 0.00084 days and 0.081 chip-hours",
    ]


def test_a_plan_as_json_holds_the_command_that_made_it(asked, capsys):
    words = ["plan", EXPERIMENT, "--topology", "v5e:2x2", "--mesh", "data=2", "--set", "seed=7", "--json"]
    assert main(words) == 0
    data = json.loads(capsys.readouterr().out)
    assert shlex.split(data["command"]) == ["jmoe", *words]
    assert data["experiment"] == EXPERIMENT
    assert data["fits"] is True
    assert data["memory_bytes_per_chip"]["peak"] == 6 * GIB
    assert data["collectives_per_chip"][0]["axes"] == ["expert"]
    assert data["step_bound_seconds"]["total"] == pytest.approx(0.073)
    assert data["roofline_seconds"]["flops"] == pytest.approx(0.001)
    assert data["chip_hours"] == pytest.approx(1000 * 0.073 / 3600 * 2)


def test_plans_side_by_side_are_columns(asked, capsys):
    words = ["--compare", "v6e:2x2", "data=2,expert=2", "v5p:2x2x1/data=4"]
    assert main(["plan", EXPERIMENT, "--topology", "v5e:2x2", *words]) == 0
    assert asked == [
        ("v5e:2x2", None, 0),
        ("v6e:2x2", None, 0),
        ("v5e:2x2", Mesh(data=2, expert=2), 0),
        ("v5p:2x2x1", Mesh(data=4), 0),
    ]
    title, *shown = capsys.readouterr().out.splitlines()
    assert title.endswith("temporary has activations, gradients and workspace")
    lines = {line[:22].strip(): line[22:].split() for line in shown}
    assert lines["topology"] == ["v5e:2x2", "v6e:2x2", "v5e:2x2", "v5p:2x2x1"]
    assert lines["activations GiB"] == ["2.000", "-", "2.000", "2.000"]
    assert lines["fits"] == ["yes", "NO", "yes", "yes"]
    assert lines["step ms, at least"] == ["73.00", "-", "73.00", "73.00"]
    assert "It does not fit: a chi" in lines


@pytest.mark.parametrize(
    ("last", "sentence"),
    [
        ("v5e:3x3", "There is no TPU topology 'v5e:3x3'"),
        ("data=3", "Mesh(data=3) is for a multiple of 3 devices; there are 4"),
        ("v5e:8x8", "128 images in groups of 8 cannot be divided among 64 devices"),
        ("v5e:2x4/model=8", "model=8 does not divide the "),
    ],
)
def test_a_mistake_in_the_last_of_several_costs_nothing(last, sentence, asked, capsys):
    assert main(["plan", EXPERIMENT, "--topology", "v5e:2x2", "--compare", "v6e:2x2", last]) == 2
    assert capsys.readouterr().err.startswith(f"jmoe: {sentence}")
    assert asked == []


def test_plans_side_by_side_are_a_list_in_json(asked, capsys):
    assert main(["plan", EXPERIMENT, "--topology", "v5e:2x2", "--compare", "v6e:2x2", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [one["fits"] for one in data["plans"]] == [True, False]
    assert data["plans"][1]["step_bound_seconds"] is None


def test_a_sweep_is_a_ranking_with_what_was_left_out(monkeypatch, capsys):
    asked = []

    def fake(config, topology, tries, progress):
        asked.append((topology, tries))
        return Sweep(plans=(planned(),), skipped={"data=2,fsdp=2": "number 7 by an estimate"})

    monkeypatch.setattr(jmoe.plan, "sweep", fake)
    assert main(["plan", EXPERIMENT, "--topology", "v5e:2x2", "--sweep", "--tries", "3"]) == 0
    assert main(["plan", EXPERIMENT, "--topology", "v5e:2x2", "--sweep", "--json"]) == 0
    assert asked == [("v5e:2x2", 3), ("v5e:2x2", 6)]
    text, _, data = capsys.readouterr().out.partition("{")
    assert text.endswith("not compiled:\n  data=2,fsdp=2: number 7 by an estimate\n")
    assert json.loads("{" + data)["skipped"] == {"data=2,fsdp=2": "number 7 by an estimate"}


def test_a_mesh_is_written_as_axes_with_numbers():
    assert parse_mesh("data=8,expert=32") == Mesh(data=8, expert=32)
    assert parse_mesh("fsdp=2, model=4") == Mesh(fsdp=2, model=4)
    assert parse_mesh("Mesh(data=4, expert=1)") == Mesh(data=4, expert=1)  # as messages advise
    for text, wrong in (
        ("data", "data has no number of at least 1"),
        ("data=0", "data has no number of at least 1"),
        ("replica=8", "there is no axis 'replica'"),
        ("data=2,data=4", "data is there twice"),
        ("data=two", "data has no number of at least 1"),
        ("", "there is no axis ''"),
    ):
        with pytest.raises(UserError, match=f"A mesh is written as data=8,expert=32, of .*; in '{text}' {wrong}"):
            parse_mesh(text)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--topology", "v5e:3x3"],
            "There is no TPU topology 'v5e:3x3': slices of v5e are 1x1, 2x2, 2x4",
        ),
        (["--topology", "v9:2x2"], "There is no TPU topology 'v9:2x2'; use one of v4, v5e, v5p, v6e"),
        (["--topology", "v5e:2x2", "--mesh", "data=3"], "Mesh(data=3) is for a multiple of 3 devices; there are 4:"),
        (
            ["--topology", "v5e:2x2", "--mesh", "expert=3"],
            "Mesh(expert=3) divides the experts by 3, which num_experts=8",
        ),
        (
            ["--topology", "v5e:2x2", "--set", "data.batch_size=104"],
            "104 images in groups of 8 cannot be divided among",
        ),
        (["--topology", "v5e:2x2", "--tries", "2"], "--tries is for --sweep, and at least 1; it is 2."),
        (["--topology", "v5e:2x2", "--sweep", "--mesh", "data=4"], "--sweep tries meshes by itself; leave out --mesh"),
    ],
)
def test_a_mistake_is_one_sentence(words, sentence, capsys):
    assert main(["plan", EXPERIMENT, *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"jmoe: {sentence}")


def test_without_the_compiler_it_says_which_extra_to_install(capsys, monkeypatch):
    topology_devices.cache_clear()
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else found(name, *rest)
    )
    assert main(["plan", EXPERIMENT, "--topology", "v5e:2x2"]) == 2
    assert "needs its compiler, libtpu: pip install 'jmoe[plan]'." in capsys.readouterr().err
