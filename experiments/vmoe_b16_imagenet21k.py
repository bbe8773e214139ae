"""V-MoE B/16 on ImageNet-21k: 8 experts in every second block, top-2, 300 epochs (as the published checkpoint).

Run:      jmoe train experiments/vmoe_b16_imagenet21k.py --workdir runs/b16
Plan:     jmoe plan experiments/vmoe_b16_imagenet21k.py --topology v5e:16x16
Expected: blank until we have a run of our own; published for this recipe: 85.6 % on ImageNet-1k after fine-tuning at
  384 pixels (mean of 3 seeds).
Data:     TFDS has no public builder of ImageNet-21k (14,197,122 images, 21,843 classes): prepare it with one of your
  own as "imagenet21k", in ArrayRecord, with the split "full".
Differs from the paper: no RandAugment (2 layers, magnitude 20) yet; mixup draws its weights once for a batch, not for
  each device; evaluated ten times in the run instead of every 1,000 steps.
"""

from jmoe import MoEConfig, TopK
from jmoe.data import TFDS, CentralCrop, DataConfig, InceptionCrop, RandomFlip, ResizeSmall
from jmoe.models import vit
from jmoe.train.config import CheckpointConfig, TrainConfig
from jmoe.train.optimizer import AdamW


def get_config() -> TrainConfig:
    """The whole experiment."""
    return TrainConfig(
        model=vit.variant(
            "B/16",
            num_classes=21_843,
            moe=MoEConfig(layers="every-2", num_experts=8, router=TopK(k=2, capacity_factor=1.05)),
            representation_dim=None,
            head_bias=-10.0,
            dtype="bfloat16",
        ),
        data=DataConfig(
            source=TFDS("imagenet21k", train="full[102400:]", test="full[:102400]"),
            batch_size=4096,
            image_size=224,
            augment=(InceptionCrop(224), RandomFlip()),
            test_preprocess=(ResizeSmall(256), CentralCrop(224)),
            num_workers=16,
        ),
        optimizer=AdamW(peak_lr=8e-4, warmup_steps=10_000, weight_decay=(("w_in|w_out|kernel", 0.1),), clip_norm=1.0),
        steps=1_032_329,  # 300 epochs of the 14,094,722 images of full[102400:]
        loss="sigmoid",
        mixup=0.5,
        checkpoint=CheckpointConfig(every=1000),
    )
