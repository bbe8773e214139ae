"""Makes a sparse model of a dense run, and what its optimizer needs to go on."""

import dataclasses
import os
from collections.abc import Sequence

import jax

from jmoe.convert.infer import count
from jmoe.convert.upcycle import GATE_STD, PUBLISHED, upcycle_arrays, upcycle_params
from jmoe.errors import UserError
from jmoe.models.vit import ViTConfig
from jmoe.nn import MoEConfig
from jmoe.paths import path_names
from jmoe.train.checks import readable
from jmoe.train.config import TrainConfig
from jmoe.train.drafts import Draft, draft_of
from jmoe.train.imported import Converted, save_model
from jmoe.train.initialize import Source, below, read_folder
from jmoe.train.overrides import apply_overrides
from jmoe.train.state import initial_state, make_optimizer
from jmoe.train.workdir import read_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Upcycled:
    """What was made of what.

    Attributes:
      model: the sparse model.
      step: of the dense run that it begins from.
      dense_parameters: of the dense model.
      parameters: of the sparse one.
      optimizer_arrays: arrays of the optimizer's state that came along.
    """

    model: ViTConfig
    step: int
    dense_parameters: int
    parameters: int
    optimizer_arrays: int

    def __str__(self) -> str:
        """What the command line prints."""
        assert self.model.moe is not None
        experts = f"{self.model.moe.num_experts} experts in blocks {', '.join(map(str, self.model.moe_layers))}"
        state = f"{self.optimizer_arrays} arrays" if self.optimizer_arrays else "left behind"
        return "\n".join(
            [
                f"dense            {self.dense_parameters:,} parameters, of step {self.step}",
                f"sparse           {self.parameters:,} parameters; {experts}",
                f"optimizer        {state}",
            ]
        )


def upcycle_folder(
    dense: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    moe: MoEConfig = PUBLISHED,
    *,
    gate_std: float = GATE_STD,
    optimizer: bool = False,
    step: int | None = None,
    seed: int = 0,
    sets: Sequence[str] = (),
    overwrite: bool = False,
) -> Upcycled:
    """Writes a folder with the sparse model that begins as a dense one (see `jmoe.convert.upcycle`).

    An experiment starts from it with `initialize`. With the optimizer's state it goes on where the dense run was, at
    the same step of the same schedule; moments and moving averages of an MLP are copied to every expert, and moments of
    the gates are zero. Without, parameters are the moving average of the run, if it has one.

    Args:
      dense: the folder of a dense run, or of a converted dense model.
      directory: the folder to make.
      moe: the sparse blocks; its dropout is that of the experts.
      gate_std: standard deviation of the gates' kernels.
      optimizer: whether to take the optimizer's state along.
      step: of the dense run's checkpoint; None for the last.
      seed: of the gates.
      sets: edits "model.a.b=value" of the sparse model.
      overwrite: whether to replace a converted model that is there.

    Raises:
      UserError: the model is not dense, does not fit the sparse blocks, has no optimizer state, or cannot be written.
    """
    source = read_folder(dense, step=step, optimizer=optimizer)
    if source.model.moe is not None:
        raise UserError(f"The model in {dense} is sparse already, in blocks {source.model.moe_layers}.")
    if optimizer and not source.optimizer:
        raise UserError(f"{dense} has no optimizer state: leave --optimizer out.")
    # Drafts, so that the model is built once, with all edits.
    draft = Draft(ViTConfig, draft_of(source.model).values | {"moe": moe}, (f"the upcycling of {dense}",))
    model = apply_overrides(Draft(Converted, {"model": draft}, draft.origins), sets).model
    weights = source.params if optimizer else source.average or source.params
    params = upcycle_params(weights, model, gate_std=gate_std, seed=seed)
    average, moments = {}, {}
    if optimizer:
        average = upcycle_params(source.average, model, gate_std=gate_std, seed=seed) if source.average else {}
        moments = _moments(source, dense, model)
    save_model(directory, model, params, step=source.step, average=average, optimizer=moments, overwrite=overwrite)
    return Upcycled(
        model=model,
        step=source.step,
        dense_parameters=count({name: array.shape for name, array in weights.items()}),
        parameters=count({name: array.shape for name, array in params.items()}),
        optimizer_arrays=len(source.optimizer),
    )


def _moments(source: Source, dense: str | os.PathLike[str], model: ViTConfig) -> dict:
    """The optimizer's state of the sparse model."""
    config = read_config(dense)
    assert isinstance(config, TrainConfig)  # a converted model has no optimizer state, and was refused
    with readable():
        config = dataclasses.replace(config, model=model)
        state = jax.eval_shape(lambda: initial_state(config, make_optimizer(config, 10**9)))
    shapes = {name: leaf.shape for name, leaf in zip(path_names(state), jax.tree.leaves(state), strict=True)}
    return upcycle_arrays(source.optimizer, below("optimizer", shapes))
