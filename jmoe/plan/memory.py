"""How much memory a step needs, before it is compiled as far as that is known, and after."""

import dataclasses
import math
import re
from typing import Any

import jax
from jax.sharding import Sharding

from jmoe.analysis.activations import activations
from jmoe.analysis.chips import GIB
from jmoe.analysis.hlo import Program
from jmoe.plan.result import Memory
from jmoe.train.checks import abstract_batch
from jmoe.train.compiled import divided, state_shardings
from jmoe.train.config import TrainConfig
from jmoe.train.state import TrainState, initial_state, make_optimizer

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# What the compiler for TPUs says: either form has first what is needed, then what there is.
_OUT_OF_MEMORY = (
    re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kept:
    """What stays on a chip from step to step, and the batch, in bytes."""

    parameters: int
    optimizer: int
    other_state: int
    batch: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.optimizer + self.other_state + self.batch


def abstract_state(config: TrainConfig, total_steps: int) -> TrainState:
    """The shapes of what training changes."""
    optimizer = make_optimizer(config, total_steps)
    return jax.eval_shape(lambda: initial_state(config, optimizer))


def kept(config: TrainConfig, state: TrainState, mesh: jax.sharding.Mesh) -> Kept:
    """Counts what the sharding rules leave on each chip of a mesh.

    Args:
      config: the experiment.
      state: of `abstract_state`.
      mesh: of `jmoe.parallel.build`.
    """
    where = state_shardings(config, state, mesh)

    def bytes_of(*fields: str) -> int:
        leaves, shardings = (jax.tree.leaves([getattr(tree, name) for name in fields]) for tree in (state, where))
        return sum(map(_shard_bytes, leaves, shardings))

    return Kept(
        parameters=bytes_of("params"),
        optimizer=bytes_of("optimizer"),
        other_state=bytes_of("step", "variables", "average", "key"),
        batch=sum(_shard_bytes(leaf, divided(mesh)) for leaf in abstract_batch(config).values()),
    )


def before_compiling(found: Kept) -> Memory:
    """What is known of the memory of a step that is still to be compiled."""
    return Memory(**dataclasses.asdict(found), activations=None, temporary=None, peak=found.total, available=0)


def of_compiled(found: Kept, compiled: jax.stages.Compiled, program: Program, available: float) -> Memory:
    """The memory of a step that was compiled, of which `program` is the text that was read."""
    analysis = compiled.memory_analysis()
    assert analysis is not None  # the compiler for TPUs has one
    arguments, outputs = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    return Memory(
        **dataclasses.asdict(found),
        activations=activations(program),
        temporary=analysis.temp_size_in_bytes,
        peak=arguments + outputs - analysis.alias_size_in_bytes + analysis.temp_size_in_bytes,
        available=int(available),
    )


def of_refusal(found: Kept, message: str, available: float) -> Memory | None:
    """The memory of a step that the compiler refuses for the lack of it; None if that is not why."""
    matches = [match for pattern in _OUT_OF_MEMORY if (match := pattern.search(message))]
    if not matches:
        return None
    needed, unit, has, has_unit = matches[0].groups()
    return Memory(
        **dataclasses.asdict(found),
        activations=None,
        temporary=None,
        peak=round(float(needed) * UNITS[unit]),
        available=round(float(has) * UNITS[has_unit]) if float(has) else int(available),
    )


def gib(size: int | float) -> str:
    """Bytes as text."""
    return f"{size / GIB:.2f} GiB"


def _shard_bytes(leaf: Any, sharding: Sharding) -> int:
    return math.prod(sharding.shard_shape(tuple(leaf.shape))) * leaf.dtype.itemsize
