"""V-MoE-15B on ImageNet-21k: 48 blocks of width 1408, 32 experts in every second, top-2 (arXiv:2106.05974).

Published are the shape, Adafactor with momentum, and that its rate decays with an inverse square root. Learning rate,
batch, steps and capacity are not. Those here are our choice: learning rate, warm-up, weight decay and clipping as of
H/14, batch and number of images as of the other models, the usual capacity of 1.05, and a cool-down over the last
50,000 steps.

Run:      jmoe train experiments/vmoe_15b_imagenet21k.py --workdir runs/15b
Plan:     jmoe plan experiments/vmoe_15b_imagenet21k.py --topology v5p:8x8x8
Expected: blank until we have a run of our own; nothing is published for this data.
Data:     ImageNet-21k, see vmoe_b16_imagenet21k.py. JFT-3B, which the model was published for, is not public.
Differs from the paper: the data, with its 21,843 classes instead of 29,593, and what is said above to be our choice;
  the momentum is kept in bfloat16, as in "Scaling Vision Transformers" (arXiv:2106.04560); evaluated ten times in the
  run.
"""

from jmoe import MoEConfig, TopK
from jmoe.data import TFDS, CentralCrop, DataConfig, InceptionCrop, RandomFlip, ResizeSmall
from jmoe.models import vit
from jmoe.train.config import CheckpointConfig, TrainConfig
from jmoe.train.optimizer import Adafactor
from jmoe.train.schedule import Rsqrt


def get_config() -> TrainConfig:
    """The whole experiment."""
    return TrainConfig(
        model=vit.variant(
            "15B/14",
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
        optimizer=Adafactor(
            peak_lr=3e-4,
            warmup_steps=10_000,
            decay=Rsqrt(cooldown_steps=50_000),
            weight_decay=0.1,
            clip_norm=10.0,
            min_dim_size_to_factor=33,  # above the number of experts: each has a moment of its own
            mu_dtype="bfloat16",
        ),
        steps=1_035_645,  # our choice, as for H/14: 301 epochs of ImageNet-21k
        loss="sigmoid",
        checkpoint=CheckpointConfig(every=1000),
    )
