"""Accuracy of a model on a finite set of images, each counted exactly once."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jmoe.evaluate.devices import HERE, Devices
from jmoe.models.vit import VisionTransformer
from jmoe.nn.ensemble import Likelihood, prediction_loss, predictions
from jmoe.notation import Array, Bool, Float, Int, UInt8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What a model did on a set of images.

    Attributes:
      accuracy: share, from 0 to 1, of images whose label is the first prediction; an ensemble predicts by the mean of
        its members' probabilities.
      loss: mean over images of the loss, without auxiliary losses; of an ensemble, that of the mean probability.
      images: how many there were.
      dropped_tokens: share of tokens that got no slot, mean over the sparse blocks; 0.0 for a dense model.
      dropped_assignments: share of choices that got no slot, likewise.
      expert_load: for each sparse block, by its number, the share of choices that wanted each expert.
    """

    accuracy: float
    loss: float
    images: int
    dropped_tokens: float
    dropped_assignments: float
    expert_load: dict[str, list[float]]

    def __str__(self) -> str:
        """As the command line prints it."""
        lines = [f"test accuracy    {100 * self.accuracy:.2f} % of {self.images} images"]
        if self.expert_load:
            lines.append(
                f"tokens dropped   {100 * self.dropped_tokens:.2f} % "
                f"({100 * self.dropped_assignments:.2f} % of their choices of an expert)"
            )
            lines.append("expert load      share of choices, in %")
        for block, load in self.expert_load.items():
            lines.append(f"  block {block:<9}" + " ".join(f"{100 * share:5.1f}" for share in load))
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return dataclasses.asdict(self)


def scale_pixels(
    images: UInt8[Array, "B Y X channels"] | Float[Array, "B Y X channels"],
) -> Float[Array, "B Y X channels"]:
    """Maps 0 ... 255 to -1 ... 1, as models here are trained on."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def evaluate(
    model: VisionTransformer,
    batches: Iterable[dict[str, np.ndarray]],
    likelihood: Likelihood = "softmax",
) -> Evaluation:
    """Classifies all images of some batches, once; `make_evaluator` compiles for many times.

    Args and errors as there.
    """
    graph, state = nnx.split(model)
    return make_evaluator(graph, likelihood, model.config.members)(batches, state)


def make_evaluator(
    graph: nnx.GraphDef, likelihood: Likelihood, members: int = 1, devices: Devices = HERE
) -> Callable[..., Evaluation]:
    """Returns (batches, *states) -> Evaluation for the model of a graph.

    Routers see groups of images, so the batch size and the order of images can change the result a little where
    something is dropped; images that only fill up a batch are masked and change nothing.

    Args:
      graph: of a VisionTransformer; merged with the states it is the model.
      likelihood: the loss: "softmax" or "sigmoid" cross-entropy.
      members: M of an ensemble.
      devices: where it runs.

    Returns:
      a function of batches, each with "image" [B, Y, X, channels] (uint8, or float32 from 0 to 255), "label" [B] and
      "mask" [B], False for what fills up the last batch; it raises ValueError if there is no image.
    """

    @functools.partial(jax.jit, out_shardings=devices.everywhere, compiler_options=devices.exchange.compiler_options)
    def count(states: Any, image: Array, label: Int[Array, " B"], mask: Bool[Array, " B"]) -> dict[str, Any]:
        output = nnx.merge(graph, *states)(scale_pixels(image), mask=mask, exchange=devices.exchange)
        one_hot = jax.nn.one_hot(label, output.logits.shape[-1])
        images = jnp.sum(mask)
        return {
            "correct": jnp.sum((predictions(output.logits, members, likelihood) == label) & mask),
            "loss": jnp.sum(jnp.where(mask, prediction_loss(output.logits, one_hot, members, likelihood), 0.0)),
            "images": images,
            # What a router did is a mean over the batch's real images; it counts by their number.
            "blocks": jax.tree.map(lambda metric: metric * images, output.metrics),
        }

    def evaluator(batches: Iterable[dict[str, np.ndarray]], *states: nnx.State) -> Evaluation:
        sums: Any = None
        for batch in map(devices.put, batches):
            new = count(states, batch["image"], batch["label"], batch["mask"])
            sums = new if sums is None else jax.tree.map(jnp.add, sums, new)
        if sums is None or not sums["images"]:
            raise ValueError("There is no image to evaluate on.")
        return _summarise(jax.device_get(sums))

    return evaluator


def _summarise(sums: dict[str, Any]) -> Evaluation:
    images = int(sums["images"])
    blocks = {name: jax.tree.map(lambda s: s / images, block) for name, block in sums["blocks"].items()}
    return Evaluation(
        accuracy=float(sums["correct"] / images),
        loss=float(sums["loss"] / images),
        images=images,
        dropped_tokens=_mean([block["dropped_tokens"] for block in blocks.values()]),
        dropped_assignments=_mean([block["dropped_assignments"] for block in blocks.values()]),
        expert_load={name: [float(share) for share in block["expert_load"]] for name, block in blocks.items()},
    )


def _mean(values: list[Any]) -> float:
    return float(np.mean(values)) if values else 0.0
