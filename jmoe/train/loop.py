"""The training loop: from a config and a work folder to a trained model, in named stages that read top to bottom."""

import contextlib
import dataclasses
import errno
import json
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np

from jmoe.data import fingerprint, train_batches
from jmoe.errors import InterruptedRunError, UserError
from jmoe.evaluate.accuracy import Evaluation
from jmoe.train import workdir as folders
from jmoe.train.checkpoint import Checkpointer
from jmoe.train.checks import abstract_batch, check_classes, check_images, readable
from jmoe.train.config import Initialize, TrainConfig, total_steps
from jmoe.train.evaluation import evaluator_of
from jmoe.train.fewshot import few_shot_evaluator_of
from jmoe.train.initialize import start_from
from jmoe.train.log import MetricWriter, Progress
from jmoe.train.signals import StopRequest
from jmoe.train.state import graph_of, initial_state, make_optimizer
from jmoe.train.step import Metrics, make_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
    """How a run ended.

    Attributes:
      workdir: where it is saved.
      step: the last step.
      evaluation: of the test images after that step.
      seconds: of training and evaluation in the part of the run that finished it, compilation included.
      resumed_from: the step that this part started from; None for a run in one part.
      damaged_images: training images that this part could not read, and took others for.
      already_finished: whether there was nothing left to do.
    """

    workdir: str
    step: int
    evaluation: Evaluation
    seconds: float
    resumed_from: int | None = None
    damaged_images: int = 0
    already_finished: bool = False

    def __str__(self) -> str:
        """What the command line prints at the end."""
        how = ", before" if self.already_finished else f", in {self.seconds:.0f} s"
        since = f", resumed from step {self.resumed_from}" if self.resumed_from is not None else ""
        lines = [f"finished         step {self.step}{how}{since}", str(self.evaluation)]
        if self.damaged_images:
            lines.append(f"damaged images   {self.damaged_images}, replaced by others; the log names them")
        return "\n".join([*lines, f"saved in         {self.workdir}"])


def train(config: TrainConfig, workdir: str | os.PathLike[str]) -> Summary:
    """Trains an experiment to its end, or goes on where the work folder left it.

    The folder holds config.json, metrics.jsonl, TensorBoard's files, checkpoints/ and, at the end, summary.json. A run
    that is interrupted and resumed ends with the same parameters, bit for bit, as one that is not.

    Args:
      config: the experiment.
      workdir: a new folder, or that of the same experiment.

    Raises:
      UserError: something that the user can mend, in one sentence; what was saved is intact.
      InterruptedRunError: Ctrl-C or SIGTERM, after the state was saved.
    """
    try:
        with StopRequest() as stop:
            return _train(config, workdir, stop)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"There is no space left on the disk of {workdir}. What was saved before is intact: free some space and "
            "run the same command again."
        ) from error


def _train(config: TrainConfig, workdir: str | os.PathLike[str], stop: StopRequest) -> Summary:
    started = time.monotonic()
    check_classes(config)
    steps = total_steps(config)
    position = {"seed": config.seed, "global_batch": config.data.batch_size, "fingerprint": fingerprint(config.data)}
    path = folders.prepare(workdir, config)
    if (path / folders.SUMMARY).exists():
        return _finished(path)

    # Functions: the model without its arrays, the step, the evaluation.
    optimizer = make_optimizer(config, steps)
    graph = graph_of(config)
    step_function = jax.jit(make_step(config, graph, optimizer, steps), donate_argnums=0)
    evaluator = evaluator_of(config)
    few_shot = None if config.evaluate.fewshot is None else few_shot_evaluator_of(config)
    evaluate_every = config.evaluate.every or max(1, steps // 10)
    save_every = config.checkpoint.every or max(1, steps // 10)
    make_state = jax.jit(lambda: initial_state(config, optimizer))
    abstract_state = jax.eval_shape(make_state)
    with readable():
        jax.eval_shape(step_function, abstract_state, abstract_batch(config))

    with contextlib.ExitStack() as stack:
        checkpointer = stack.enter_context(Checkpointer(path / folders.CHECKPOINTS, keep=config.checkpoint.keep))

        # State: drawn anew, with other weights if the experiment names them, or that of the last checkpoint.
        start, resumed_from = 0, None
        if checkpointer.latest() is None:
            state = make_state()
            if config.initialize is not None:
                state = start_from(config.initialize, config.model, state)
                start = _first_step(config.initialize, int(state.step), steps)
        else:
            state, saved, start = checkpointer.restore_latest(abstract_state)
            resumed_from = start
            _check_position(path, saved, position)

        writer = stack.enter_context(MetricWriter(path, resume_step=start))
        batches = train_batches(config.data, seed=config.seed, start_step=start)
        stack.callback(batches.close)
        progress = stack.enter_context(Progress(steps, config.data.batch_size, start_step=start))
        recent: list[Metrics] = []  # of the steps since the last line of the log, still on the device
        evaluation = None

        for step in range(start + 1, steps + 1):
            batch = next(batches)
            check_images(config, batch)
            state, metrics = step_function(state, {"image": batch["image"], "label": batch["label"]})
            recent.append(metrics)
            stopped_by = stop.signum  # read once: a signal that comes later in this turn is for the next one
            due = step == steps or stopped_by is not None
            if due or step % config.log_every == 0 or step % save_every == 0 or step % evaluate_every == 0:
                # Before anything is saved: a state that is not finite must not become the last good one.
                values = mean_of(recent, step, checkpointer)
                writer.write(step, {f"train/{name}": value for name, value in values.items()})
                progress.update(step, values["loss"])
                recent = []
            if due or step % save_every == 0:
                checkpointer.save(step, state, position | {"step": step})
            if step == steps or step % evaluate_every == 0:
                evaluation = evaluator(state)
                few_shot_metrics = {} if few_shot is None else few_shot(state).metrics()
                writer.write(step, _test_metrics(evaluation) | few_shot_metrics)
                progress.print(f"step {step}: test accuracy {100 * evaluation.accuracy:.2f} %")
            if stopped_by is not None and step < steps:
                checkpointer.wait()
                raise InterruptedRunError(
                    f"Stopped after step {step} of {steps}, saved in {path}. Run the same command to go on.",
                    stopped_by,
                )
        checkpointer.wait()

    if evaluation is None:  # the last checkpoint was complete, but the run ended before its summary was written
        evaluation = evaluator(state)
    summary = Summary(
        workdir=str(path),
        step=steps,
        evaluation=evaluation,
        seconds=time.monotonic() - started,
        resumed_from=resumed_from,
        damaged_images=len(batches.bad),
    )
    _write_json(path / folders.SUMMARY, dataclasses.asdict(summary))
    return summary


def mean_of(recent: list[Metrics], step: int, checkpointer: Checkpointer) -> dict[str, float]:
    """Fetches the metrics of the last steps, up to `step`, and returns their means.

    Raises:
      UserError: one of them is not finite; names the first step and metric where that happened.
    """
    fetched = jax.device_get(recent)
    for i, metrics in enumerate(fetched):
        # The parts of the loss first, then their sum and its gradient: what went wrong, before what followed from it.
        for name in sorted(metrics, key=lambda name: (not name.startswith("loss/"), name != "loss", name)):
            if not np.isfinite(metrics[name]):
                checkpointer.wait()
                saved = checkpointer.latest()
                kept = "There is no checkpoint yet" if saved is None else f"The last good checkpoint is of step {saved}"
                raise UserError(
                    f"{name} is {metrics[name]} at step {step - len(fetched) + 1 + i}. {kept}, in "
                    f"{checkpointer.directory}. Lower the learning rate or clip_norm; metrics.jsonl shows the way."
                )
    return {name: float(np.mean([metrics[name] for metrics in fetched])) for name in fetched[0]}


def _first_step(initialize: Initialize, step: int, steps: int) -> int:
    """The step that a run goes on from, or raises UserError if it ends before."""
    if step < steps:
        return step
    raise UserError(
        f"{initialize.path} was saved after step {step}, and with initialize.optimizer the run goes on from there, but "
        f"it has {steps} steps in all. Set more steps or epochs, or initialize.optimizer=false to begin at step 0."
    )


def _check_position(path: pathlib.Path, saved: dict[str, Any], position: dict[str, Any]) -> None:
    """Raises UserError if the data is not what the run began with."""
    for name, now in position.items():
        if saved.get(name) != now:
            raise UserError(
                f"{path} was trained on other data: {name} was {saved.get(name)!r} and is {now!r}. Bring the dataset "
                "back as it was, or choose another --workdir."
            )


def _test_metrics(evaluation: Evaluation) -> dict[str, Any]:
    metrics = evaluation.to_json()
    load = metrics.pop("expert_load")
    metrics |= {f"block_{block}/expert_load": np.asarray(shares) for block, shares in load.items()}
    return {f"test/{name}": value for name, value in metrics.items()}


def _finished(path: pathlib.Path) -> Summary:
    """The summary of a run that ended before."""
    try:
        saved = json.loads((path / folders.SUMMARY).read_text())
        here = {"evaluation": Evaluation(**saved["evaluation"]), "workdir": str(path), "already_finished": True}
        return Summary(**saved | here)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path / folders.SUMMARY} is damaged ({error}). Delete it to have the run evaluated again."
        ) from error


def _write_json(path: pathlib.Path, data: dict[str, Any]) -> None:
    """Writes a file that is either there whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(data, indent=2) + "\n")
    temporary.replace(path)
