"""The TFDS builder of the digits. Apart from the rest because a builder's class needs TFDS at its definition."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

TEST_IMAGES_PER_CLASS = 36  # of 10 classes: 360 of the 1,797 images


class Digits(tfds.core.GeneratorBasedBuilder):
    """Writes scikit-learn's digits; the images as PNG, which TFDS could make from pixels only with TensorFlow."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="8 x 8 handwritten digits, the copy in scikit-learn, with a fixed split.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            homepage="https://archive.ics.uci.edu/dataset/80",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        from sklearn.datasets import load_digits

        digits: Any = load_digits()
        images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # they come as 0 ... 16
        test = test_indices(digits.target)
        train = np.setdiff1d(np.arange(len(images)), test)
        return {
            "train": self._generate_examples(images, digits.target, train),
            "test": self._generate_examples(images, digits.target, test),
        }

    def _generate_examples(self, images: np.ndarray, labels: np.ndarray, indices: np.ndarray) -> Iterator:
        from PIL import Image

        for index in indices.tolist():
            png = io.BytesIO()
            Image.fromarray(images[index]).save(png, "PNG")
            png.seek(0)
            yield index, {"image": png, "label": int(labels[index])}


def test_indices(labels: np.ndarray) -> np.ndarray:
    """The same number of images of each class, drawn by a generator whose stream NumPy has frozen for good."""
    order = np.random.RandomState(0).permutation(len(labels))
    return np.sort(np.concatenate([order[labels[order] == label][:TEST_IMAGES_PER_CLASS] for label in range(10)]))
