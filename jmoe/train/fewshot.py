"""Few-shot evaluation of a run: its datasets, brought to the protocol of `jmoe.evaluate.fewshot`."""

import contextlib
import dataclasses
import os
from collections.abc import Callable

import jax
import numpy as np

from jmoe.data import DataConfig, test_batches
from jmoe.errors import UserError
from jmoe.evaluate.fewshot import FeatureSet, FewShotResult, few_shot_accuracy, make_featurizer
from jmoe.train.compiled import mesh_of
from jmoe.train.config import FewShot, TrainConfig
from jmoe.train.evaluation import arrays_of, checked, evaluation_batch_size, for_evaluation, nothing, restore
from jmoe.train.feed import evaluation_devices
from jmoe.train.state import TrainState, graph_of


def few_shot_evaluator_of(config: TrainConfig, mesh: jax.sharding.Mesh | None = None) -> Callable[..., FewShotResult]:
    """Returns a function that evaluates a state as config.evaluate.fewshot says, as published where that is None.

    Its second argument is as in `jmoe.train.evaluation.evaluator_of`; it is called before every regression, too.

    The features of a whole training split are computed, though few of them are fitted on: a class is known only when
    the image is read. Of a large dataset, name a slice, such as TFDS("imagenet2012", train="train[:10%]").

    Raises:
      UserError: two datasets have one name, or the model cannot be evaluated. When called: images of another size than
        the model's, or a class with fewer images than shots, unless options allow it.
    """
    options = config.evaluate.fewshot or FewShot()
    mesh = mesh_of(config) if mesh is None else mesh
    config = for_evaluation(config)
    datasets = _datasets(config.data, options)
    batch_size = evaluation_batch_size(config)
    rows, devices = evaluation_devices(config, mesh, batch_size)
    featurize = make_featurizer(graph_of(config), config.model.members, devices)

    def features(data: DataConfig, split: str, state: TrainState, before_batch: Callable[[], None]) -> FeatureSet:
        on_data = dataclasses.replace(config, data=data)
        batches = test_batches(data, split=split, batch_size=batch_size, rows=rows)
        with contextlib.closing(batches), jax.set_mesh(mesh):
            return featurize(checked(on_data, batches, before_batch), *arrays_of(state))

    def accuracy(name: str, train: FeatureSet, test: FeatureSet, before_fit: Callable[[], None]) -> np.ndarray:
        num_classes = datasets[name].source.num_classes
        try:
            return few_shot_accuracy(
                train,
                test,
                num_classes,
                shots=options.shots,
                l2=options.l2,
                seed=options.seed,
                allow_fewer=options.allow_fewer,
                dtype=options.dtype,
                before_fit=before_fit,
            )
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error

    def evaluator(state: TrainState, before_batch: Callable[[], None] = nothing) -> FewShotResult:
        accuracies, images = {}, {}
        for name, data in datasets.items():
            splits = (data.source.train, data.source.test)
            train, test = (features(data, split, state, before_batch) for split in splits)
            accuracies[name] = accuracy(name, train, test, before_batch)
            images[name] = len(test.labels)
        return FewShotResult.at_best_l2(accuracies, options.shots, options.l2, images)

    return evaluator


def few_shot_checkpoint(
    config: TrainConfig, workdir: str | os.PathLike[str], step: int | None = None
) -> tuple[FewShotResult, int]:
    """Evaluates a checkpoint of a run by few-shot regression.

    Args, errors and the step returned are those of `jmoe.train.evaluation.restore`.
    """
    mesh = mesh_of(config)
    state, step = restore(config, workdir, step, mesh)
    return few_shot_evaluator_of(config, mesh)(state), step


def _datasets(data: DataConfig, options: FewShot) -> dict[str, DataConfig]:
    """The datasets to evaluate on, by name."""
    preprocess = options.preprocess or data.test_preprocess
    datasets: dict[str, DataConfig] = {}
    for source in options.datasets or (data.source,):
        if source.name in datasets:
            raise UserError(f"FewShot has two datasets named {source.name!r}: evaluate on each of them by itself.")
        datasets[source.name] = dataclasses.replace(data, source=source, test_preprocess=preprocess)
    return datasets
