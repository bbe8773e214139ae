"""Images from disk to batches: sources, augmentations and the pipeline between them.

Constructing a configuration costs nothing: grain, TFDS, OpenCV and scikit-learn are imported when data is opened.
"""

from jmoe.data.augment import Augmentation, InceptionCrop, RandomCrop, RandomFlip, Shift
from jmoe.data.digits import Digits
from jmoe.data.folder import ImageFolder
from jmoe.data.pipeline import (
    Batches,
    DataConfig,
    epoch_order,
    fingerprint,
    num_test_images,
    num_train_images,
    steps_per_epoch,
    test_batches,
    train_batches,
    train_records,
)
from jmoe.data.preprocess import (
    CentralCrop,
    OneHot,
    Preprocess,
    Resize,
    ResizeSmall,
    ValueRange,
    parse_pipeline,
)
from jmoe.data.sources import BadRecordError, InMemory, RandomAccess, Record, Source
from jmoe.data.tfds_source import TFDS

__all__ = [
    "TFDS",
    "Augmentation",
    "BadRecordError",
    "Batches",
    "CentralCrop",
    "DataConfig",
    "Digits",
    "ImageFolder",
    "InMemory",
    "InceptionCrop",
    "OneHot",
    "Preprocess",
    "RandomAccess",
    "RandomCrop",
    "RandomFlip",
    "Record",
    "Resize",
    "ResizeSmall",
    "Shift",
    "Source",
    "ValueRange",
    "epoch_order",
    "fingerprint",
    "num_test_images",
    "num_train_images",
    "parse_pipeline",
    "steps_per_epoch",
    "test_batches",
    "train_batches",
    "train_records",
]
