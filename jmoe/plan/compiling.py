"""Compiles the real step for a slice and reads the plan off it."""

import dataclasses
import importlib.metadata
import logging
import time
from collections.abc import Callable

import jax

from jmoe._version import __version__
from jmoe.analysis.bound import bound, repeated
from jmoe.analysis.hlo import parse
from jmoe.errors import UserError
from jmoe.parallel import Mesh, topology_devices
from jmoe.parallel.topology import compiling_for
from jmoe.plan import memory
from jmoe.plan.advice import advice
from jmoe.plan.result import Plan, mesh_text
from jmoe.train.compiled import check_batch, make_program, mesh_of
from jmoe.train.config import TrainConfig

logger = logging.getLogger(__name__)

# Where the length of a run is not known without its dataset. It only changes constants of the learning rate.
SOME_STEPS = 10**9


def plan(
    config: TrainConfig,
    topology: str,
    mesh: Mesh | None = None,
    *,
    progress: Callable[[str], None] = logger.info,
) -> Plan:
    """Compiles the step of an experiment for a TPU slice that need not be there, and says what it needs of each chip.

    The dataset is not opened.

    Args:
      config: the experiment.
      topology: such as "v5e:16x16" or "v5p:8x8x8".
      mesh: of its chips; None for that of the experiment.
      progress: is told what happens and how long it took.

    Raises:
      UserError: there is no such topology, libtpu is not installed, the mesh does not multiply to the chips or does not
        divide the experts or the batch, or the compiler refuses the step for another reason than memory. One that does
        not fit is a plan that says so.
    """
    devices = topology_devices(topology)
    config = config if mesh is None else dataclasses.replace(config, mesh=mesh)
    started = time.monotonic()
    program = make_program(config, config.steps or SOME_STEPS, devices)
    built = program.mesh
    found = memory.kept(config, program.state, built)
    result = Plan(
        topology=topology,
        mesh=dict(built.shape),
        batch_size=config.data.batch_size,
        steps=config.steps,
        memory=memory.before_compiling(found),
        flops=None,
        bytes=None,
        bound=None,
        notes=(),
        versions=versions(),
    )
    name = f"{topology} {mesh_text(built.shape)}"
    chip = result.chip
    with compiling_for(built):
        lowered = program.step.lower(program.state, program.batch)
        progress(f"{name}: traced in {time.monotonic() - started:.0f} s, compiling")
        started = time.monotonic()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            refused = memory.of_refusal(found, str(error), chip.memory)
            if refused is None:
                raise UserError(
                    f"The compiler for {topology} refuses the step: {' '.join(str(error).split())[:500]}"
                ) from error
            progress(f"{name}: does not fit, after {time.monotonic() - started:.0f} s")
            result = dataclasses.replace(result, memory=refused)
            return dataclasses.replace(result, notes=advice(config, result, built, program.state))
    progress(f"{name}: compiled in {time.monotonic() - started:.0f} s")

    cost = compiled.cost_analysis() or {}
    text = parse(compiled.as_text() or "")
    more = repeated(text)
    result = dataclasses.replace(
        result,
        memory=memory.of_compiled(found, compiled, text, chip.memory),
        flops=float(cost["flops"]) + more.flops,
        bytes=float(cost["bytes accessed"]) + more.bytes,
        bound=bound(text, chip, mesh=built.shape, coordinates=[device.coords for device in built.devices.flat]),
    )
    return dataclasses.replace(result, notes=advice(config, result, built, program.state))


def check(config: TrainConfig, topology: str, mesh: Mesh | None = None) -> None:
    """Raises the UserError of `plan` for what can be known without compiling: topology, mesh, batch, heads.

    Args:
      config: the experiment.
      topology: such as "v5e:16x16".
      mesh: of its chips; None for that of the experiment.
    """
    config = config if mesh is None else dataclasses.replace(config, mesh=mesh)
    check_batch(config.data.batch_size // config.accumulate, config, mesh_of(config, topology_devices(topology)))


def versions() -> dict[str, str]:
    """Of what compiles a plan."""
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    return {"jmoe": __version__, **packages}
