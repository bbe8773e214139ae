"""`jmoe evaluate`."""

import argparse
import dataclasses
import json
import logging

from jmoe.cli import arguments

logger = logging.getLogger("jmoe")

SUMMARY = "Evaluates a checkpoint on the test images; with --set, the same weights under other options."
EXAMPLE = (
    "jmoe evaluate experiments/digits_vmoe.py --workdir runs/digits --set model.moe.router.capacity_factor=0.25 --json"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `jmoe evaluate`."""
    arguments.add_experiment(parser)
    parser.add_argument("--step", metavar="N", type=int, help="the step of the checkpoint; the newest if left out")
    parser.add_argument(
        "--fewshot",
        action="store_true",
        help="instead of the model's own head, linear regressions from its features, fitted on a few images of each "
        "class; evaluate.fewshot of the experiment says how",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments.add_processes(parser)


def run(args: argparse.Namespace) -> int:
    """Evaluates, and process 0 prints the result."""
    from jmoe.train.experiment import load_experiment

    experiment = load_experiment(args.experiment)  # first, so that a mistyped path is answered in no time

    from jmoe.train.evaluation import evaluate_checkpoint
    from jmoe.train.fewshot import few_shot_checkpoint
    from jmoe.train.imported import for_folder
    from jmoe.train.workdir import differences_from_run

    config = for_folder(experiment, args.workdir, args.overrides)
    if any(override.startswith("model.moe") for override in args.overrides):
        # What is asked for here wins over the router that the experiment has for evaluation.
        config = dataclasses.replace(config, evaluate=dataclasses.replace(config.evaluate, router=None))
    differences = differences_from_run(args.workdir, config, [override.split("=")[0] for override in args.overrides])
    if differences:
        logger.warning(
            "The run was trained with other options: %s (there -> here). It is evaluated with those of here.",
            "; ".join(differences),
        )
    with arguments.started(args) as hosts:
        measure = few_shot_checkpoint if args.fewshot else evaluate_checkpoint
        evaluation, step = measure(config, args.workdir, args.step)
        if hosts.process == 0:
            text = f"step             {step}\n{evaluation}"
            print(json.dumps({"step": step} | evaluation.to_json()) if args.json else text)
    return 0
