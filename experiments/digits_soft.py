"""digits_vmoe.py with soft mixing (Soft MoE): every slot is a weighted mean of an image's tokens.

Run:      jmoe train experiments/digits_soft.py --workdir runs/digits_soft
Expected: 98.2 % (mean of 3 seeds) in 71 s beside other work; see experiments/README.md.
"""

import pathlib

from jmoe.train.config import TrainConfig
from jmoe.train.experiment import load_experiment


def get_config() -> TrainConfig:
    """16 slots for the 17 tokens of an image, so that it costs what digits_vmoe.py does; images are mixed alone."""
    router = ["model.moe.router=Soft(slots_per_expert=2)", "model.moe.images_per_group=1"]
    return load_experiment(pathlib.Path(__file__).with_name("digits_vmoe.py"), router)
