"""Makes the dense digits run sparse half-way, trains on in several ways, and prints a table of test figures.

Run: python experiments/upcycling.py --workdir runs/upcycling      (per seed a training, and four halves of one)

Trainings that the work folder holds already are not repeated.
"""

import argparse
import dataclasses
import pathlib

import numpy as np

from jmoe import MoEConfig
from jmoe.evaluate import Evaluation
from jmoe.train.config import TrainConfig
from jmoe.train.evaluation import evaluate_checkpoint
from jmoe.train.experiment import load_experiment
from jmoe.train.loop import train
from jmoe.train.upcycle import upcycle_folder

HALF = 560  # of 1,123 steps
VARIANTS = {
    "upcycled, `TopK(k=2)`": [],
    "upcycled, a new optimizer": ["initialize.optimizer=false", "epochs=none", f"steps={1123 - HALF}"],
    "upcycled, weights not renormalised": ["model.moe.router.renormalize=false"],
    "upcycled, `ExpertChoice()` renormalised": ["model.moe.router=ExpertChoice(renormalize=true)"],
}


def main() -> None:
    """Trains what is missing and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", metavar="DIR", type=pathlib.Path, required=True)
    parser.add_argument("--seeds", metavar="N", type=int, default=3)
    args = parser.parse_args()
    rows = [seed_rows(args.workdir / str(seed), seed) for seed in range(args.seeds)]
    print("| run | accuracy at step 560 | at the end | lowest to highest | loss at the end |\n|---|---|---|---|---|")
    for name in rows[0]:
        starts, ends = zip(*(row[name] for row in rows), strict=True)
        start, end = (100 * np.array([evaluation.accuracy for evaluation in part]) for part in (starts, ends))
        loss = np.mean([evaluation.loss for evaluation in ends])
        print(
            f"| {name} | {start.mean():.2f} % | {end.mean():.2f} % | {end.min():.1f} to {end.max():.1f} | {loss:.3f} |"
        )


def seed_rows(workdir: pathlib.Path, seed: int) -> dict[str, tuple[Evaluation, Evaluation]]:
    """Half-way and at the end, for the dense run and the variants that begin half-way in it."""
    here = pathlib.Path(__file__)
    dense = load_experiment(here.with_name("digits_dense.py"), [f"seed={seed}", "checkpoint.keep=10"])
    end = train(quiet(dense), workdir / "dense").evaluation
    rows = {"dense, going on": (evaluate_checkpoint(dense, workdir / "dense", step=HALF)[0], end)}
    sparse = workdir / "sparse"
    if not sparse.exists():
        upcycle_folder(workdir / "dense", sparse, MoEConfig(num_experts=8), optimizer=True, step=HALF, seed=seed)
    for i, (name, changes) in enumerate(VARIANTS.items()):
        sets = [f"seed={seed}", f"initialize.path={sparse}", *changes]
        config = load_experiment(here.with_name("digits_upcycled.py"), sets)
        start = evaluate_checkpoint(config, sparse)[0]
        rows[name] = (start, train(quiet(config), workdir / f"variant_{i}").evaluation)
    return rows


def quiet(config: TrainConfig) -> TrainConfig:
    """The same run, evaluated and logged at its end only."""
    end = 10**9
    return dataclasses.replace(config, log_every=end, evaluate=dataclasses.replace(config.evaluate, every=end))


if __name__ == "__main__":
    main()
