"""digits_vmoe.py with experts in every block and batch priority: what V-MoE drops when capacity is short.

Run:      jmoe train experiments/digits_batch_priority.py --workdir runs/digits_batch_priority
Then:     jmoe evaluate experiments/digits_batch_priority.py --workdir runs/digits_batch_priority \
              --set model.moe.router.capacity_factor=0.25 --set model.moe.router.batch_priority=false
Expected: 98.1 % at a capacity factor of 1 and 96.1 % at 0.25 (91.3 % without batch priority), means of 3 seeds; see
  experiments/README.md for the whole curve, which experiments/capacity_curve.py makes. Its time was not measured.
"""

import pathlib

from jmoe.train.config import TrainConfig
from jmoe.train.experiment import load_experiment


def get_config() -> TrainConfig:
    """Sparse in all four blocks; trained at a capacity factor of 1.05."""
    changes = ["model.moe.layers=(0, 1, 2, 3)", "model.moe.router.batch_priority=true"]
    return load_experiment(pathlib.Path(__file__).with_name("digits_vmoe.py"), changes)
