"""Accuracy on digits against capacity: trained with and without batch priority, evaluated with and without.

Run: python experiments/capacity_curve.py --workdir runs/curve      (six trainings, about a minute each)

Prints the table of experiments/README.md: test accuracy in percent, mean over seeds, of the same weights at other
capacity factors. Trainings that the work folder holds already are not repeated.
"""

import argparse
import dataclasses
import pathlib

import numpy as np

from jmoe.train.config import TrainConfig
from jmoe.train.evaluation import evaluate_checkpoint
from jmoe.train.experiment import load_experiment
from jmoe.train.loop import train
from jmoe.train.overrides import apply_overrides

CAPACITY_FACTORS = (2.0, 1.0, 0.5, 0.25, 0.15)
ORDERS = {"batch priority": "true", "vanilla": "false"}


def main() -> None:
    """Trains what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", metavar="DIR", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", metavar="N", type=int, default=3)
    args = parser.parse_args()
    print(f"| trained with | evaluated with | {' | '.join(map(str, CAPACITY_FACTORS))} |")
    print("|---" * (2 + len(CAPACITY_FACTORS)) + "|")
    for trained, flag in ORDERS.items():
        curves = [curve(args.workdir / f"{trained.replace(' ', '_')}_{seed}", flag, seed) for seed in range(args.seeds)]
        for evaluated in ORDERS:
            means = np.mean([c[evaluated] for c in curves], axis=0)
            print(f"| {trained} | {evaluated} | {' | '.join(f'{100 * mean:.1f}' for mean in means)} |", flush=True)


def curve(workdir: pathlib.Path, batch_priority: str, seed: int) -> dict[str, list[float]]:
    """Trains one seed with one order and returns its accuracies, by the order of evaluation."""
    config = load_experiment(
        pathlib.Path(__file__).with_name("digits_batch_priority.py"),
        [f"model.moe.router.batch_priority={batch_priority}", f"seed={seed}"],
    )
    train(quiet(config), workdir)
    return {order: [accuracy(config, workdir, flag, c) for c in CAPACITY_FACTORS] for order, flag in ORDERS.items()}


def accuracy(config: TrainConfig, workdir: pathlib.Path, batch_priority: str, capacity_factor: float) -> float:
    """Test accuracy of the last checkpoint under another order and capacity."""
    router = "model.moe.router"
    sets = [f"{router}.batch_priority={batch_priority}", f"{router}.capacity_factor={capacity_factor}"]
    return evaluate_checkpoint(apply_overrides(config, sets), workdir)[0].accuracy


def quiet(config: TrainConfig) -> TrainConfig:
    """The same run, evaluated and logged at its end only."""
    end = 10**9
    return dataclasses.replace(config, log_every=end, evaluate=dataclasses.replace(config.evaluate, every=end))


if __name__ == "__main__":
    main()
