"""Everything that decides a training run, as plain data."""

import dataclasses
import math
import re
import typing
from typing import Literal

from jmoe.data import DataConfig, Preprocess, Source, num_train_images
from jmoe.evaluate import fewshot
from jmoe.models.vit import ViTConfig
from jmoe.parallel.mesh import Mesh
from jmoe.parallel.rules import Rule
from jmoe.routing import Router
from jmoe.train.optimizer import Optimizer

Format = Literal["jmoe", "vmoe", "vit", "safetensors"]  # of a checkpoint


@typing.no_type_check  # See DataConfig: checking a source might read the disk.
@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShot:
    """Few-shot linear evaluation of the features; see `jmoe.evaluate.fewshot`. The defaults are the published protocol.

    Attributes:
      shots: images of each class that a regression is fitted on, taken from a dataset's training split.
      datasets: what to evaluate on; the run's own data if empty.
      preprocess: of the images, as DataConfig.test_preprocess; if empty, that of the run's data. As published:
        (Resize(256), CentralCrop(224)), whatever the aspect ratio.
      l2: regularisations, of which the best is taken, for each number of shots and on all datasets together.
      seed: of the choice of images.
      allow_fewer: whether a class that has fewer images than shots gives those, as published, instead of an error.
      dtype: of the regression; "float64" is more exact where l2 is small.
    """

    shots: tuple[int, ...] = (1, 5, 10, 25)
    datasets: tuple[Source, ...] = ()
    preprocess: tuple[Preprocess, ...] = ()
    l2: tuple[float, ...] = fewshot.L2
    seed: int = fewshot.SEED
    allow_fewer: bool = False
    dtype: Literal["float32", "float64"] = "float32"

    def __post_init__(self):
        if not self.shots or min(self.shots) < 1:
            raise ValueError(f"FewShot wants shots of at least 1 image of each class; it got {self.shots}.")
        if not self.l2 or not min(self.l2) > 0:
            raise ValueError(f"FewShot wants l2 above 0; it got {self.l2}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """When and how to evaluate.

    Attributes:
      every: steps between evaluations; None for ten in a run. The last step is always evaluated.
      batch_size: images per step; None for that of training.
      router: the router in evaluation, such as one with more capacity; None for the one of training.
      fewshot: few-shot evaluation, at every evaluation; None for none while training.
    """

    every: int | None = None
    batch_size: int | None = None
    router: Router | None = None
    fewshot: FewShot | None = None

    def __post_init__(self):
        for name in ("every", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"EvalConfig wants {name} of at least 1; it got {value}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save.

    Attributes:
      every: steps between checkpoints; None for ten in a run. The last step is always saved.
      keep: how many checkpoints are kept.
    """

    every: int | None = None
    keep: int = 2

    def __post_init__(self):
        for name in ("every", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"CheckpointConfig wants {name} of at least 1; it got {value}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Initialize:
    """Where the parameters of a new run come from. A run that is resumed goes on with its own.

    Parameters are chosen by regular expressions, searched for anywhere in their names, as in an optimizer.

    Attributes:
      path: of the checkpoint.
      format: "jmoe" for the folder of a run, or one that `jmoe convert` wrote; "vmoe" for the prefix of a published
        V-MoE checkpoint, "vit" for the .npz file of a ViT, "safetensors" for a file that `jmoe convert` wrote.
      fresh: parameters of the model that stay as they are drawn, whatever the checkpoint has: by default the head.
      drop: parameters of the checkpoint that the model has no use for, such as "pre_logits" in published fine-tuning.
      optimizer: whether to go on with the optimizer's state, too, and so with the step and the learning rate that
        belongs to it. Moments of fresh and resized parameters start at zero, but Adam counts on as if they had been
        gathered: until they are, it makes steps several times as long for these.
    """

    path: str
    format: Format = "jmoe"
    fresh: tuple[str, ...] = ("head",)
    drop: tuple[str, ...] = ()
    optimizer: bool = False

    def __post_init__(self):
        if self.format not in typing.get_args(Format):
            known = ", ".join(map(repr, typing.get_args(Format)))
            raise ValueError(f"Initialize wants format to be one of {known}; it got {self.format!r}.")
        if self.optimizer and self.format != "jmoe":
            raise ValueError(f"A checkpoint of format {self.format!r} has no optimizer state: set optimizer=False.")
        for pattern in self.fresh + self.drop:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"Initialize has {pattern!r}, which is not a regular expression: {error}.") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run: what an experiment file's get_config returns.

    Attributes:
      model: the network.
      data: the images, and how many make a step.
      optimizer: AdamW, SGD or Adafactor, with its learning rate.
      epochs: passes over the training images, instead of steps.
      steps: updates of the parameters, instead of epochs.
      loss: softmax cross-entropy, or sigmoid summed over classes.
      mixup: Dirichlet concentration of mixup; 0 for none.
      accumulate: parts of a batch that are computed one after the other, with their gradients averaged.
      ema_decay: of an exponential moving average of the parameters, which is then what is evaluated; None for none.
      seed: of parameters, noise, dropout and the order of images.
      initialize: the checkpoint that the parameters of a new run come from; None draws them.
      evaluate: when and how.
      checkpoint: when.
      log_every: steps between lines of the log.
      mesh: how the devices share the work: by default experts over as many as divide them, images over the rest. It
        changes nothing that is computed but the order of sums (and which hidden units of experts dropout leaves out in
        layers without slots), and may change whenever a run is resumed.
      sharding: rules of where parameters are kept, before those of `jmoe.parallel.RULES`: pairs of a regular expression
        for their names and a mesh axis, or None, for each array axis, such as (("head/kernel", ("fsdp", None)),).
      watchdog: how many times the median of the recent steps one may take before the run is ended as stuck, with the
        stacks of all threads; never before ten minutes. None for no such watch.
    """

    model: ViTConfig
    data: DataConfig
    optimizer: Optimizer
    epochs: int | float | None = None
    steps: int | None = None
    loss: Literal["softmax", "sigmoid"] = "softmax"
    mixup: float = 0.0
    accumulate: int = 1
    ema_decay: float | None = None
    seed: int = 0
    initialize: Initialize | None = None
    evaluate: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log_every: int = 50
    mesh: Mesh = Mesh()  # noqa: RUF009, a frozen dataclass
    sharding: tuple[Rule, ...] = ()
    watchdog: float | None = 20.0

    def __post_init__(self):
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"TrainConfig wants epochs or steps, one of them; it got {self.epochs} and {self.steps}.")
        length = self.epochs or self.steps or 0
        if not (length > 0 and math.isfinite(length)):
            raise ValueError(f"TrainConfig wants a run of finite length above 0; it got {length} epochs or steps.")
        if self.loss not in ("softmax", "sigmoid"):
            raise ValueError(f"TrainConfig wants loss 'softmax' or 'sigmoid'; it got {self.loss!r}.")
        if self.mixup < 0:
            raise ValueError(f"TrainConfig wants mixup of at least 0; it got {self.mixup}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"TrainConfig wants ema_decay between 0 and 1; it got {self.ema_decay}.")
        if self.log_every < 1 or self.accumulate < 1:
            raise ValueError(
                f"TrainConfig wants log_every and accumulate of at least 1; it got {self.log_every}, {self.accumulate}."
            )
        if self.watchdog is not None and not self.watchdog > 1:
            raise ValueError(f"TrainConfig wants watchdog above 1, or None; it got {self.watchdog}.")
        if self.model.num_classes is None:
            raise ValueError("TrainConfig wants a model with num_classes: a model without a head cannot be trained.")
        batch = self.data.batch_size
        if batch % self.accumulate:
            divisor = min((n for n in range(1, batch + 1) if batch % n == 0), key=lambda n: abs(n - self.accumulate))
            raise ValueError(
                f"accumulate={self.accumulate} does not divide batch_size={batch}. Use accumulate={divisor}."
            )
        self._check_groups(batch // self.accumulate)

    def _check_groups(self, images: int) -> None:
        """Raises ValueError if a group of tokens is larger than what is computed at once."""
        moe = self.model.moe
        if moe is None:
            return
        tokens, copies = self.model.tokens, images * moe.members  # of an ensemble, a group counts copies of images
        group = moe.group_size or (moe.images_per_group or copies) * tokens
        if group > copies * tokens:
            named = f"group_size={moe.group_size}" if moe.group_size else f"a group of {moe.images_per_group} images"
            each = f", {moe.members} copies of each," if moe.members > 1 else ""
            raise ValueError(
                f"{named} is larger than the batch: {images} images of {tokens} tokens{each} are routed at once. "
                f"Use groups of at most {copies} images, {copies * tokens} tokens, or data.batch_size="
                f"{math.ceil(group / tokens / moe.members) * self.accumulate}."
            )


def total_steps(config: TrainConfig) -> int:
    """The length of the run in steps; epochs are rounded to the nearest step. Opens the dataset to count it."""
    if config.steps is not None:
        return config.steps
    assert config.epochs is not None
    return max(1, round(config.epochs * num_train_images(config.data) / config.data.batch_size))
