"""digits_vmoe.py with expert-choice routing: every expert takes its best tokens of 8 images; no auxiliary loss.

Run:      jmoe train experiments/digits_expert_choice.py --workdir runs/digits_expert_choice
Expected: 98.0 % (mean of 3 seeds) in 200 s beside other work; see experiments/README.md.
"""

import pathlib

from jmoe.train.config import TrainConfig
from jmoe.train.experiment import load_experiment


def get_config() -> TrainConfig:
    """One expert per token in the mean, as in digits_vmoe.py."""
    router = "model.moe.router=ExpertChoice(capacity_factor=1.0)"
    return load_experiment(pathlib.Path(__file__).with_name("digits_vmoe.py"), [router])
