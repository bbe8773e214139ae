"""digits_vmoe.py with Switch routing: jitter on the gate's input instead of noise, and its balance loss.

Run:      jmoe train experiments/digits_switch.py --workdir runs/digits_switch
Expected: 98.1 % (mean of 3 seeds) in 96 s beside other work; see experiments/README.md.
"""

import pathlib

from jmoe.train.config import TrainConfig
from jmoe.train.experiment import load_experiment


def get_config() -> TrainConfig:
    """The paper's options of training, kept in evaluation: capacity factor 1.25, jitter 0.01, loss weight 0.01."""
    return load_experiment(pathlib.Path(__file__).with_name("digits_vmoe.py"), ["model.moe.router=Switch()"])
