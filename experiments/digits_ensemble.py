"""digits_vmoe.py as an efficient ensemble (E3, arXiv:2110.03360): two members with four of the eight experts each.

Run:      jmoe train experiments/digits_ensemble.py --workdir runs/digits_ensemble
Expected: 98.2 % (mean of 3 seeds) in 261 s beside other work; see experiments/README.md.
Differs from the paper: see digits_vmoe.py.
"""

import pathlib

from jmoe.train.config import TrainConfig
from jmoe.train.experiment import load_experiment


def get_config() -> TrainConfig:
    """Each member learns by its own loss; the evaluation averages their probabilities."""
    return load_experiment(pathlib.Path(__file__).with_name("digits_vmoe.py"), ["model.moe.members=2"])
