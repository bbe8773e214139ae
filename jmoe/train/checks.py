"""What must fit together before anything is computed: the model, the dataset, and the options of both."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jmoe.errors import UserError
from jmoe.train.config import TrainConfig


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Turns what the layers raise while they are traced (a capacity without slots, say) into a sentence to the user."""
    try:
        yield
    except ValueError as error:
        if isinstance(error, UserError) or "\n" in str(error):
            raise  # ours are sentences; what has more lines is a mistake in the program
        raise UserError(str(error)) from error


def abstract_batch(config: TrainConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of what the step takes of a batch."""
    B = config.data.batch_size
    shape = (B, *config.model.image_size, config.model.channels)
    return {"image": jax.ShapeDtypeStruct(shape, np.uint8), "label": jax.ShapeDtypeStruct((B,), np.int32)}


def check_classes(config: TrainConfig) -> None:
    """Raises UserError unless the model has a class for every label of the dataset."""
    classes = config.data.source.num_classes
    if classes != config.model.num_classes:
        raise UserError(
            f"The dataset {config.data.source.name} has {classes} classes; the model has "
            f"num_classes={config.model.num_classes}. Set model.num_classes={classes}."
        )


def check_images(config: TrainConfig, batch: dict[str, Any]) -> dict[str, Any]:
    """Returns the batch; raises UserError unless its images are of the size that the model takes."""
    wanted, came = (*config.model.image_size, config.model.channels), batch["image"].shape[1:]
    if wanted != came:
        option = "test_preprocess" if config.data.test_preprocess else "image_size"
        raise UserError(
            f"The dataset {config.data.source.name} has images of {came} (height, width, channels); the model takes "
            f"{wanted}. Set data.{option}, or model.image_size and model.channels."
        )
    return batch
