"""digits_dense.py made sparse half-way (Sparse Upcycling, arXiv:2212.05055): 8 copies of the MLP in every second block.

Run:      jmoe train experiments/digits_dense.py --workdir runs/digits_dense --set checkpoint.keep=10
Then:     jmoe convert --upcycle runs/digits_dense --step 560 --to runs/digits_sparse --experts 8 --optimizer
Then:     jmoe train experiments/digits_upcycled.py --workdir runs/digits_upcycled
Expected: 98.4 % (mean of 3 seeds), and 98.7 % if the dense run goes on; experiments/upcycling.py makes the table of
  experiments/README.md.
Differs from the paper: tokens choose two experts each, with room for nearly all, so that the start is the dense model;
  there experts choose. Training goes on for as long as the dense run has left, from the same step of the same schedule.
"""

import pathlib

from jmoe.train.config import TrainConfig
from jmoe.train.experiment import load_experiment


def get_config() -> TrainConfig:
    """digits_vmoe.py with another router, which begins as the dense run ended."""
    changes = [
        "model.moe.router=TopK(k=2, capacity_factor=2.0, multiple=1, renormalize=true)",
        "initialize=Initialize(path='runs/digits_sparse', fresh=(), optimizer=true)",
    ]
    return load_experiment(pathlib.Path(__file__).with_name("digits_vmoe.py"), changes)
