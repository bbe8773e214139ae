"""digits_vmoe.py with tokens that choose by a sparse transport plan: balanced without noise or auxiliary losses.

Run:      jmoe train experiments/digits_transport.py --workdir runs/digits_transport
Expected: 97.9 % (mean of 3 seeds) in 310 s beside other work; see experiments/README.md.
Differs from the paper (arXiv:2209.15466): one expert per token, and images of 8 by 8 pixels.
"""

import pathlib

from jmoe.train.config import TrainConfig
from jmoe.train.experiment import load_experiment


def get_config() -> TrainConfig:
    """The paper's plan: 20 steps of Adam with a learning rate of 0.01, at most k nonzeros for each token."""
    choice = "TopK(k=1, capacity_factor=1.05, multiple=1, noise_std=0.0)"
    router = f"model.moe.router=Transport(choice={choice}, plan=QuadraticPlan())"
    return load_experiment(pathlib.Path(__file__).with_name("digits_vmoe.py"), [router])
