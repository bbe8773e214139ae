"""V-MoE L/16 on ImageNet-21k: 32 experts in every second block, top-2, the recipe for JFT-300M (arXiv:2106.05974).

Every second block is the better of the two published placements: 87.4 % on ImageNet-1k after fine-tuning.

Run:      jmoe train experiments/vmoe_l16_imagenet21k.py --workdir runs/l16
Plan:     jmoe plan experiments/vmoe_l16_imagenet21k.py --topology v5p:8x8x8
Expected: blank until we have a run of our own; nothing is published for this data.
Data:     ImageNet-21k, see vmoe_b16_imagenet21k.py. JFT-300M, which the recipe was published for, is not public.
Differs from the paper: the data, with its 21,843 classes instead of 18,291, seen for as many images as the paper's 14
  epochs have; the loss is sigmoid, of which the sources are not certain; evaluated ten times in the run.
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
            "L/16",
            num_classes=21_843,
            moe=MoEConfig(layers="every-2", num_experts=32, router=TopK(k=2, capacity_factor=1.05)),
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
        optimizer=AdamW(peak_lr=4e-4, warmup_steps=10_000, weight_decay=0.1),
        steps=1_035_645,  # 14 epochs of the 303 million images of JFT-300M; of ImageNet-21k it is 301
        loss="sigmoid",
        checkpoint=CheckpointConfig(every=1000),
    )
