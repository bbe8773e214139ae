"""What a plan says, as data."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jmoe.analysis.bound import Bound
from jmoe.analysis.chips import CHIPS, Chip

SECONDS_PER_DAY = 86_400


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """What a chip keeps in its memory, in bytes.

    Attributes:
      parameters: of the model, in float32.
      optimizer: its state.
      other_state: averages, random keys and state that no gradient trains.
      batch: images and labels.
      activations: what the forward pass leaves for the backward pass, in the layout that the compiler chose; a part of
        temporary. With `accumulate`, of one part of the batch. None where it does not fit.
      temporary: all that is kept while a step runs: activations, gradients and workspace; None where it does not fit.
      peak: all that a step needs at once; where it does not fit, what the compiler says that it would.
      available: what the chip has.
    """

    parameters: int
    optimizer: int
    other_state: int
    batch: int
    activations: int | None
    temporary: int | None
    peak: int
    available: int

    @property
    def fits(self) -> bool:
        """Whether the chip has as much as a step needs."""
        return self.peak <= self.available


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a step of an experiment needs of each chip of a slice that it was compiled for. Nothing was run.

    Attributes:
      topology: the slice.
      mesh: the axes of the mesh and their sizes.
      batch_size: images per step, over all chips.
      steps: of the recipe; None where it has epochs instead, which only the dataset could tell.
      memory: per chip.
      flops: per chip and step, two for a multiply-add; None, as the next two, where it does not fit.
      bytes: read and written per chip and step as the compiler counts them: those in memory on the chip as well.
      bound: of the time of a step, by what the compiler knows.
      notes: sentences: what to change if it does not fit, what is not counted.
      versions: of what compiled it.
    """

    topology: str
    mesh: Mapping[str, int]
    batch_size: int
    steps: int | None
    memory: Memory
    flops: float | None
    bytes: float | None
    bound: Bound | None
    notes: tuple[str, ...]
    versions: Mapping[str, str]

    @property
    def chip(self) -> Chip:
        """Public figures of the chip."""
        return CHIPS[self.topology.partition(":")[0]]

    @property
    def chips(self) -> int:
        """How many there are."""
        product = 1
        for size in self.mesh.values():
            product *= size
        return product

    @property
    def fits(self) -> bool:
        """Whether it can run at all."""
        return self.bound is not None and self.memory.fits

    @property
    def roofline(self) -> Mapping[str, float]:
        """Seconds of a step for its FLOPs at the peak, its bytes at the bandwidth, and what it sends over all links."""
        if self.bound is None or self.flops is None or self.bytes is None:
            return {}
        return {
            "flops": self.flops / self.chip.flops,
            "bytes": self.bytes / self.chip.bandwidth,
            "collectives": sum((row.sent for row in self.bound.traffic), 0.0) / self.chip.ici,
        }

    @property
    def step_seconds(self) -> float | None:
        """The least time of a step: the bound, or the roofline of FLOPs or links if that is more.

        That of bytes does not count: it holds bytes that stay on the chip.
        """
        if self.bound is None:
            return None
        return max(self.bound.seconds, self.roofline["flops"], self.roofline["collectives"])

    @property
    def images_per_second(self) -> float | None:
        """At most, over all chips."""
        return self.batch_size / self.step_seconds if self.step_seconds else None

    @property
    def days(self) -> float | None:
        """Of the recipe, at least."""
        return self.steps * self.step_seconds / SECONDS_PER_DAY if self.steps and self.step_seconds else None

    @property
    def chip_hours(self) -> float | None:
        """Of the recipe, at least."""
        return None if self.days is None else 24 * self.days * self.chips

    def to_json(self) -> dict[str, Any]:
        """As plain data, the same for the same program: nothing in it depends on when or how fast it was compiled."""
        bound = self.bound
        return {
            "topology": self.topology,
            "chips": self.chips,
            "mesh": dict(self.mesh),
            "versions": dict(self.versions),
            "batch_size": self.batch_size,
            "fits": self.fits,
            "memory_bytes_per_chip": dataclasses.asdict(self.memory),
            "flops_per_chip": self.flops,
            "bytes_per_chip": self.bytes,
            "collectives_per_chip": None if bound is None else [_row(dataclasses.asdict(t)) for t in bound.traffic],
            "step_bound_seconds": None
            if bound is None
            else {
                "compiler": bound.compiler,
                "kernels": bound.kernels,
                "others": bound.others,
                "collectives": bound.collectives,
                "total": self.step_seconds,
            },
            "roofline_seconds": dict(self.roofline) or None,
            "uncounted": None if bound is None else dict(bound.uncounted),
            "images_per_second": self.images_per_second,
            "steps": self.steps,
            "days": self.days,
            "chip_hours": self.chip_hours,
            "notes": list(self.notes),
        }


def _row(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"axes": list(row["axes"])}


def mesh_text(mesh: Mapping[str, int]) -> str:
    """As `--mesh` takes it, such as "data=8,expert=32"."""
    return ",".join(f"{name}={size}" for name, size in mesh.items() if size > 1 or name == "data")
