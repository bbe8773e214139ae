"""The training step on a mesh: where its arrays lie, and the program of all devices together."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jmoe.errors import UserError
from jmoe.nn.exchange import ONE_DEVICE, Exchange
from jmoe.parallel import mesh as meshes
from jmoe.parallel import rules
from jmoe.parallel.exchange import Exchange as MeshExchange
from jmoe.parallel.mesh import BATCH, Mesh, batch_parts
from jmoe.paths import path_names
from jmoe.train.checks import abstract_batch, readable
from jmoe.train.config import TrainConfig
from jmoe.train.state import TrainState, graph_of, initial_state, make_optimizer
from jmoe.train.step import Batch, make_step

logger = logging.getLogger("jmoe")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """Everything that a run computes on its devices; all arrays are global, whatever process they are seen from.

    Attributes:
      mesh: of the devices.
      state: shape, dtype and sharding of every array of the state.
      batch: the same of a batch.
      init: () -> the state before the first step.
      step: (state, batch) -> (state, metrics); the state is donated. Metrics are on every device.
    """

    mesh: jax.sharding.Mesh
    state: TrainState
    batch: Batch
    init: Callable[[], TrainState]
    step: Any  # of jax.jit: it can be lowered, too


def make_program(
    config: TrainConfig,
    total_steps: int,
    devices: Sequence[Any] | None = None,
    exchange: Callable[[jax.sharding.Mesh], Exchange] | None = None,
) -> Program:
    """Prepares the step of an experiment for devices; nothing is compiled yet.

    Args:
      config: the experiment, whose mesh says how they share the work.
      total_steps: the length of the run, for the learning rate.
      devices: all of the run, or of a topology to compile for; `jax.devices()` if None.
      exchange: makes that of a mesh; None for our own.

    Raises:
      UserError: the mesh does not fit the devices, a batch cannot be divided among them, or the layers cannot route
        such groups.
    """
    mesh = mesh_of(config, devices)
    check_batch(config.data.batch_size // config.accumulate, config, mesh)
    carry = (exchange or exchange_of)(mesh)
    optimizer, graph = make_optimizer(config, total_steps), graph_of(config)
    state = jax.eval_shape(lambda: initial_state(config, optimizer))
    where = state_shardings(config, state, mesh)
    _say_placement(config, state, mesh)
    batch = {name: placed(shape, divided(mesh)) for name, shape in abstract_batch(config).items()}
    step = make_step(config, graph, optimizer, total_steps, carry)
    with readable(), jax.set_mesh(mesh):
        jax.eval_shape(step, state, batch)
    return Program(
        mesh=mesh,
        state=placed(state, where),
        batch=batch,
        init=_on(mesh, jax.jit(lambda: initial_state(config, optimizer), out_shardings=where)),
        step=jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(where, whole(mesh)),
            compiler_options=carry.compiler_options,
        ),
    )


def mesh_of(config: TrainConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The devices, laid out as the experiment's mesh says."""
    moe = config.model.moe
    return meshes.build(
        config.mesh, devices, None if moe is None else moe.num_experts, functools.partial(accepts, config)
    )


def accepts(config: TrainConfig, mesh: Mesh) -> bool:
    """Whether a mesh, with a number for every axis, divides the heads and the images of an experiment."""
    parts = (mesh.data or 1) * mesh.fsdp * (mesh.expert or 1)
    images = config.data.batch_size // config.accumulate
    return config.model.num_heads % mesh.model == 0 and images % (parts * images_per_unit(config)) == 0


def exchange_of(mesh: jax.sharding.Mesh) -> Exchange:
    """How tokens get to experts on a mesh; nothing to do on one device."""
    return ONE_DEVICE if mesh.size == 1 else MeshExchange(mesh)


def divided(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Of arrays whose axis 0 counts images."""
    return NamedSharding(mesh, PartitionSpec(BATCH))


def whole(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Of arrays that every device has."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(config: TrainConfig, state: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
    """Where the arrays of a state lie: parameters by the experiment's rules, and with each what goes with it."""
    return rules.state_shardings(state.params, state, mesh, (*config.sharding, *rules.RULES))


def _say_placement(config: TrainConfig, state: TrainState, mesh: jax.sharding.Mesh) -> None:
    """Logs what one might not have meant: parameters without a rule, rules of the experiment without a parameter."""
    if mesh.size == 1:
        return
    params = zip(path_names(state.params), jax.tree.leaves(state.params), strict=True)
    placement = rules.place({name: tuple(p.shape) for name, p in params}, mesh, (*config.sharding, *rules.RULES))
    own = {pattern for pattern, _ in config.sharding}
    placement = dataclasses.replace(placement, unused=tuple(p for p in placement.unused if p in own))
    for line in placement.report():
        logger.info(line)


def check_batch(images: int, config: TrainConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError unless devices can divide so many images, which are routed in groups, and the heads of each."""
    heads, model, moe = config.model.num_heads, mesh.shape["model"], config.model.moe
    experts = None if moe is None else moe.num_experts
    slices = len(meshes.slices_of(list(mesh.devices.flat)))
    if heads % model:
        best = meshes.nearest(meshes.of(mesh), mesh.size, experts, slices, functools.partial(accepts, config))
        raise UserError(
            f"model={model} does not divide the {heads} heads of attention ({meshes.of(mesh)}): use {best}."
        )
    parts = batch_parts(mesh)
    unit = images_per_unit(config)
    if images % (parts * unit) == 0:
        return
    counted = f"{images} images" + (f" (a part of accumulate={config.accumulate})" if config.accumulate > 1 else "")
    together = f" in groups of {unit}" if unit > 1 else ""
    processes = len({device.process_index for device in mesh.devices.flat})
    where = f"{parts} devices" + (f" of {processes} processes" if processes > 1 else "")
    whole_batch = moe is not None and moe.group_size is None and moe.images_per_group is None
    step = parts * (1 if whole_batch else unit)
    nearest = max(1, round(images / step)) * step
    advice = f"data.batch_size={nearest * config.accumulate}"
    fewer_parts = [n for n in range(1, config.accumulate) if config.data.batch_size % (n * step) == 0]
    if fewer_parts:  # the recipe stays what it is
        advice = f"accumulate={max(fewer_parts)}"
    if moe is not None and whole_batch:  # a group that grows with the batch
        advice += f" with model.moe.images_per_group={nearest // parts * moe.members}"
    others = meshes.possible(mesh.size, experts, fsdp=mesh.shape["fsdp"], num_slices=slices)
    fewer = [o for o in others if heads % o.model == 0 and images % (mesh.size // o.model * unit) == 0]
    if fewer:  # of all, one that leaves the fewest devices to the heads
        advice += f', or --set "mesh={min(fewer, key=lambda o: (o.model, -(o.expert or 1)))}"'
    raise UserError(f"{counted}{together} cannot be divided among {where} ({meshes.of(mesh)}): use {advice}.")


def images_per_unit(config: TrainConfig) -> int:
    """How many images must stay together, because they are routed in one group; 1 for a dense model.

    A group of an ensemble counts its M copies of every image, which stay together, too.
    """
    moe, tokens = config.model.moe, config.model.tokens
    if moe is None:
        return 1
    if moe.group_size is not None:
        copies = math.lcm(moe.group_size, tokens) // tokens
    elif moe.images_per_group is not None:
        copies = moe.images_per_group
    else:
        return config.data.batch_size // config.accumulate
    return math.lcm(copies, moe.members) // moe.members


def rows_of(sharding: NamedSharding, num_rows: int, process: int | None = None) -> list[int]:
    """The rows of a global array that lie on the devices of a process, in order; of this one if None."""
    process = jax.process_index() if process is None else process
    places = sharding.devices_indices_map((num_rows,))
    return sorted({r for d, (rows,) in places.items() if d.process_index == process for r in range(num_rows)[rows]})


def placed(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of arrays with the shardings that are wanted, as to restore a checkpoint into."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)


def _on(mesh: jax.sharding.Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, called with the mesh in force."""

    @functools.wraps(function)
    def called(*arguments: Any) -> Any:
        with jax.set_mesh(mesh):
            return function(*arguments)

    return called
