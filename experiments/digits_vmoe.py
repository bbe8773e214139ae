"""V-MoE on scikit-learn's handwritten digits: 8 experts in every second of 4 blocks, one expert per token.

Run:      jmoe train experiments/digits_vmoe.py --workdir runs/digits_vmoe
Expected: 98.7 % (mean of 3 seeds) in 61 s on two cores; see experiments/README.md.
Differs from the paper: images of 8 by 8 pixels in patches of 2; one expert per token; capacity is not rounded up to a
  multiple of 4, because a group has only 136 tokens; experts start independently; learned positions start larger.
"""

from jmoe import MoEConfig, TopK
from jmoe.data import DataConfig, Digits, Shift
from jmoe.models.vit import ViTConfig
from jmoe.train.config import TrainConfig
from jmoe.train.optimizer import AdamW
from jmoe.train.schedule import Cosine


def get_config() -> TrainConfig:
    """The whole experiment."""
    return TrainConfig(
        model=ViTConfig(
            patch_size=2,
            width=64,
            depth=4,
            hidden_dim=128,
            num_heads=4,
            num_classes=10,
            image_size=(8, 8),
            channels=1,
            position_std=0.5,
            moe=MoEConfig(
                layers="every-2",
                num_experts=8,
                router=TopK(k=1, capacity_factor=1.05, multiple=1),
                images_per_group=8,
                expert_init="independent",
            ),
        ),
        data=DataConfig(source=Digits(), batch_size=128, augment=(Shift(pixels=1),)),
        optimizer=AdamW(peak_lr=2e-3, warmup_steps=100, decay=Cosine(), weight_decay=0.05, clip_norm=1.0),
        epochs=100,
        log_every=100,
    )
