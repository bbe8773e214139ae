"""V-MoE on scikit-learn's handwritten digits: 8 experts in every second of 4 blocks, top-1."""

from jmoe.data import DataConfig, Digits, Shift
from jmoe.models.vit import ViTConfig
from jmoe.nn import MoEConfig
from jmoe.routing import TopK
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
            moe=MoEConfig(num_experts=8, layers="every-2", router=TopK(k=1), expert_init="independent"),
        ),
        data=DataConfig(source=Digits(), batch_size=128, augment=(Shift(pixels=1),)),
        optimizer=AdamW(peak_lr=2e-3, warmup_steps=100, decay=Cosine(), weight_decay=0.05, clip_norm=1.0),
        epochs=100,
    )
