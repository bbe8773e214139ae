"""The smallest run that has everything: digits, two blocks, one of them sparse."""

from jmoe import MoEConfig, TopK
from jmoe.data import DataConfig, Digits, Shift
from jmoe.models.vit import ViTConfig
from jmoe.train.config import CheckpointConfig, EvalConfig, TrainConfig
from jmoe.train.optimizer import AdamW


def tiny_config(**changes) -> TrainConfig:
    """12 steps of 48 images; noise, dropout and augmentation are on, so that all randomness has to be resumed."""
    options = {
        "model": ViTConfig(
            patch_size=4,
            width=8,
            depth=2,
            hidden_dim=12,
            num_heads=2,
            num_classes=10,
            image_size=(8, 8),
            channels=1,
            dropout=0.1,
            moe=MoEConfig(num_experts=3, router=TopK(k=1), layers=(1,), images_per_group=4, dropout=0.1),
        ),
        "data": DataConfig(source=Digits(), batch_size=48, augment=(Shift(pixels=1),)),
        "optimizer": AdamW(peak_lr=1e-2, warmup_steps=2, clip_norm=1.0),
        "steps": 12,
        "evaluate": EvalConfig(every=6, batch_size=96),
        "checkpoint": CheckpointConfig(every=4),
        "log_every": 3,
    }
    return TrainConfig(**options | changes)
