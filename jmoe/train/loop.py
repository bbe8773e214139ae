"""The training loop: from a config and a work folder to a trained model, in named stages that read top to bottom."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import os
import pathlib
import time
from typing import Any

import jax
import numpy as np

from jmoe.data import fingerprint, train_batches, train_records
from jmoe.errors import InterruptedRunError, StorageError, UserError
from jmoe.evaluate.accuracy import Evaluation
from jmoe.parallel import mesh as meshes
from jmoe.parallel.hosts import Hosts, code_version, current, package_versions
from jmoe.parallel.preemption import watched
from jmoe.parallel.stop import AgreedStop
from jmoe.parallel.watchdog import Watchdog
from jmoe.train import workdir as folders
from jmoe.train.checkpoint import Checkpointer
from jmoe.train.checks import check_classes, check_images
from jmoe.train.compiled import make_program
from jmoe.train.config import Initialize, TrainConfig, total_steps
from jmoe.train.config_json import to_json
from jmoe.train.evaluation import evaluator_of
from jmoe.train.feed import feeder
from jmoe.train.fewshot import few_shot_evaluator_of
from jmoe.train.initialize import start_from
from jmoe.train.log import MetricWriter, Progress
from jmoe.train.signals import StopRequest
from jmoe.train.step import Metrics

logger = logging.getLogger("jmoe")


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
      InterruptedRunError: Ctrl-C, SIGTERM or the notice of a preemption, after the state was saved; or before the first
        step, with nothing to save.
    """
    try:
        with StopRequest() as stop, watched(stop.ask), folders.Claim() as claim:
            return _train(config, workdir, stop, claim)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"There is no space left on the disk of {workdir}. What was saved before is intact: free some space and "
            "run the same command again."
        ) from error


def _train(config: TrainConfig, workdir: str | os.PathLike[str], stop: StopRequest, claim: folders.Claim) -> Summary:
    started = time.monotonic()
    hosts = current()
    main = hosts.process == 0  # the process that writes and prints; checkpoints are written by all
    check_classes(config)
    train_records(config.data)  # opened to see that there are enough, before minutes of compiling
    steps = total_steps(config)
    position = {"seed": config.seed, "global_batch": config.data.batch_size, "fingerprint": fingerprint(config.data)}
    if hosts.count > 1:
        hosts.compare(_what_hosts_share(config, position))
    path, ended = folders.local(workdir).absolute(), ""
    if main:
        path = folders.prepare(workdir, config, claim)
        ended = (path / folders.SUMMARY).read_text() if (path / folders.SUMMARY).exists() else ""
    # Process 0 says for all whether there is anything to do: what another sees of the folder may be older.
    if ended := hosts.gather("the end of the run", ended)[0]:
        return _finished(path, ended)

    # Functions: the model without its arrays, the step, the evaluation; and the mesh on which they run.
    program = make_program(config, steps)
    mesh = program.mesh
    evaluator = evaluator_of(config, mesh)
    few_shot = None if config.evaluate.fewshot is None else few_shot_evaluator_of(config, mesh)
    evaluate_every = config.evaluate.every or max(1, steps // 10)
    save_every = config.checkpoint.every or max(1, steps // 10)
    rows, put = feeder(mesh, config.data.batch_size)
    # Compiled before any of them starts: devices wait for those of other hosts, but not for ever (gloo: 30 s).
    with jax.set_mesh(mesh):
        step_function = program.step.lower(program.state, program.batch).compile()
    _end_if_asked(hosts, stop, path)

    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        checkpointer = stack.enter_context(Checkpointer(path / folders.CHECKPOINTS, keep=config.checkpoint.keep))

        # State: drawn anew, with other weights if the experiment names them, or that of the last checkpoint.
        start, resumed_from = 0, None
        if checkpointer.latest() is None:
            state = program.init()
            if config.initialize is not None:
                state = start_from(config.initialize, config.model, state)
                start = _first_step(config.initialize, int(state.step), steps)
        else:
            state, saved, start = checkpointer.restore_latest(program.state)
            resumed_from = start
            _check_position(path, saved, position)

        writer = stack.enter_context(MetricWriter(path, resume_step=start)) if main else None
        batches = train_batches(config.data, seed=config.seed, start_step=start, rows=rows)
        stack.callback(batches.close)
        progress = stack.enter_context(Progress(steps, config.data.batch_size, start_step=start)) if main else None
        if progress is not None and mesh.size > 1:
            progress.print(f"{mesh.size} devices: {meshes.of(mesh)}")
        recent: list[Metrics] = []  # of the steps since the last line of the log, still on the device
        evaluation = None
        agreed = AgreedStop(mesh)
        # The threads of several CPU devices can wait for each other for ever if programs pile up.
        in_turn = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
        watchdog = None if config.watchdog is None else stack.enter_context(Watchdog(multiple=config.watchdog))
        paused = contextlib.nullcontext if watchdog is None else watchdog.paused

        def save(step: int) -> None:
            """Saves the state after a step, also if storage failed for a moment when an earlier one was saved."""
            try:
                checkpointer.wait()
            except StorageError as error:
                if main:
                    logger.warning("%s Training goes on, and saves again.", error)
            if checkpointer.latest() != step:
                if writer is not None:
                    writer.sync()
                checkpointer.save(step, state, position | {"step": step})

        def end_if(stopped_by: int | None, step: int) -> None:
            if stopped_by is None:
                return
            save(step)
            checkpointer.wait()
            raise InterruptedRunError(
                f"Stopped after step {step} of {steps}, saved in {path}. Run the same command to go on.", stopped_by
            )

        def test(step: int) -> Evaluation:
            def before_batch() -> None:  # there may be no time for the others
                end_if(agreed.update(stop.signum), step)

            evaluation = evaluator(state, before_batch)
            few_shot_metrics = {} if few_shot is None else few_shot(state, before_batch).metrics()
            if writer is not None and progress is not None:
                writer.write(step, _test_metrics(evaluation) | few_shot_metrics)
                progress.print(f"step {step}: test accuracy {100 * evaluation.accuracy:.2f} %")
            return evaluation

        _end_if_asked(hosts, stop, path)
        for step in range(start + 1, steps + 1):
            batch = next(batches)
            check_images(config, batch)
            state, metrics = step_function(state, put({"image": batch["image"], "label": batch["label"]}))
            recent.append(metrics)
            if in_turn:
                jax.block_until_ready(metrics["loss"])
            # Read once: a signal that comes later in this turn is for the next one. All hosts stop after the same step.
            stopped_by = agreed.update(stop.signum)
            due = step == steps or stopped_by is not None
            if due or step % config.log_every == 0 or step % save_every == 0 or step % evaluate_every == 0:
                # Before anything is saved: a state that is not finite must not become the last good one.
                values = mean_of(recent, step, checkpointer)
                if writer is not None and progress is not None:
                    writer.write(step, {f"train/{name}": value for name, value in values.items()})
                    progress.update(step, values["loss"])
                recent = []
            with paused():
                evaluating = step == steps or step % evaluate_every == 0
                # Before the first evaluation, too: a stop is not heard while it compiles.
                if step == steps or step % save_every == 0 or (evaluating and evaluation is None):
                    save(step)
                end_if(stopped_by, step)
                if evaluating:
                    evaluation = test(step)
            if watchdog is not None:
                watchdog.step_ended(step)
        with paused():
            checkpointer.wait()
            if evaluation is None:  # the last checkpoint was complete, but the run ended before it was evaluated
                evaluation = test(steps)

    summary = Summary(
        workdir=str(path),
        step=steps,
        evaluation=evaluation,
        seconds=time.monotonic() - started,
        resumed_from=resumed_from,
        damaged_images=sum(map(int, hosts.gather("damaged images", str(len(batches.bad))))),
    )
    if main:
        _write_json(path / folders.SUMMARY, dataclasses.asdict(summary))
    return summary


def _end_if_asked(hosts: Hosts, stop: StopRequest, path: pathlib.Path) -> None:
    """Raises InterruptedRunError, in all processes, if a signal came to any of them before the first step."""
    if signum := max(map(int, hosts.gather("signals before the first step", str(stop.signum or 0)))):
        raise InterruptedRunError(
            f"Stopped before a step was taken, so there was nothing to save in {path}. Run the same command to go on.",
            signum,
        )


def _what_hosts_share(config: TrainConfig, position: dict[str, Any]) -> dict[str, str]:
    """What must be the same on all hosts before the first step."""
    with contextlib.closing(
        train_batches(config.data, seed=config.seed, rows=range(min(4, config.data.batch_size)))
    ) as batches:
        first = next(batches)
    digest = hashlib.sha256(first["image"].tobytes() + first["label"].tobytes()).hexdigest()
    return {
        "the experiment": json.dumps(to_json(config)),
        "the code of jmoe": code_version(),
        "the versions of packages": package_versions(),
        "the dataset": str(position["fingerprint"]),
        "the first images": digest,
    }


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
                with contextlib.suppress(StorageError):  # of an earlier step; what was saved before is told
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


def _finished(path: pathlib.Path, summary: str) -> Summary:
    """The summary of a run that ended before, from the text of its file."""
    try:
        saved = json.loads(summary)
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
