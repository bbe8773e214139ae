"""`jmoe evaluate`."""

import argparse
import json
from collections.abc import Mapping

from jmoe.cli import arguments

SUMMARY = "Evaluates a checkpoint on the test images; with --set, the same weights under other options."
EXAMPLE = (
    "jmoe evaluate experiments/digits_vmoe.py --workdir runs/digits --set model.moe.router.capacity_factor=0.25 --json"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `jmoe evaluate`."""
    arguments.add_experiment(parser)
    parser.add_argument("--step", metavar="N", type=int, help="the step of the checkpoint; the newest if left out")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Evaluates, and prints the results by name."""
    from jmoe.train.experiment import load_experiment

    config = load_experiment(args.experiment, args.overrides)

    from jmoe.evaluate.accuracy import evaluate_checkpoint

    results = evaluate_checkpoint(config, args.workdir, step=args.step)
    print(json.dumps(results) if args.json else as_text(results))
    return 0


def as_text(results: Mapping[str, object]) -> str:
    """Returns one aligned line per result."""
    width = max(map(len, results), default=0)
    lines = [(name, f"{value:.6g}" if isinstance(value, float) else str(value)) for name, value in results.items()]
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)
