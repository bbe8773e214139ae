"""The plans of the published models that lie beside the experiments, each made by the command in it."""

import importlib.util
import json
import pathlib
import shlex
import subprocess
import sys

import pytest

from jmoe.cli.main import main
from jmoe.cli.plan import parse_mesh
from jmoe.parallel import build, topology_devices
from jmoe.plan.memory import abstract_state, kept
from jmoe.plan.result import mesh_text
from jmoe.train.experiment import load_experiment

ROOT = pathlib.Path(__file__).parents[2]
PLANS = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "experiments/plans").glob("*.json"))}
PUBLISHED = ("vmoe_s32_imagenet1k", "vmoe_b16_imagenet21k", "vmoe_l16_imagenet21k", "vmoe_h14_imagenet21k")


def test_there_is_a_plan_for_every_published_model_and_slice():
    wanted = {f"{name}_{topology}" for name in PUBLISHED for topology in ("v5e_16x16", "v5p_8x8x8")}
    assert wanted | {"vmoe_15b_imagenet21k_v5p_8x8x8"} == PLANS.keys()


@pytest.mark.parametrize("name", PLANS)
def test_it_fits_and_adds_up(name):
    plan = PLANS[name]
    memory = plan["memory_bytes_per_chip"]
    stays = memory["parameters"] + memory["optimizer"] + memory["other_state"] + memory["batch"]
    assert plan["fits"] is True
    assert 0 < memory["activations"] < memory["temporary"]
    assert stays + memory["temporary"] <= memory["peak"] <= memory["available"]
    total = plan["step_bound_seconds"]["total"]
    parts = {part: seconds for part, seconds in plan["step_bound_seconds"].items() if part != "total"}
    assert total >= sum(parts.values()) - 1e-12
    assert plan["chip_hours"] == pytest.approx(plan["steps"] * total / 3600 * plan["chips"])
    assert plan["images_per_second"] == pytest.approx(plan["batch_size"] / total)
    exposed = sum(row["exposed"] for row in plan["collectives_per_chip"])
    assert parts["collectives"] == pytest.approx(exposed)


@pytest.mark.parametrize("name", PLANS)
def test_the_command_in_it_makes_this_file(name):
    plan = PLANS[name]
    words = shlex.split(plan["command"])
    assert words[:2] == ["jmoe", "plan"]
    assert words[-1] == "--json"
    assert name == f"{pathlib.Path(words[2]).stem}_{plan['topology'].replace(':', '_')}"


def what_stays(plan):
    config = load_experiment(ROOT / plan["experiment"])
    moe = config.model.moe
    mesh = build(parse_mesh(mesh_text(plan["mesh"])), topology_devices(plan["topology"]), moe.num_experts)
    found = kept(config, abstract_state(config, config.steps), mesh)
    return config, found


@pytest.mark.parametrize(
    "name", [name if "s32" in name else pytest.param(name, marks=pytest.mark.slow) for name in PLANS]
)
def test_it_is_of_the_experiment_as_it_is(name):
    plan = PLANS[name]
    config, found = what_stays(plan)
    memory = plan["memory_bytes_per_chip"]
    assert (config.steps, config.data.batch_size) == (plan["steps"], plan["batch_size"])
    assert (found.parameters, found.optimizer) == (memory["parameters"], memory["optimizer"])
    assert (found.other_state, found.batch) == (memory["other_state"], memory["batch"])


def test_a_plan_is_made_again_by_its_command_if_it_fits(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("make", ROOT / "experiments/plans/make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    ran, printed = [], {"command": "jmoe plan e.py --json", "fits": True, "new": 1}

    def run(words, **options):
        ran.append(words)
        return subprocess.CompletedProcess(words, 0, stdout=json.dumps(printed))

    monkeypatch.setattr(make.subprocess, "run", run)
    path = tmp_path / "e.json"
    path.write_text(json.dumps({"command": "jmoe plan e.py --json"}))
    make.make(path)
    assert ran == [[sys.executable, "-m", "jmoe", "plan", "e.py", "--json"]]
    assert json.loads(path.read_text()) == printed
    printed |= {"fits": False, "new": 2}
    with pytest.raises(SystemExit, match=r"e\.json does not fit"):
        make.make(path)
    assert json.loads(path.read_text())["new"] == 1


@pytest.mark.slow
def test_compiling_again_gives_the_same_plan(capsys, monkeypatch):
    """If not, the step has changed, and experiments/plans/make.py makes the plans again. With other versions of the
    compiler only what does not depend on it is compared.
    """
    monkeypatch.chdir(ROOT)
    before = PLANS["vmoe_s32_imagenet1k_v5e_16x16"]
    assert main(shlex.split(before["command"])[1:]) == 0
    after = json.loads(capsys.readouterr().out)
    same = after["versions"] == before["versions"]
    assert after["fits"]
    assert after["flops_per_chip"] == pytest.approx(before["flops_per_chip"], rel=0.01)
    for part in ("parameters", "optimizer", "other_state", "batch", "available"):
        assert after["memory_bytes_per_chip"][part] == before["memory_bytes_per_chip"][part]
    if same:
        assert after["memory_bytes_per_chip"] == before["memory_bytes_per_chip"]
        bytes_and_axes = [
            [(t["kind"], t["axes"], t["bytes"]) for t in p["collectives_per_chip"]] for p in (before, after)
        ]
        assert bytes_and_axes[0] == bytes_and_axes[1]
