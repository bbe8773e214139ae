"""What a reader of a plan should know or change, in sentences with numbers."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax

from jmoe.errors import UserError
from jmoe.parallel import Mesh, build
from jmoe.parallel.mesh import BATCH
from jmoe.parallel.topology import nearest_topology, topology_devices
from jmoe.plan.memory import gib, kept
from jmoe.plan.result import Plan, mesh_text
from jmoe.train.compiled import check_batch
from jmoe.train.config import TrainConfig
from jmoe.train.state import TrainState


def advice(config: TrainConfig, plan: Plan, mesh: jax.sharding.Mesh, state: TrainState) -> tuple[str, ...]:
    """Sentences about a plan: what to change if it does not fit, and what it does not say."""
    notes = []
    if not plan.fits:
        memory = plan.memory
        over = gib(memory.peak - memory.available)
        notes.append(
            f"It does not fit: a chip needs {gib(memory.peak)} and has {gib(memory.available)}, {over} too little. "
            "What would help, each by itself:"
        )
        notes += _remedies(config, plan, mesh, state) or ["a slice of chips with more memory."]
    if config.steps is None:
        notes.append(
            f"The recipe has epochs={config.epochs}, and a plan opens no dataset: for days and chip-hours, give "
            "--set epochs=none --set steps=N, where N is epochs * images / batch_size."
        )
    if plan.bound is not None and plan.bound.uncounted:
        named = ", ".join(f"{count} x {kind}" for kind, count in sorted(plan.bound.uncounted.items()))
        notes.append(f"Not in the bound of the step, for want of a figure: {named} (a loop counts once).")
    return tuple(notes)


def _remedies(config: TrainConfig, plan: Plan, mesh: jax.sharding.Mesh, state: TrainState) -> list[str]:
    """Changes that make a step smaller, with an estimate of what they save."""
    memory = plan.memory
    stays = memory.parameters + memory.optimizer + memory.other_state
    works = max(memory.peak - stays - memory.batch, 0)  # activations and gradients
    room = memory.available - stays
    found = []
    if not config.model.remat:
        found.append(
            f"--set model.remat=true keeps what goes into a block instead of all activations in it: much of the "
            f"{gib(works)} of temporary memory, for about a third more FLOPs."
        )
    images = config.data.batch_size // config.accumulate // math.prod(mesh.shape[axis] for axis in BATCH)
    fewer = (n for n in _divisors(images) if n > 1 and works / n < room)
    parts = next((n for n in fewer if _can_be(config, mesh, accumulate=n * config.accumulate)), None)
    if parts:
        found.append(
            f"--set accumulate={parts * config.accumulate} computes the {images} images of a chip in {parts} parts: "
            f"about {gib(works / parts)} of temporary memory instead of {gib(works)}."
        )
        found.append(
            f"--set data.batch_size={config.data.batch_size // parts} saves as much and changes the recipe: scale the "
            "learning rate with it."
        )
    found += _more_sharded(config, plan, mesh, state)
    if getattr(config.optimizer, "mu_dtype", "") is None and memory.parameters / 2 > 0.02 * memory.available:
        found.append(
            f"--set optimizer.mu_dtype=bfloat16 keeps the mean of gradients in half: {gib(memory.parameters / 2)}."
        )
    found += _larger(config, plan, mesh, state)
    return found


def _more_sharded(config: TrainConfig, plan: Plan, mesh: jax.sharding.Mesh, state: TrainState) -> Iterator[str]:
    """The fewest parts of the parameters with which they take up to a quarter of the memory."""
    before = kept(config, state, mesh).total
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    options = [n for n in _divisors(data) if n > 1]
    for n in options:
        axes = dict(mesh.shape) | {"data": data // n, "fsdp": fsdp * n}
        after = kept(config, state, build(Mesh(**axes), list(mesh.devices.flat), _experts(config))).total
        if after < plan.memory.available / 4 or n == options[-1]:
            if after < 0.95 * before:
                yield (
                    f"--mesh {mesh_text(axes)} keeps parameters and optimizer in {fsdp * n} parts: {gib(after)} "
                    f"instead of {gib(before)}."
                )
            return


def _larger(config: TrainConfig, plan: Plan, mesh: jax.sharding.Mesh, state: TrainState) -> Iterator[str]:
    """A slice of twice the chips, if there is one and the batch can be divided as far."""
    generation, _, shape = plan.topology.partition(":")
    sizes = [int(size) for size in shape.split("x")]
    smallest = max(d for d, size in enumerate(sizes) if size == min(sizes))
    topology = nearest_topology(f"{generation}:{'x'.join(str(s * (1 + (d == smallest))) for d, s in enumerate(sizes))}")
    if math.prod(int(size) for size in topology.partition(":")[2].split("x")) != 2 * plan.chips:
        return
    axes = dict(mesh.shape) | {"data": 2 * mesh.shape["data"]}
    for asked, more in ((config.mesh, ""), (Mesh(**axes), f" --mesh {mesh_text(axes)}")):
        try:
            built = build(asked, topology_devices(topology), _experts(config))
        except UserError:
            continue
        if _can_be(config, built):
            yield f"--topology {topology}{more} has twice the chips, with half of the images and activations on each."
            return


def _can_be(config: TrainConfig, mesh: jax.sharding.Mesh, **changes: Any) -> bool:
    """Whether the experiment with these changes is one that a mesh can take."""
    try:
        changed = dataclasses.replace(config, **changes)
        check_batch(changed.data.batch_size // changed.accumulate, changed, mesh)
    except ValueError:  # a UserError, too: of the configuration, or of the division among devices
        return False
    return True


def _experts(config: TrainConfig) -> int | None:
    return None if config.model.moe is None else config.model.moe.num_experts


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
