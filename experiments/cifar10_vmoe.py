"""V-MoE on a folder of images, such as CIFAR-10 as JPEGs: 8 experts in every second of 4 blocks, top-1.

The folder holds train/<class>/*.jpg and test/<class>/*.jpg. Any other will do with --set data.source.path=... and
model.num_classes.

Run:      jmoe train experiments/cifar10_vmoe.py --workdir runs/cifar10 --set data.source.path=data/cifar10
Expected: 57.3 % (one seed) in 24 minutes beside other work; see experiments/README.md.
Differs from the paper: trained from scratch on 50,000 small images, one expert per token, for 5 epochs.
"""

from jmoe import MoEConfig, TopK
from jmoe.data import DataConfig, ImageFolder, RandomCrop, RandomFlip
from jmoe.models.vit import ViTConfig
from jmoe.train.config import EvalConfig, TrainConfig
from jmoe.train.optimizer import AdamW
from jmoe.train.schedule import Cosine


def get_config() -> TrainConfig:
    """The whole experiment."""
    return TrainConfig(
        model=ViTConfig(
            patch_size=4,
            width=96,
            depth=4,
            hidden_dim=192,
            num_heads=4,
            num_classes=10,
            image_size=(32, 32),
            moe=MoEConfig(
                layers="every-2",
                num_experts=8,
                router=TopK(k=1, capacity_factor=1.05, batch_priority=True),
                expert_init="independent",
            ),
        ),
        data=DataConfig(
            source=ImageFolder("data/cifar10"),
            batch_size=128,
            augment=(RandomCrop(size=32, padding=4), RandomFlip()),
        ),
        optimizer=AdamW(
            peak_lr=1e-3, warmup_steps=400, decay=Cosine(), weight_decay=(("w_in|w_out|kernel", 0.05),), clip_norm=1.0
        ),
        epochs=5,
        evaluate=EvalConfig(batch_size=200),
        log_every=100,
    )
