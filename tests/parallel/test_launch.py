"""The recipes of launch/: they parse, and so does every `jmoe` command in them."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml  # orbax-checkpoint needs it

from jmoe.cli import main as cli
from jmoe.errors import LOST, STUCK
from jmoe.parallel.startup import Addresses, check
from jmoe.train.experiment import load_experiment

ROOT = pathlib.Path(cli.__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
VARIABLES = {"processes": "8", "process": "7", "PORT": "12345"}  # others are names of folders


def commands(text):
    """Every `jmoe train` of a text as words, its variables filled in."""
    text = re.sub(r"\\\n\s*", " ", text)
    found = []
    for line in re.findall(
        r"(?:^|&&)[ \t]*(?:exec |nohup |srun (?:--\S+ +)*|CUDA_VISIBLE_DEVICES=\S+ +)?(jmoe train .*)", text, re.M
    ):
        line = re.split(r" > | &$", line)[0]
        line = line.removesuffix("'")  # of a command in quotes
        line = re.sub(r"\$\{?(\w+)\}?", lambda match: VARIABLES.get(match[1], "/runs"), line)
        found.append(shlex.split(line))
    return found


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash(script):
    bash = shutil.which("bash")
    assert bash is not None
    assert subprocess.run([bash, "-n", script], capture_output=True, text=True, timeout=20).stderr == ""


@pytest.mark.parametrize("recipe", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_every_command_of_a_recipe_is_one_of_jmoe_and_all_train_the_same(recipe):
    text = recipe.read_text()
    found = commands(text)
    # None has escaped the pattern, but where the text speaks of the command by name.
    assert len(found) == len(re.findall(r"jmoe train (?!`)\S", text)) >= 1
    for words in found:
        args = cli._parse(words[1:])
        assert args.command == "train"
        assert args.experiment == "experiments/vmoe_s32_imagenet1k.py"
        assert args.workdir.startswith("/")
        if args.coordinator and args.coordinator != "HOST:PORT":
            given = {name: getattr(args, name) for name in ("coordinator", "processes", "process", "local")}
            assert check(Addresses(**given)) == ("127.0.0.1", 12345, 8, 7)


def test_the_experiment_of_the_recipes_is_there():
    assert load_experiment(ROOT / "experiments" / "vmoe_s32_imagenet1k.py").seed is not None


def test_the_job_set_gives_every_host_of_the_slice_a_pod():
    job_set = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert job_set["kind"] == "JobSet"
    (replicated,) = job_set["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert (
        job["parallelism"] == job["completions"] == rows * columns // container["resources"]["limits"]["google.com/tpu"]
    )
    (rule,) = job["podFailurePolicy"]["rules"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def called_by(script, program, folder, **environment):
    """The arguments of each call of a program that a script makes, which here only notes them."""
    (folder / program).write_text(
        f'#!/usr/bin/env bash\nfor word in "$@"; do printf "%s\\0" "$word"; done > {folder}/call-$$\n'
    )
    (folder / program).chmod(0o755)
    bash = shutil.which("bash") or "bash"
    environment = {"PATH": f"{folder}:/usr/bin:/bin", **environment}
    subprocess.run([bash, str(LAUNCH / script)], env=environment, timeout=20, check=True)
    return [call.read_text().split("\0")[:-1] for call in folder.glob("call-*")]


def test_xpk_gets_a_command_of_one_line_and_the_statuses_to_start_again_after(tmp_path):
    (words,) = called_by("xpk.sh", "xpk", tmp_path)
    options = dict(word.removeprefix("--").split("=", 1) for word in words if word.startswith("--"))
    assert "\n" not in options["command"]
    assert options["command"].split(" && ")[0] == "cd /jmoe"
    # What xpk restarts after by itself begins at 127; 2, a mistake, must not be among them.
    assert options["restart-on-exit-codes"] == f"{LOST},{STUCK}"
    assert int(options["termination-grace-period-seconds"]) >= 120


@pytest.mark.parametrize("running", [True, False])
def test_tpu_vms_get_no_second_run_beside_one_that_is_going_on(running, tmp_path):
    # Runs nothing here but the check for a run; of the other commands it sees that they are valid, and notes them.
    (tmp_path / "gcloud").write_text(
        f"#!/usr/bin/env bash\nfor word; do case $word in --command=*) command=${{word#--command=}};; esac; done\n"
        f'bash -n -c "$command" || exit 3\nprintf "%s\\0" "$command" >> {tmp_path}/calls\n'
        'case $command in *"kill -0"*) exec bash -c "$command";; esac\n'
    )
    (tmp_path / "gcloud").chmod(0o755)
    if running:
        (tmp_path / "train.pid").write_text(f"{os.getpid()}\n")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HOME": str(tmp_path)}
    script = [shutil.which("bash") or "bash", str(LAUNCH / "tpu_vm.sh")]
    ended = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=20)
    calls = (tmp_path / "calls").read_text().split("\0")[:-1]
    if running:
        assert ended.returncode == 1
        assert ended.stderr == f"A run is going on here, as process {os.getpid()} (train.pid): stop it first.\n"
        assert len(calls) == 1
    else:
        assert (ended.returncode, ended.stderr) == (0, "")
        _, install, train, watch = calls
        assert "uv venv --quiet --python 3.12 ~/venv" in install
        assert 'PATH="$HOME/venv/bin:$PATH"' in train
        assert watch.startswith("tail ")


def test_the_table_of_statuses_is_that_of_the_program():
    statuses = [int(status) for status in re.findall(r"^\| (\d+) \|", (LAUNCH / "README.md").read_text(), re.M)]
    assert statuses == [0, 2, LOST, STUCK, 130, 143]


def test_every_recipe_is_in_the_table_and_in_that_of_its_grace_period():
    listed = re.findall(r"^\| `(\S+)` \|", (LAUNCH / "README.md").read_text(), re.M)
    assert sorted(listed) == sorted(2 * [path.name for path in LAUNCH.iterdir() if path.name != "README.md"])


@pytest.mark.parametrize("status", [0, 75])
def test_a_process_for_each_gpu_ends_with_the_status_of_all(status, tmp_path):
    (tmp_path / "jmoe").write_text(f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES $@" >> {tmp_path}/calls\nexit {status}\n')
    (tmp_path / "jmoe").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "0,3", "RUNS": "/runs"}
    script = [shutil.which("bash") or "bash", str(LAUNCH / "one_machine_gpus.sh")]
    assert subprocess.run([*script, "process-per-gpu"], env=environment, timeout=20).returncode == status
    train = "train experiments/vmoe_s32_imagenet1k.py --workdir /runs/s32"
    local = "--local --coordinator 127.0.0.1:12345 --processes 2 --process"
    assert sorted((tmp_path / "calls").read_text().splitlines()) == [f"0 {train} {local} 0", f"3 {train} {local} 1"]
    (tmp_path / "calls").unlink()
    assert subprocess.run(script, env=environment, timeout=20).returncode == status
    assert (tmp_path / "calls").read_text() == f"0,3 {train}\n"


@pytest.mark.parametrize("nvidia_smi", ["exit 0", "echo no driver >&2; exit 9"])
def test_without_a_gpu_nothing_is_started(nvidia_smi, tmp_path):
    for name, body in (("nvidia-smi", nvidia_smi), ("jmoe", f"touch {tmp_path}/started")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    script = [shutil.which("bash") or "bash", str(LAUNCH / "one_machine_gpus.sh"), "process-per-gpu"]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RUNS": "/runs"}
    ended = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=20)
    assert ended.returncode == 2
    assert ended.stderr.startswith("No GPU was found: nvidia-smi lists none")
    assert len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_script_or_from_the_terminal_gets_to_all(signum, tmp_path):
    (tmp_path / "jmoe").write_text(
        f"#!/usr/bin/env bash\ntrap 'touch {tmp_path}/stopped-$CUDA_VISIBLE_DEVICES; exit 143' TERM\n"
        f"touch {tmp_path}/ready-$CUDA_VISIBLE_DEVICES\nfor i in $(seq 200); do sleep 0.05; done\n"
    )
    (tmp_path / "jmoe").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CUDA_VISIBLE_DEVICES": "0,3", "RUNS": "/runs"}
    # Tests that run in the background ignore SIGINT, and so would bash.
    heard = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    script = [shutil.which("bash") or "bash", str(LAUNCH / "one_machine_gpus.sh"), "process-per-gpu"]
    with subprocess.Popen([sys.executable, "-c", heard, *script], env=environment, start_new_session=True) as running:
        deadline = time.monotonic() + 5
        while len(list(tmp_path.glob("ready-*"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        # A terminal signals the whole group, but what bash starts with & does not hear Ctrl-C unless it listens.
        os.kill(running.pid, signum) if signum == signal.SIGTERM else os.killpg(running.pid, signum)
        assert running.wait(20) == 143
    assert sorted(path.name for path in tmp_path.glob("stopped-*")) == ["stopped-0", "stopped-3"]
