"""digits_vmoe.py fine-tuned on images of twice the size, by the published recipe: SGD, more capacity, a new head.

Run:      jmoe train experiments/digits_vmoe.py --workdir runs/digits_vmoe
Then:     jmoe train experiments/digits_finetuned.py --workdir runs/digits_finetuned
Expected: 94.2 % (mean of 3 seeds), and 26.4 % without initialize; see experiments/README.md.
Differs from the paper: the data is the same, enlarged from 8 to 16 pixels; 10 epochs with a peak learning rate of 0.01.
"""

import pathlib

from jmoe.train.config import TrainConfig
from jmoe.train.experiment import load_experiment


def get_config() -> TrainConfig:
    """The positions of the 4 by 4 patches are resized to 8 by 8."""
    changes = [
        "initialize.path=runs/digits_vmoe",
        "model.image_size=(16, 16)",
        "data.image_size=16",
        "data.augment=(Shift(pixels=2),)",
        "model.moe.router.capacity_factor=1.5",
        "optimizer=SGD(peak_lr=0.01, momentum=0.9, warmup_steps=10, decay=Cosine(), clip_norm=10.0)",
        "epochs=10",
    ]
    return load_experiment(pathlib.Path(__file__).with_name("digits_vmoe.py"), changes)
