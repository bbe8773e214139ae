"""V-MoE S/32 on ImageNet-1k: 8 experts in the last two odd blocks, top-2, 300 epochs (arXiv:2106.05974, "light1").

Run:      jmoe train experiments/vmoe_s32_imagenet1k.py --workdir runs/s32
Plan:     jmoe plan experiments/vmoe_s32_imagenet1k.py --topology v5e:16x16
Expected: blank until we have a run of our own; published for this recipe: 73.1 % of the 50,000 validation images (mean
  of 3 seeds), in 5 h 50 min on 32 cores of TPU v3.
Differs from the paper: no RandAugment (2 layers, magnitude 10) yet; mixup draws its weights once for a batch, not for
  each device; evaluated ten times in the run instead of every 1,000 steps.
"""

from jmoe import MoEConfig, TopK
from jmoe.data import TFDS, CentralCrop, DataConfig, InceptionCrop, RandomFlip, ResizeSmall
from jmoe.models import vit
from jmoe.train.config import CheckpointConfig, EvalConfig, TrainConfig
from jmoe.train.optimizer import AdamW


def get_config() -> TrainConfig:
    """The whole experiment."""
    return TrainConfig(
        model=vit.variant(
            "S/32",
            num_classes=1000,
            moe=MoEConfig(layers="last-2", num_experts=8, router=TopK(k=2, capacity_factor=1.05), dropout=0.2),
            dtype="bfloat16",
        ),
        data=DataConfig(
            source=TFDS("imagenet2012", train="train[:99%]", test="validation"),
            batch_size=8192,
            image_size=224,
            augment=(InceptionCrop(224), RandomFlip()),
            test_preprocess=(ResizeSmall(256), CentralCrop(224)),
            num_workers=16,
        ),
        optimizer=AdamW(peak_lr=3e-3, warmup_steps=10_000, weight_decay=(("w_in|w_out|kernel", 0.1),), clip_norm=1.0),
        steps=46_449,  # 300 epochs of the 1,268,355 images of train[:99%]
        loss="sigmoid",
        mixup=0.2,
        evaluate=EvalConfig(router=TopK(k=2, capacity_factor=4.0)),
        checkpoint=CheckpointConfig(every=1000),
    )
