"""The commands on a real run, as a user types them."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest

import jmoe
from jmoe.cli.main import main

ROOT = pathlib.Path(jmoe.__file__).parents[1]
EXPERIMENT = """
from tests.train.tiny import tiny_config

def get_config():
    return tiny_config()
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    path = tmp_path_factory.mktemp("experiments") / "tiny vmöe.py"  # a space and an umlaut, as paths have them
    path.write_text(EXPERIMENT)
    return path


@pytest.fixture(scope="module", autouse=True)
def datasets(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JMOE_DATA_DIR", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def interrupted(experiment, tmp_path_factory):
    """A run of the command that got Ctrl-C after its first line, with its folder."""
    workdir = tmp_path_factory.mktemp("runs") / "a b"
    command = [
        sys.executable,
        "-m",
        "jmoe",
        "train",
        str(experiment),
        "--workdir",
        str(workdir),
        "--set",
        "steps=100000",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    return workdir, process.returncode, first + out, err


def test_ctrl_c_saves_says_where_and_exits_130(interrupted):
    workdir, status, out, err = interrupted
    assert status == 130
    assert out.startswith("step 3/100000  loss ")
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("jmoe: Stopped after step ")
    assert last.endswith(f" of 100000, saved in {workdir}. Run the same command to go on.")
    assert os.listdir(workdir / "checkpoints")


def test_what_was_interrupted_can_be_evaluated(interrupted, experiment, capsys):
    workdir = interrupted[0]
    arguments = ["evaluate", str(experiment), "--workdir", str(workdir), "--set", "steps=100000"]
    assert main(arguments) == 0
    assert " % of 360 images\n" in capsys.readouterr().out
    assert main([*arguments, "--json", "--set", "model.moe.router=TopK(k=1, capacity_factor=none, capacity=1)"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["images"] == 360
    assert result["dropped_tokens"] > 0.5


def test_the_features_of_what_was_interrupted_can_be_evaluated_by_a_few_images(interrupted, experiment, capsys):
    workdir = interrupted[0]
    arguments = ["evaluate", str(experiment), "--workdir", str(workdir), "--set", "steps=100000", "--fewshot"]
    assert main([*arguments, "--set", "evaluate.fewshot=FewShot(shots=(1, 25))"]) == 0
    step, head, digits, l2 = capsys.readouterr().out.splitlines()
    assert step.startswith("step  ")
    assert head.split() == ["few-shot", "1-shot", "25-shot"]
    assert digits.startswith("digits ")
    assert digits.endswith(" %  of 360 images")
    assert l2.endswith("chosen on the test images")
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert list(result["accuracy"]["digits"]) == list(result["l2"]) == ["1", "5", "10", "25"]
    assert main([*arguments, "--set", "evaluate.fewshot=FewShot(shots=(500,))"]) == 2
    assert "digits: 500 shots need 500 training images of every class, and class 8 has 138: " in capsys.readouterr().err


def test_the_commands_refuse_in_one_line(interrupted, experiment, capsys):
    workdir = interrupted[0]
    assert main(["train", str(experiment), "--workdir", str(workdir)]) == 2
    assert main(["evaluate", str(experiment), "--workdir", str(workdir), "--set", "model.width=16"]) == 2
    assert main(["evaluate", str(experiment), "--workdir", str(workdir), "--step", "77777"]) == 2
    first, second, third = capsys.readouterr().err.strip().splitlines()[-3:]
    assert first.startswith("jmoe: ")
    assert "holds another experiment: steps: 100000 -> 12 (there -> here)." in first
    assert "of another model: the checkpoint and the model have float32 (1, 1, 8) and float32 (1, 1, 16) at" in second
    assert "There is no checkpoint of step 77777 in" in third
