"""Models as folders of jmoe: converted ones, and those of training runs, read and written in any format.

directory/
  model.json       the ViTConfig, where a run has config.json
  checkpoints/0/   the parameters, as a run would save them before its first step
"""

import dataclasses
import functools
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from jmoe import convert
from jmoe.convert.api import Arrays, Imported, Parameter, read_arrays, with_inferred_model
from jmoe.convert.infer import check, parameter_shapes
from jmoe.convert.names import nest
from jmoe.errors import UserError
from jmoe.models.vit import VisionTransformer, ViTConfig
from jmoe.train.checkpoint import Checkpointer, peek
from jmoe.train.config import TrainConfig
from jmoe.train.config_json import from_json, to_json
from jmoe.train.drafts import Draft, draft_of
from jmoe.train.initialize import read_folder
from jmoe.train.overrides import apply_overrides
from jmoe.train.workdir import CHECKPOINTS, MODEL, local, read_config

JMOE = "jmoe"
_NOTE = "model"  # the configuration, beside what jmoe writes in other formats

log = logging.getLogger("jmoe")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Converted:
    """What --set may change of a conversion.

    Attributes:
      model: the network.
    """

    model: ViTConfig


def read(
    format: str,
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    sets: Sequence[str] = (),
    unversioned: bool = False,
) -> Imported:
    """Reads a model.

    Args:
      format: "jmoe" for the folder of a run or a converted model, or one of `jmoe.convert.READ`.
      path: of the folder or file, or the prefix.
      step: of the checkpoint, where a run has several; None for the newest.
      sets: edits "model.a.b=value" of the configuration, for what arrays do not tell.
      unversioned: as for `jmoe.convert.load`.

    Raises:
      UserError: it cannot be read, or the parameters are not those of the model as edited.
    """
    if format == JMOE:
        config, params = load_model(path, step)
        rows = tuple(Parameter(name=n, source=n, shape=a.shape, dtype=a.dtype.name) for n, a in params.items())
        found = Imported(config=config, assumed={}, params=params, parameters=rows, notes={})
    elif step is not None:
        raise UserError(f"Only a folder of jmoe has checkpoints of several steps; --step {step} is nothing for {path}.")
    else:
        found = _with_model(read_arrays(format, path, unversioned=unversioned), path)
    config = apply_overrides(Converted(model=found.config), sets).model
    named = [text.split("=")[0].strip() for text in sets]
    left = [n for n in found.assumed if not any(f"model.{n}.".startswith(f"{m}.") for m in named)]
    assumed = {n: functools.reduce(getattr, n.split("."), config) for n in left}  # as edited: perhaps in part
    if config != found.config:
        check(found.shapes, config, path)
    return dataclasses.replace(found, config=config, assumed=assumed)


def _with_model(arrays: Arrays, path: str | os.PathLike[str]) -> Imported:
    """Arrays with the configuration that jmoe wrote beside them, if it did, or else with the one that they imply."""
    if _NOTE in arrays.notes:
        try:
            config = from_json(json.loads(arrays.notes[_NOTE]))
            if not isinstance(config, ViTConfig):
                raise UserError(f"it is a {type(config).__name__}.")
            check(arrays.shapes, config, path)
            return Imported(config=config, assumed={}, **vars(arrays))
        except ValueError as error:
            log.warning(
                "The model saved with %s cannot be built here, and published options are taken: %s", path, error
            )
    return with_inferred_model(arrays, path)


def write(
    format: str,
    path: str | os.PathLike[str],
    config: ViTConfig,
    params: Mapping[str, Any],
    *,
    num_shards: int = 1,
    overwrite: bool = False,
) -> None:
    """Writes a model as a folder of jmoe, or in one of `jmoe.convert.WRITE` with its configuration beside it.

    Raises:
      UserError: it cannot be written, or there is something already.
    """
    if format == JMOE:
        save_model(path, config, params, overwrite=overwrite)
    else:
        notes = {_NOTE: json.dumps(to_json(config))}
        convert.save(format, path, config, params, num_shards=num_shards, notes=notes, overwrite=overwrite)


def save_model(
    directory: str | os.PathLike[str],
    config: ViTConfig,
    params: Mapping[str, Any],
    *,
    step: int = 0,
    average: Mapping[str, Any] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Makes a folder that `jmoe evaluate` takes for --workdir, and an experiment starts from; complete, or not at all.

    Args:
      directory: must not exist, or be empty, or with `overwrite` hold a converted model.
      config: the model.
      params: its parameters by name, such as "blocks/5/moe/experts/w_in".
      step: that they were saved after.
      average: a moving average of the parameters to go on with, by the same names.
      optimizer: state to go on with by name, such as "direction/mu/head/kernel".
      overwrite: whether to replace a converted model.

    Raises:
      UserError: the parameters are not those of the model, or the folder cannot be written.
    """
    target = local(directory).absolute()
    check({name: np.shape(array) for name, array in params.items()}, config, "What is to be saved")
    state = {"step": np.int32(step), "params": nest(params), "variables": _variables(config)}
    state |= {"key": jax.random.fold_in(jax.random.key(0), 1), "optimizer": nest(optimizer or {})}
    state |= {"average": nest(average or {})}
    temporary, old = target.with_name(f".tmp.{target.name}"), target.with_name(f".old.{target.name}")
    try:
        if target.exists() and any(target.iterdir()) and not (overwrite and (target / MODEL).exists()):
            advice = "say --overwrite, or choose another" if (target / MODEL).exists() else "choose another"
            raise UserError(f"{target} is not empty; {advice}.")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        with Checkpointer(temporary / CHECKPOINTS) as checkpointer:
            checkpointer.save(step, jax.device_put(state), {}, wait=True)
        (temporary / MODEL).write_text(json.dumps(to_json(config), indent=2) + "\n")
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        temporary.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _variables(config: ViTConfig) -> nnx.State:
    """What the model has beside its parameters, such as the state of a router, as at the start."""

    def initial() -> nnx.State:
        _, _, variables = nnx.split(VisionTransformer(config, rngs=nnx.Rngs(0)), nnx.Param, ...)
        return variables

    abstract = jax.eval_shape(initial)
    return jax.jit(initial)() if jax.tree.leaves(abstract) else abstract


def load_model(directory: str | os.PathLike[str], step: int | None = None) -> tuple[ViTConfig, dict[str, np.ndarray]]:
    """Returns model and parameters by name of a folder: that of a training run, or a converted model.

    Of a run with a moving average, that is what is returned, as it is what is evaluated.

    Args:
      directory: the folder.
      step: of the checkpoint; None for the newest.

    Raises:
      UserError: it is no such folder, or damaged.
    """
    source = read_folder(directory, step=step)
    return source.model, source.average or source.params


def for_folder(experiment: TrainConfig, workdir: str | os.PathLike[str], sets: Sequence[str]) -> TrainConfig:
    """Returns an experiment, with the edits of --set applied, for the evaluation of what is in a folder.

    In the folder of a converted model that is the model, with its own router, and its moving average if it has one (one
    that was upcycled with its optimizer may): the experiment gives the data. Edits of model.* are then edits of the
    converted model.

    Raises:
      UserError: an edit is wrong, or asks for a model of other parameters.
    """
    file = local(workdir) / MODEL
    if not file.exists():
        return apply_overrides(experiment, sets)
    log.info("The model is the converted one of %s; the experiment gives the data.", file)
    model = read_config(workdir)
    here = {"model": model, "evaluate": dataclasses.replace(experiment.evaluate, router=None)}
    averaged = any(name.startswith("average/") for name in peek(file.with_name(CHECKPOINTS))["leaves"])
    here["ema_decay"] = (experiment.ema_decay or 0.5) if averaged else None  # any, as nothing is averaged here
    config = apply_overrides(Draft(TrainConfig, draft_of(experiment).values | here, (str(file),)), sets)
    if config.model != model:
        check(parameter_shapes(model), config.model, workdir)
    return config
