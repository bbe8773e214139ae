"""Starts a run from other weights: fine-tuning, and going on with an upcycled model.

Every parameter of the model is accounted for. It is loaded, or resized (learned positions), or the experiment says that
it is fresh; and every one of the checkpoint is used, or the experiment says that it is not. Anything else is an error.
"""

import dataclasses
import difflib
import logging
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jmoe.convert.api import load
from jmoe.convert.names import first_of
from jmoe.convert.positions import resize_positions
from jmoe.errors import UserError
from jmoe.models.vit import ViTConfig
from jmoe.paths import path_names
from jmoe.train import workdir as folders
from jmoe.train.checkpoint import Checkpointer, peek
from jmoe.train.config import Initialize
from jmoe.train.config_json import differences, to_json

log = logging.getLogger(__name__)

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What was read of a checkpoint.

    Attributes:
      model: the network it belongs to.
      step: after which it was saved; 0 for a checkpoint of another program.
      params: by name, such as "head/kernel".
      average: their moving average by the same names; empty where there is none.
      optimizer: the optimizer's state by name, such as "direction/mu/head/kernel"; empty if it was not asked for.
    """

    model: ViTConfig
    step: int
    params: Arrays
    average: Arrays
    optimizer: Arrays


@dataclasses.dataclass(frozen=True, kw_only=True)
class Match:
    """What becomes of the parameters of a model and of a checkpoint.

    Attributes:
      values: of the model's parameters, by name.
      resized: of those, the ones that the checkpoint has for another grid of patches, and from which to which.
      fresh: parameters of the model that stay as they are.
      unused: parameters of the checkpoint that go nowhere.
    """

    values: Arrays
    resized: dict[str, str]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def __str__(self) -> str:
        """What the log says."""
        loaded = len(self.values) - len(self.resized)
        size = sum(value.size for value in self.values.values())
        resized = (f"{name} resized from {grids}" for name, grids in self.resized.items())
        parts = [f"{loaded} arrays loaded as they are", *resized, f"{size:,} parameters in all"]
        parts += [f"fresh: {', '.join(self.fresh) or 'none'}", f"not used: {', '.join(self.unused) or 'none'}"]
        return "; ".join(parts)


def read_source(initialize: Initialize) -> Source:
    """Reads what an experiment starts from.

    Raises:
      UserError: it is not there, or damaged.
    """
    if initialize.format == "jmoe":
        return read_folder(initialize.path, optimizer=initialize.optimizer)
    found = load(initialize.format, initialize.path)
    return Source(model=found.config, step=0, params=found.params, average={}, optimizer={})


def read_folder(path: str | os.PathLike[str], *, step: int | None = None, optimizer: bool = False) -> Source:
    """Reads a checkpoint in the folder of a run, or in one that `jmoe convert` wrote, under the names it has.

    Args:
      path: of the folder.
      step: of the checkpoint; None for the last.
      optimizer: whether to read the optimizer's state, too.

    Raises:
      UserError: there is none, or it is damaged.
    """
    folder = folders.local(path)
    directory = folder / folders.CHECKPOINTS
    if not directory.is_dir():
        raise UserError(f"{folder} holds no checkpoints: it is neither the folder of a run nor a converted one.")
    parts = ("params/", "average/", *(("optimizer/",) if optimizer else ()))
    leaves = {name: leaf for name, leaf in peek(directory)["leaves"].items() if name.startswith(parts)}
    wanted = {name: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"]) for name, leaf in leaves.items()}
    with Checkpointer(directory) as checkpointer:
        if step is None:
            saved, _, step = checkpointer.restore_latest(wanted, partial=True)
        else:
            saved, _ = checkpointer.restore(step, wanted, partial=True)
    arrays = {name: np.asarray(array) for name, array in saved.items()}
    params, average, moments = (below(part, arrays) for part in ("params", "average", "optimizer"))
    config = folders.read_config(folder)
    return Source(model=getattr(config, "model", config), step=step, params=params, average=average, optimizer=moments)


def start_from(initialize: Initialize, model: ViTConfig, state: Any) -> Any:
    """Returns the state of a new run with the values of a checkpoint, and says in the log what came from where.

    Without the optimizer's state, parameters start as their moving average, where the checkpoint has one: that is what
    was evaluated.

    Args:
      initialize: which checkpoint, and what of it.
      model: the network of the run.
      state: its TrainState, as drawn.

    Raises:
      UserError: the checkpoint cannot be read, or something in it does not fit; the sentence names the parameters.
    """
    source = read_source(initialize)
    leaves, treedef = jax.tree.flatten(state)
    drawn = dict(zip(path_names(state), leaves, strict=True))
    params = below("params", drawn)

    averaged = bool(source.average) and not initialize.optimizer
    match = match_params(initialize, source.average if averaged else source.params, source.model, params, model)
    values = {f"params/{name}": value for name, value in match.values.items()}
    if below("average", drawn):
        average = match_params(initialize, source.average or source.params, source.model, params, model).values
        values |= {f"average/{name}": value for name, value in average.items()}
    if initialize.optimizer:
        values["step"] = np.asarray(source.step)
        moments = match_optimizer(initialize, source.optimizer, below("optimizer", drawn), match)
        values |= {f"optimizer/{name}": value for name, value in moments.items()}

    what = "moving average" if averaged else "parameters and optimizer state" if initialize.optimizer else "parameters"
    log.info("Starts from the %s of step %d in %s: %s.", what, source.step, initialize.path, match)
    if initialize.format == "jmoe":  # of other programs' models the options are not known
        changed = differences(to_json(source.model), to_json(model))
        log.info("Options of the model, there -> here: %s.", "; ".join(changed) or "the same")
    return treedef.unflatten([_like(leaf, values[name]) if name in values else leaf for name, leaf in drawn.items()])


def match_params(
    initialize: Initialize,
    source: Mapping[str, Any],
    source_model: ViTConfig,
    target: Mapping[str, Any],
    model: ViTConfig,
) -> Match:
    """Finds the value of every parameter of a model in those of a checkpoint.

    Args:
      initialize: what is fresh, what is dropped, and the name of the checkpoint.
      source: the arrays of the checkpoint by name.
      source_model: the network they belong to.
      target: the parameters of the model by name, as drawn.
      model: the network.

    Raises:
      UserError: anything is left over, or differs; the sentence names it.
    """
    fresh = _chosen(initialize.fresh, target, "fresh", "the model")
    unused = _chosen(initialize.drop, source, "drop", initialize.path)
    unused |= {name for name in source if any(re.search(pattern, name) for pattern in initialize.fresh)}
    theirs = {name: array for name, array in source.items() if name not in unused}
    ours = {name: array for name, array in target.items() if name not in fresh}
    values, resized, different = {}, {}, []
    for name in theirs.keys() & ours.keys():
        was, now = theirs[name], ours[name]
        same_grid = was.shape == now.shape and source_model.grid == model.grid
        if name == "positions" and not same_grid and was.shape[2] == now.shape[2]:
            token = np.asarray(now[:, :1]) if model.pool == "token" else None
            values[name] = resize_positions(was, model.grid, class_token=token, source_grid=source_model.grid)
            resized[name] = f"{_by(source_model.grid)} to {_by(model.grid)} patches"
        elif was.shape != now.shape or not jnp.issubdtype(was.dtype, jnp.floating):
            different.append(f"{name!r} is {was.dtype} {was.shape} there and {now.dtype} {now.shape} in the model")
        else:
            values[name] = was
    problems = first_of(sorted(different))
    if missing := ours.keys() - theirs.keys():
        problems.append(f"it lacks {_listed(missing)}, which 'fresh' would leave as drawn")
    if unexpected := theirs.keys() - ours.keys():
        problems.append(f"the model lacks {_listed(unexpected)}, which 'drop' would leave out")
    if problems:
        raise UserError(f"The run cannot start from {initialize.path}: {'; '.join(problems)}.")
    return Match(values=values, resized=resized, fresh=tuple(sorted(fresh)), unused=tuple(sorted(unused)))


def match_optimizer(
    initialize: Initialize, source: Mapping[str, Any], target: Mapping[str, Any], match: Match
) -> Arrays:
    """Finds the state of an optimizer in that of a checkpoint, but for what belongs to fresh and resized parameters.

    Raises:
      UserError: the checkpoint's is that of another optimizer, or it has none.
    """
    if not source:
        raise UserError(f"{initialize.path} has no optimizer state: set initialize.optimizer=false.")
    anew = {*match.fresh, *match.resized}
    known = {*match.values, *match.fresh, *match.unused}
    wanted = {name: leaf for name, leaf in target.items() if _parameter_of(name, known) not in anew}
    given = {name for name in source if _parameter_of(name, known) not in anew.union(match.unused)}
    different = {name for name in given & wanted.keys() if source[name].shape != wanted[name].shape}
    if different or given != wanted.keys():
        names = different | given ^ wanted.keys()
        raise UserError(
            f"{initialize.path} has the state of another optimizer: they differ in {_listed(names)}. Use the optimizer "
            "it was trained with, or set initialize.optimizer=false."
        )
    return {name: source[name] for name in wanted}


def below(prefix: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays whose names begin with the prefix, by the rest of their names."""
    return {n.removeprefix(f"{prefix}/"): array for n, array in arrays.items() if n.startswith(f"{prefix}/")}


def _chosen(patterns: tuple[str, ...], names: Iterable[str], option: str, where: str) -> set[str]:
    """The names in which one of the expressions is found; each must be found in one."""
    chosen = set()
    for pattern in patterns:
        found = {name for name in names if re.search(pattern, name)}
        if not found:
            nearest = difflib.get_close_matches(pattern, list(names), n=3, cutoff=0.0)
            raise UserError(
                f"initialize.{option} has {pattern!r}, which matches no parameter of {where}. "
                f"The nearest names are {', '.join(map(repr, nearest))}."
            )
        chosen |= found
    return chosen


def _parameter_of(moment: str, params: set[str]) -> str | None:
    """The parameter that a part of an optimizer's state, such as mu/head/bias, belongs to; None for a counter."""
    parts = moment.split("/")
    return next((name for i in range(len(parts)) if (name := "/".join(parts[i:])) in params), None)


def _like(leaf: jax.Array, value: np.ndarray) -> jax.Array:
    """The value in the dtype of a leaf and where that is."""
    if not leaf.committed:
        return jnp.array(value, leaf.dtype)  # a copy, because the step donates its arguments
    host = np.array(value, leaf.dtype)  # every process has all of it and gives its devices their parts
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: host[index])


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]} by {grid[1]}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(repr, sorted(names)))
