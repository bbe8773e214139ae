"""Runs of several processes: stopped by force or by a signal, resumed by another number, and the same in the end."""

import json
import os
import pathlib
import shutil
import signal
import sys
import time

import jax
import numpy as np
import pytest

from jmoe.errors import LOST
from jmoe.paths import path_names
from jmoe.train import workdir as folders
from jmoe.train.checkpoint import Checkpointer
from jmoe.train.experiment import load_experiment
from jmoe.train.state import initial_state, make_optimizer
from tests.parallel import processes

STEPS = 40
# Where numbers of processes are compared, every token takes all experts: were it to choose two, a rounding error could
# decide between equals, which sends the token elsewhere and is no rounding error any more.
SMOOTH = "TopK(k=4, capacity_factor=None)"
# Where they are the same, so are the bits, whatever is chosen, dropped or drawn.
FULL = "TopK(k=2, capacity_factor=0.5, batch_priority=True)"
EXPERIMENT = f"""
from jmoe import MoEConfig, TopK
from jmoe.train.config import CheckpointConfig, EvalConfig
from tests.train.tiny import tiny_config
import dataclasses


def get_config():
    often = {{"log_every": 1, "checkpoint": CheckpointConfig(every=8), "evaluate": EvalConfig(every=20)}}
    config = tiny_config(steps={STEPS}, **often)
    moe = dataclasses.replace(config.model.moe, num_experts=4, router=ROUTER)
    optimizer = dataclasses.replace(config.optimizer, peak_lr=1e-3, eps=1e-3)  # see final_state
    return dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe), optimizer=optimizer)
"""


def write(folder, router):
    path = folder / "digits_small.py"
    path.write_text(EXPERIMENT.replace("ROUTER", router))
    return path


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return write(tmp_path_factory.mktemp("experiment"), SMOOTH)


def run(experiment, workdir, count, *options):
    """Starts a run of so many processes; a context manager."""
    command = [sys.executable, "-m", "jmoe", "train", str(experiment), "--workdir", str(workdir), *options]
    if count > 1:
        command += ["--coordinator", "{coordinator}", "--processes", "{processes}", "--process", "{process}", "--local"]
    return processes.start([command] * count)


def finish(experiment, workdir, count):
    """Runs to the end."""
    with run(experiment, workdir, count) as running:
        ended = running.wait(300)
    for i, process in enumerate(ended):
        assert process.status == 0, f"process {i}: {process.stdout}{process.stderr}"
    return ended


def final_state(experiment, workdir):
    """The arrays of the last checkpoint by name.

    Where a gradient is hardly more than rounding, which differs with the order of sums, Adam would make whole steps of
    it: the optimizer has a larger eps.
    """
    config = load_experiment(experiment)
    abstract = jax.eval_shape(lambda: initial_state(config, make_optimizer(config, STEPS)))
    with Checkpointer(pathlib.Path(workdir) / folders.CHECKPOINTS) as checkpointer:
        state, _ = checkpointer.restore(STEPS, abstract)
    named = zip(path_names(state), jax.tree.leaves(state), strict=True)
    return {name: np.asarray(leaf) for name, leaf in named if name != "key"}


def check_equal(ours, theirs, tolerance):
    assert ours.keys() == theirs.keys()
    for name in ours:
        if tolerance:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=tolerance, atol=tolerance, err_msg=name)
        else:
            np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.fixture(scope="module")
def uninterrupted(experiment, tmp_path_factory):
    """The end of a run of two processes that nobody disturbed."""
    workdir = tmp_path_factory.mktemp("uninterrupted")
    first, second = finish(experiment, workdir, 2)
    assert f"finished         step {STEPS}" in first.stdout  # process 0 speaks for all
    assert second.stdout == ""
    return final_state(experiment, workdir)


def kill(experiment, workdir, count, victim):
    """Starts a run of so many processes and kills one of them in the middle; the others end, and say why."""
    with run(experiment, workdir, count) as running:
        running.wait_for(0, f"step 14/{STEPS}", 200)
        running.kill(victim)
        ended = running.wait(90)
    for process, end in enumerate(ended):
        assert end.status == (-signal.SIGKILL if process == victim else LOST), end
        assert process == victim or f"process {victim}" in end.stderr


def resumed(experiment, workdir, count):
    """The arrays that so many processes end with which go on with a copy of a run."""
    copied = workdir.with_name(f"{workdir.name} by {count}")
    shutil.copytree(workdir, copied)
    assert "resumed from step" in finish(experiment, copied, count)[0].stdout
    return final_state(experiment, copied)


@pytest.mark.slow
def test_a_killed_run_is_resumed_by_any_number_of_processes(experiment, uninterrupted, tmp_path):
    workdir = tmp_path / "killed"
    kill(experiment, workdir, 2, victim=1)
    for count in (2, 4, 1):
        # The same shape of the job: the same sums in the same order.
        check_equal(resumed(experiment, workdir, count), uninterrupted, 0 if count == 2 else 1e-5)


@pytest.mark.slow
def test_one_of_four_is_killed_and_four_or_two_go_on(experiment, uninterrupted, tmp_path):
    finish(experiment, tmp_path / "whole", 4)
    workdir = tmp_path / "killed"
    kill(experiment, workdir, 4, victim=2)
    check_equal(resumed(experiment, workdir, 4), final_state(experiment, tmp_path / "whole"), 0)
    check_equal(resumed(experiment, workdir, 2), uninterrupted, 1e-5)


@pytest.mark.slow
def test_a_killed_run_that_drops_tokens_ends_with_the_same_bits(tmp_path):
    experiment = write(tmp_path, FULL)
    finish(experiment, tmp_path / "whole", 2)
    kill(experiment, tmp_path / "killed", 2, victim=0)
    check_equal(resumed(experiment, tmp_path / "killed", 2), final_state(experiment, tmp_path / "whole"), 0)
    lines = map(json.loads, (tmp_path / "whole/metrics.jsonl").read_text().splitlines())
    assert all(line["train/block_1/dropped_tokens"] > 0 for line in lines if "train/loss" in line)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(experiment, uninterrupted, tmp_path):
    with run(experiment, tmp_path, 4) as running:
        running.wait_for(0, f"step 10/{STEPS}", 200)
        running.kill(2, signal.SIGTERM)
        ended = running.wait(90)
    said = [next(line for line in process.stderr.splitlines() if "Stopped after step" in line) for process in ended]
    assert {process.status for process in ended} == {128 + signal.SIGTERM}
    assert len(set(said)) == 1
    step = int(said[0].split("Stopped after step ")[1].split()[0])
    assert folders.latest(tmp_path / folders.CHECKPOINTS) == step
    finish(experiment, tmp_path, 2)
    check_equal(final_state(experiment, tmp_path), uninterrupted, 1e-5)


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_job_loses_nothing_and_leaves_none(experiment, tmp_path):
    with run(experiment, tmp_path, 1, "--set", "data.num_workers=2") as running:
        running.wait_for(0, f"step 10/{STEPS}", 200)
        group = running._popens[0].pid
        os.killpg(group, signal.SIGTERM)  # with the workers that read the data
        (ended,) = running.wait(60)
        assert ended.status == 128 + signal.SIGTERM, ended.stderr
        step = int(ended.stderr.split("Stopped after step ")[1].split()[0])
        assert folders.latest(tmp_path / folders.CHECKPOINTS) == step >= 10
        deadline = time.monotonic() + 10
        while is_there(group):
            assert time.monotonic() < deadline, "a process of the run is left"
            time.sleep(0.05)


def is_there(group):
    """Whether a process group has any process."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def interrupted(workdir):
    """Body of one of two processes, of which the second gets SIGTERM before the step is compiled."""
    import jax

    from jmoe.errors import InterruptedRunError
    from jmoe.train import loop
    from tests.train.tiny import tiny_config

    make_program = loop.make_program

    def prepared(*args):
        if jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return make_program(*args)

    loop.make_program = prepared
    try:
        loop.train(tiny_config(), workdir)
    except InterruptedRunError as error:
        print(error.exit_code, str(error).split(",")[0])


@pytest.mark.slow
def test_a_signal_to_one_process_before_the_first_step_ends_all_without_it(tmp_path):
    outputs = processes.together("tests.parallel.test_runs:interrupted", 2, str(tmp_path), timeout=100)
    assert [output.splitlines()[-1] for output in outputs] == ["143 Stopped before a step was taken"] * 2
    assert not (tmp_path / folders.CHECKPOINTS).exists()
