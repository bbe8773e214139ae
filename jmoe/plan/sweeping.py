"""Tries the meshes that make sense for a slice and ranks them."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jmoe.analysis.chips import CHIPS
from jmoe.analysis.cost import Cost, forward_cost
from jmoe.errors import UserError
from jmoe.parallel import Mesh, build, topology_devices
from jmoe.parallel.mesh import possible
from jmoe.plan.compiling import SOME_STEPS, plan
from jmoe.plan.memory import abstract_state, gib, kept
from jmoe.plan.result import Plan, mesh_text
from jmoe.train.compiled import check_batch
from jmoe.train.config import TrainConfig

logger = logging.getLogger(__name__)

MODEL = (1, 2, 4)  # more devices for one image's matrix multiplies only add traffic at the sizes of vision


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """What came of trying meshes.

    Attributes:
      plans: those that fit, the fastest by the bound first, and then those that do not.
      skipped: for each mesh that was not compiled, as --mesh takes it, why.
    """

    plans: tuple[Plan, ...]
    skipped: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"plans": [one.to_json() for one in self.plans], "skipped": dict(self.skipped)}


def sweep(
    config: TrainConfig, topology: str, *, tries: int = 6, progress: Callable[[str], None] = logger.info
) -> Sweep:
    """Compiles an experiment for the meshes of a slice that an estimate of memory and traffic holds for the best.

    Looked at are all divisors of the experts, powers of two for fsdp, and model of 1, 2 and 4, as far as they divide
    the chips, the batch and the heads.

    Args:
      config: the experiment; its mesh is not read.
      topology: such as "v5e:16x16".
      tries: how many are compiled; more, one by one, as long as none of them fits.
      progress: is told what happens and how long it took.

    Raises:
      UserError: as `plan`, if no mesh can be compiled.
    """
    devices = topology_devices(topology)
    experts = None if config.model.moe is None else config.model.moe.num_experts
    state = abstract_state(config, config.steps or SOME_STEPS)
    skipped: dict[str, str] = {}
    estimates: list[tuple[float, str, Mesh]] = []
    moe = config.model.moe
    cost = forward_cost(config.model, batch_size=(moe.images_per_group if moe else None) or config.data.batch_size)
    for mesh in possible(len(devices), experts):
        if mesh.fsdp & (mesh.fsdp - 1) or mesh.model not in MODEL:
            continue
        built = build(mesh, devices, experts)
        name = mesh_text(built.shape)
        available = available_memory(topology)
        if reason := _obstacle(config, built):
            skipped[name] = reason
        elif (needed := kept(config, state, built).total) > available:
            skipped[name] = f"state and batch alone take {gib(needed)} of {gib(available)}"
        else:
            estimates.append((estimated_traffic(config, cost, mesh), name, mesh))
    estimates.sort(key=lambda one: one[:2])
    plans, last = [], None
    for rank, (sent, name, mesh) in enumerate(estimates, 1):
        # An estimate knows no temporary memory: where it takes all of them, one that fits may come later.
        more = rank > tries and bool(plans) and not any(one.fits for one in plans)
        if rank > tries and not more:
            skipped[name] = (
                f"number {rank} by an estimate of what a chip sends ({sent / 1e9:.2f} GB); --tries compiles more"
            )
            continue
        progress(f"[{rank}/{min(tries, len(estimates))}] {name}" if not more else f"[{rank}] none fits yet: {name}")
        try:
            plans.append(plan(config, topology, mesh, progress=progress))
        except UserError as error:
            skipped[name] = str(error)
            last = error
        finally:
            jax.clear_caches()  # of the traced step, which is large
    if not plans:
        raise last or UserError(f"No mesh of {topology} can take the experiment: {'; '.join(_few(skipped))}.")
    plans.sort(key=lambda one: (not one.fits, one.step_seconds or 0.0, one.memory.peak))
    return Sweep(plans=tuple(plans), skipped=skipped)


def estimated_traffic(config: TrainConfig, cost: Cost, mesh: Mesh) -> float:
    """Bytes that a chip sends in a step, roughly: enough to choose which meshes to compile first.

    Args:
      config: the experiment.
      cost: of its network, for the number of parameters.
      mesh: with a number for every axis.
    """
    model = config.model
    expert_bytes = 4.0 * cost.parts["experts"].parameters
    dense_bytes = 4.0 * cost.parameters - expert_bytes
    data, expert = mesh.data or 1, mesh.expert or 1
    images = config.data.batch_size / (data * expert * mesh.fsdp)
    activations = 2.0 * images * model.tokens * model.width
    sent = 0.0
    if data * expert > 1:  # the gradients of what every chip has
        sent += 2 * dense_bytes / (mesh.fsdp * mesh.model)
    if data > 1:
        sent += 2 * expert_bytes / (expert * mesh.fsdp * mesh.model)
    if mesh.fsdp > 1:  # parameters come together forward and backward, gradients are dealt out
        sent += 3 * (dense_bytes + expert_bytes / expert) / mesh.model * (1 - 1 / mesh.fsdp)
    if expert > 1 and model.moe is not None:  # there and back, forward and backward
        per_token = getattr(model.moe.router, "k", 1) * (getattr(model.moe.router, "capacity_factor", None) or 1.0)
        sent += 4 * len(model.moe_layers) * per_token * activations * (1 - 1 / expert)
    if mesh.model > 1:  # two sums a block, forward and backward
        sent += 8 * model.depth * activations * (1 - 1 / mesh.model)
    return sent


def _obstacle(config: TrainConfig, mesh: jax.sharding.Mesh) -> str:
    """Why a mesh cannot take the experiment, if it cannot."""
    try:
        check_batch(config.data.batch_size // config.accumulate, config, mesh)
    except UserError as error:
        return str(error)
    return ""


def available_memory(topology: str) -> float:
    """Bytes of a chip."""
    return CHIPS[topology.partition(":")[0]].memory


def _few(skipped: Mapping[str, str]) -> list[str]:
    return [f"{name}: {reason.rstrip('.')}" for name, reason in list(skipped.items())[:3]]
