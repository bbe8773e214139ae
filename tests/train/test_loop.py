import dataclasses
import errno
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

import jmoe
from jmoe.data import DataConfig, Digits, train_batches
from jmoe.errors import InterruptedRunError, UserError
from jmoe.train import checkpoint, loop, signals
from jmoe.train.checkpoint import Checkpointer
from jmoe.train.compiled import make_program
from jmoe.train.config import CheckpointConfig, EvalConfig
from jmoe.train.evaluation import evaluate_checkpoint
from jmoe.train.loop import train
from jmoe.train.overrides import apply_overrides
from jmoe.train.state import initial_state, make_optimizer
from jmoe.train.workdir import differences_from_run
from tests.aot import slow_but
from tests.parallel.metadata import serving
from tests.train.tiny import tiny_config


def final_state(config, workdir):
    """The last checkpoint of a run."""
    abstract = jax.eval_shape(lambda: initial_state(config, make_optimizer(config, 12)))
    with Checkpointer(pathlib.Path(workdir) / "checkpoints") as checkpointer:
        return checkpointer.restore_latest(abstract)[0]


def assert_same_bits(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run, its folder and its summary."""
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(tiny_config(), workdir)


def test_a_run_leaves_all_that_is_needed_to_read_and_resume_it(finished):
    workdir, summary = finished
    assert {"config.json", "metrics.jsonl", "tensorboard", "checkpoints", "summary.json"} <= set(os.listdir(workdir))
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == [3, 4, 6, 8, 9, 12]  # logged each 3 steps, saved each 4, evaluated each 6
    tested = [line for line in lines if "test/accuracy" in line]
    assert [line["step"] for line in tested] == [6, 12]
    assert tested[-1]["test/accuracy"] == summary.evaluation.accuracy
    assert sorted(os.listdir(workdir / "checkpoints")) == ["12", "8"]


def test_the_summary_says_what_a_user_asks_first(finished):
    workdir, summary = finished
    text = str(summary)
    assert f"{100 * summary.evaluation.accuracy:.2f} % of 360 images" in text
    assert f"{100 * summary.evaluation.dropped_tokens:.2f} %" in text
    shares = summary.evaluation.expert_load["1"]
    assert len(shares) == 3
    np.testing.assert_allclose(sum(shares), 1, rtol=1e-5)
    assert " ".join(f"{100 * share:5.1f}" for share in shares) in text
    assert str(workdir) in text


def test_a_finished_run_says_so_and_is_not_repeated(finished):
    workdir, summary = finished
    before = (workdir / "metrics.jsonl").read_text()
    again = train(tiny_config(), workdir)
    assert again.already_finished
    assert again.evaluation == summary.evaluation
    assert str(again).startswith("finished         step 12, before")
    assert (workdir / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("stop_after", slow_but(9, sorted(random.Random(3).sample(range(1, 12), 3))))
def test_a_run_stopped_at_any_step_and_resumed_ends_with_the_same_bits(finished, tmp_path, monkeypatch, stop_after):
    workdir, summary = finished
    stop_at(monkeypatch, stop_after)
    with pytest.raises(
        InterruptedRunError, match=f"Stopped after step {stop_after} of 12, saved in .* to go on"
    ) as stopped:
        train(tiny_config(), tmp_path)
    assert stopped.value.exit_code == 130
    monkeypatch.undo()
    resumed = train(tiny_config(), tmp_path)
    assert resumed.resumed_from == stop_after
    assert resumed.evaluation == summary.evaluation
    assert_same_bits(final_state(tiny_config(), tmp_path), final_state(tiny_config(), workdir))
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


def stop_at(monkeypatch, step):
    """Makes Ctrl-C come when the batch of a step is asked for."""

    class Interrupting:
        def __init__(self, *args, **kwargs):
            self.batches, self.asked = train_batches(*args, **kwargs), 0
            self.close = self.batches.close

        def __next__(self):
            self.asked += 1
            if self.asked == step:
                os.kill(os.getpid(), signal.SIGINT)
            return next(self.batches)

    monkeypatch.setattr(loop, "train_batches", Interrupting)


@pytest.mark.parametrize("stop_after", slow_but(12, [6, 12]))
def test_a_stop_does_not_wait_for_an_evaluation(finished, tmp_path, monkeypatch, stop_after):
    _, summary = finished
    stop_at(monkeypatch, stop_after)
    monkeypatch.setattr(loop, "evaluator_of", lambda config, mesh: lambda *args: pytest.fail("evaluated"))
    with pytest.raises(InterruptedRunError, match=f"Stopped after step {stop_after} of 12, saved in"):
        train(tiny_config(evaluate=EvalConfig(every=stop_after, batch_size=96)), tmp_path)
    assert str(stop_after) in os.listdir(tmp_path / "checkpoints")
    if stop_after == 12:
        monkeypatch.undo()
        resumed = train(tiny_config(evaluate=EvalConfig(every=12, batch_size=96)), tmp_path)
        assert (resumed.resumed_from, resumed.evaluation) == (12, summary.evaluation)
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines if "test/accuracy" in line] == [12]


def test_a_save_that_fails_for_a_moment_does_not_end_the_run(finished, tmp_path, monkeypatch, caplog):
    write, failures = checkpoint.manifest.write, [OSError(errno.EIO, os.strerror(errno.EIO))]

    def failing(*args):
        if failures:
            raise failures.pop()
        write(*args)

    monkeypatch.setattr(checkpoint.manifest, "write", failing)
    assert train(tiny_config(), tmp_path).evaluation == finished[1].evaluation
    assert "The checkpoint of step 4 could not be saved in " in caplog.text
    assert "Run the same command to go on. Training goes on, and saves again." in caplog.text
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["12", "8"]


def test_before_the_first_evaluation_the_state_is_saved(tmp_path, monkeypatch):
    config = tiny_config(evaluate=EvalConfig(every=5, batch_size=96), checkpoint=CheckpointConfig(every=12))
    kept = []
    monkeypatch.setattr(loop.Checkpointer, "save", lambda self, step, *_: kept.append(step))
    train(config, tmp_path)
    assert kept == [5, 12]


@pytest.mark.parametrize("stop_after", slow_but(5, [5, 12]))
def test_an_evaluation_under_way_is_left_for_a_stop(finished, tmp_path, monkeypatch, stop_after):
    _, summary = finished
    config = tiny_config(evaluate=EvalConfig(every=stop_after, batch_size=96))
    make, seen = loop.evaluator_of, []

    def interrupting(config, mesh):
        evaluator = make(config, mesh)

        def evaluate(state, before_batch):
            def second_batch():
                seen.append(1)
                if len(seen) == 2:
                    os.kill(os.getpid(), signal.SIGTERM)
                before_batch()

            return evaluator(state, second_batch)

        return evaluate

    monkeypatch.setattr(loop, "evaluator_of", interrupting)
    with pytest.raises(InterruptedRunError, match=f"Stopped after step {stop_after} of 12, saved in") as stopped:
        train(config, tmp_path)
    assert (len(seen), stopped.value.exit_code) == (2, 143)  # of four batches
    assert str(stop_after) in os.listdir(tmp_path / "checkpoints")  # after step 5 nothing would have been saved
    monkeypatch.undo()
    resumed = train(config, tmp_path)
    assert (resumed.resumed_from, resumed.evaluation) == (stop_after, summary.evaluation)


@pytest.mark.slow
def test_the_notice_of_a_preemption_stops_like_sigterm(tmp_path, monkeypatch, caplog):
    with serving() as cloud:
        cloud["preempted"] = "FALSE"
        monkeypatch.setenv("GCE_METADATA_HOST", cloud.address)
        monkeypatch.setattr(loop.Progress, "update", lambda *_: cloud.__setitem__("preempted", "TRUE"))
        with pytest.raises(InterruptedRunError, match="Stopped after step .* to go on") as stopped:
            train(tiny_config(steps=10_000), tmp_path)
    assert stopped.value.exit_code == 143
    assert "Google Cloud preempts this machine: stopping as soon as" in caplog.text


def test_the_signal_that_follows_a_notice_does_not_insist(monkeypatch):
    monkeypatch.setattr(signals, "_TOGETHER", 0.0)
    with signals.StopRequest() as stop:
        stop.ask("The machine goes")
        signal.raise_signal(signal.SIGTERM)
        stop.ask("It still goes")
        assert stop.signum == signal.SIGTERM
    with signals.StopRequest() as stop:
        signal.raise_signal(signal.SIGTERM)
        stop.ask("The machine goes")  # changes nothing


def test_a_signal_before_the_first_step_ends_the_run_without_it(tmp_path, monkeypatch):
    def prepared(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return make_program(*args, **kwargs)

    monkeypatch.setattr(loop, "make_program", prepared)
    with pytest.raises(InterruptedRunError, match="Stopped before a step was taken, so .* to go on") as stopped:
        train(tiny_config(), tmp_path)
    assert stopped.value.exit_code == 143
    assert not (tmp_path / "checkpoints").exists()


def test_signals_at_once_are_one_request_and_a_later_ctrl_c_insists(monkeypatch, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # tests that run in the background ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with signals.StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)  # passed on by a script that got the same Ctrl-C
        assert stop.signum == signal.SIGINT
        monkeypatch.setattr(signals, "_TOGETHER", 0.0)
        signal.raise_signal(signal.SIGTERM)  # schedulers repeat it while there is time
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_checkpoint(finished, tmp_path):
    workdir, _ = finished
    program = (
        "import os, sys, threading\n"
        "from jmoe.train import loop\n"
        "from tests.train.tiny import tiny_config\n"
        "write = loop.MetricWriter.write\n"
        "def killing(self, step, metrics):\n"
        "    if step >= 9:\n"
        "        os.kill(os.getpid(), 9)\n"
        "    write(self, step, metrics)\n"
        "loop.MetricWriter.write = killing\n"
        "loop.train(tiny_config(), sys.argv[1])\n"
    )
    root = pathlib.Path(jmoe.__file__).parents[1]
    process = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    resumed = train(tiny_config(), tmp_path)
    assert resumed.resumed_from in (6, 8)  # that of step 8 may not have been complete
    assert_same_bits(final_state(tiny_config(), tmp_path), final_state(tiny_config(), workdir))


def test_the_same_weights_can_be_evaluated_at_another_capacity(finished):
    workdir, summary = finished
    same, step = evaluate_checkpoint(tiny_config(), workdir)
    assert (same, step) == (summary.evaluation, 12)
    less = apply_overrides(tiny_config(), ["model.moe.router.capacity=1", "model.moe.router.capacity_factor=none"])
    assert evaluate_checkpoint(less, workdir)[0].dropped_tokens > same.dropped_tokens
    earlier, step = evaluate_checkpoint(tiny_config(), workdir, step=8)
    assert step == 8
    assert earlier.loss != same.loss


def test_options_of_training_may_differ_in_evaluation(finished):
    workdir, summary = finished
    other = apply_overrides(tiny_config(), ["optimizer=SGD(peak_lr=0.1)", "steps=99"])
    assert evaluate_checkpoint(other, workdir)[0] == summary.evaluation


def test_a_checkpoint_of_another_model_names_the_parameters_that_differ(finished):
    workdir, _ = finished
    wider = apply_overrides(tiny_config(), ["model.moe.num_experts=5"])
    with pytest.raises(UserError, match=r"float32 \(3, 12\) and float32 \(5, 12\) at 'params/blocks/1/moe/ex"):
        evaluate_checkpoint(wider, workdir)


def test_a_folder_without_a_run_says_how_to_make_one(tmp_path):
    with pytest.raises(UserError, match="holds no checkpoints. Train first: jmoe train EXPERIMENT --workdir"):
        evaluate_checkpoint(tiny_config(), tmp_path / "nothing")


def test_the_folder_of_another_experiment_is_refused_and_left_alone(finished):
    workdir, _ = finished
    before = (workdir / "config.json").read_text()
    with pytest.raises(UserError, match=r"holds another experiment: model.width: 8 -> 16 \(there -> here\). Choose"):
        train(apply_overrides(tiny_config(), ["model.width=16"]), workdir)
    assert (workdir / "config.json").read_text() == before


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(finished, tmp_path, caplog):
    workdir, summary = finished
    copied = tmp_path / "run"
    subprocess.run(["cp", "-r", str(workdir), str(copied)], check=True)
    (copied / "summary.json").unlink()
    files = [p for p in (copied / "checkpoints" / "12" / "state").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    resumed = train(tiny_config(), copied)
    assert resumed.resumed_from == 8
    assert resumed.evaluation == summary.evaluation
    assert largest.name in caplog.text
    assert "The checkpoint before it is used instead." in caplog.text
    assert_same_bits(final_state(tiny_config(), copied), final_state(tiny_config(), workdir))


def test_a_run_killed_before_its_summary_is_evaluated_again(finished, tmp_path):
    workdir, summary = finished
    copied = tmp_path / "run"
    subprocess.run(["cp", "-r", str(workdir), str(copied)], check=True)
    (copied / "summary.json").unlink()
    assert train(tiny_config(), copied).evaluation == summary.evaluation


def test_other_data_than_the_run_began_with_is_refused(finished, tmp_path, monkeypatch):
    workdir, _ = finished
    copied = tmp_path / "run"
    subprocess.run(["cp", "-r", str(workdir), str(copied)], check=True)
    (copied / "summary.json").unlink()
    monkeypatch.setattr(loop, "fingerprint", lambda config: "other")
    with pytest.raises(UserError, match="was trained on other data: fingerprint was .* and is 'other'. Bring the"):
        train(tiny_config(), copied)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    config = tiny_config(checkpoint=CheckpointConfig(every=2), log_every=10)
    train_until_nan = apply_overrides(config, ["optimizer=SGD(peak_lr=1e30, warmup_steps=3)"])
    with pytest.raises(
        UserError,
        match=r"^loss/\w+ is (nan|inf) at step [345]\. The last good checkpoint is of step [24], in .*",
    ):
        train(train_until_nan, tmp_path)
    assert set(os.listdir(tmp_path / "checkpoints")) <= {"2", "4"}
    state = final_state(train_until_nan, tmp_path)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["model.num_classes=7"], "The dataset digits has 10 classes; the model has num_classes=7. Set model.num_cl"),
        (
            ["model.image_size=(16, 16)"],
            r"has images of \(8, 8, 1\) \(height, width, channels\); the model takes \(1",
        ),
        (
            ["model.moe.router.capacity_factor=0.01", "model.moe.router.rounding=nearest"],
            "each of the 3 experts .* must be at least 1",
        ),
        (["data.batch_size=4000"], "A batch of 4000 images is more than the 1437"),
        (["optimizer.warmup_steps=50"], "warm"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_sentence(tmp_path, changes, sentence, monkeypatch):
    if "data.batch_size" in changes[0]:  # known before anything is compiled
        monkeypatch.setattr(loop, "make_program", lambda *_: pytest.fail("traced"))
    with pytest.raises(UserError, match=sentence):
        train(apply_overrides(tiny_config(), changes), tmp_path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            ["data.batch_size=3"],
            "a group of 4 images is larger than the batch: 3 images of 5 tokens are routed",
        ),
        (
            ["model.moe.group_size=999"],
            "group_size=999 is larger than the batch: 48 images of 5 tokens are routed",
        ),
        (["model.moe.router.k=4"], "TopK has k=4, but there are only num_experts=3. Choose k from 1 to 3."),
        (["model.patch_size=3"], "patch_size=3 does not divide images of 8 by 8 pixels. Use images of 9 by 9"),
        (["accumulate=5"], "accumulate=5 does not divide batch_size=48"),
        (["epochs=3"], "TrainConfig wants epochs or steps, one of them; it got 3"),
        (["model.moe.router.capcity=4"], "TopK has no option 'capcity' .* Did you mean 'capacity'"),
    ],
    ids=str,
)
def test_options_that_contradict_each_other_are_refused_where_they_are_set(changes, sentence):
    with pytest.raises(UserError, match=sentence):
        apply_overrides(tiny_config(), changes)


def test_a_full_disk_is_one_sentence(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(loop.folders, "prepare", full)
    with pytest.raises(UserError, match="There is no space left on the disk of .* What was saved before is intact"):
        train(tiny_config(), tmp_path)


def test_a_dense_model_is_trained_and_summarised_without_experts(tmp_path):
    config = tiny_config(steps=3)
    summary = train(dataclasses.replace(config, model=dataclasses.replace(config.model, moe=None)), tmp_path)
    assert "expert" not in str(summary)
    assert summary.evaluation.dropped_tokens == 0


@pytest.mark.slow
def test_training_works_outside_the_main_thread(tmp_path):
    results = []
    config = tiny_config(steps=3, data=DataConfig(source=Digits(), batch_size=48))
    thread = threading.Thread(target=lambda: results.append(train(config, tmp_path)))
    thread.start()
    thread.join()
    assert results[0].step == 3


def test_a_folder_in_which_nothing_was_saved_takes_other_options(tmp_path):
    with pytest.raises(UserError, match="10 classes"):
        train(apply_overrides(tiny_config(), ["model.num_classes=7"]), tmp_path)
    with pytest.raises(UserError, match="warm"):
        train(apply_overrides(tiny_config(), ["optimizer.warmup_steps=50"]), tmp_path)
    assert train(apply_overrides(tiny_config(), ["steps=3"]), tmp_path).step == 3


def test_a_finished_run_is_not_taken_for_another_experiment_when_its_checkpoints_are_gone(finished, tmp_path):
    workdir, _ = finished
    copied = tmp_path / "run"
    subprocess.run(["cp", "-r", str(workdir), str(copied)], check=True)
    shutil.rmtree(copied / "checkpoints")
    with pytest.raises(UserError, match="holds another experiment"):
        train(apply_overrides(tiny_config(), ["model.moe.router=Switch()"]), copied)
    assert f"saved in         {copied}" in str(train(tiny_config(), copied))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (["evaluate.router=TopK(k=9)"], "TopK has k=9, but there are only num_experts=3"),
        (["evaluate.router=ExpertChoice(capacity_factor=20.0)"], "ExpertChoice gives each expert .* of a group's"),
        (["data.batch_size=0"], "DataConfig wants a batch_size of at least 1; it got 0"),
        (["epochs=1e999", "steps=none"], "finite length"),
        (["optimizer.clip_norm=-1"], "AdamW wants a clip_norm above 0, or None; it got -1"),
        (["model.moe.losses=(Balance(scope='grup'),)"], "grup"),
    ],
    ids=str,
)
def test_what_cannot_be_evaluated_or_makes_no_sense_is_said_before_training(tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        train(apply_overrides(tiny_config(), changes), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_evaluation_under_impossible_options_is_one_sentence(finished):
    workdir, _ = finished
    for change, sentence in (
        ("model.moe.router=ExpertChoice(capacity_factor=20.0)", "ExpertChoice gives each expert"),
        ("data.image_size=16", r"has images of \(16, 16, 1\)"),
    ):
        with pytest.raises(UserError, match=sentence):
            evaluate_checkpoint(apply_overrides(tiny_config(), [change]), workdir)


def test_differences_from_the_run_are_told_but_for_those_that_were_asked_for(finished):
    workdir, _ = finished
    changed = apply_overrides(tiny_config(), ["model.moe.router.k=2", "model.dropout=0.5"])
    told = differences_from_run(workdir, changed, [])
    assert sorted(told) == ["model.dropout: 0.1 -> 0.5", "model.moe.router.k: 1 -> 2"]
    assert differences_from_run(workdir, changed, ["model.moe"]) == ["model.dropout: 0.1 -> 0.5"]
    assert differences_from_run(workdir, tiny_config(), []) == []
