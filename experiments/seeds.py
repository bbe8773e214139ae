"""Trains experiments with several seeds and prints a table: test accuracy, what was dropped, time.

Run: python experiments/seeds.py experiments/digits_*.py --workdir runs/seeds

Trainings that the work folder holds already are not repeated.
"""

import argparse
import pathlib
import statistics

from jmoe.train.experiment import load_experiment
from jmoe.train.loop import train


def main() -> None:
    """Trains what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", metavar="EXPERIMENT", type=pathlib.Path, nargs="+")
    parser.add_argument("--workdir", metavar="DIR", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", metavar="N", type=int, default=3)
    args = parser.parse_args()
    rows = [row(path, args.workdir, args.seeds) for path in args.experiments]
    print("| experiment | test accuracy, mean | lowest to highest | tokens dropped | seconds |")
    print("|---|---|---|---|---|")
    print("\n".join(rows))


def row(path: pathlib.Path, workdir: pathlib.Path, seeds: int) -> str:
    """Trains one experiment with every seed; the time is that of the fastest, the others may have had company."""
    runs = [train(load_experiment(path, [f"seed={seed}"]), workdir / f"{path.stem}_{seed}") for seed in range(seeds)]
    accuracies = [100 * run.evaluation.accuracy for run in runs]
    dropped = 100 * statistics.mean(run.evaluation.dropped_tokens for run in runs)
    return (
        f"| {path.stem} | {statistics.mean(accuracies):.2f} % | {min(accuracies):.1f} to {max(accuracies):.1f} "
        f"| {dropped:.1f} % | {min(run.seconds for run in runs):.0f} |"
    )


if __name__ == "__main__":
    main()
