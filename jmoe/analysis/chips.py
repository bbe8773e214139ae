"""Public figures of TPU chips."""

import dataclasses

GIB = 2.0**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Public figures of one TPU chip.

    Attributes:
      clock: cycles per second.
      flops: of bfloat16, per second.
      bandwidth: bytes per second between the chip and its memory.
      memory: usable bytes.
      ici: bytes per second that all its links to other chips send together; as many come in at the same time. 0 for a
        chip whose links are not known.
      directions: of the grid that the links span: 2 or 3, with two links of a chip in each.
    """

    clock: float
    flops: float
    bandwidth: float
    memory: float
    ici: float = 0.0
    directions: int = 2

    @property
    def link(self) -> float:
        """Bytes per second that one link sends."""
        return self.ici / (2 * self.directions)

    def wraps(self, sizes: tuple[int, ...]) -> tuple[bool, ...]:
        """Whether the last chip in each direction of a slice has a link to the first.

        With three directions it has in slices made of cubes of 4x4x4, with two in directions of 16 chips.
        """
        if self.directions == 3:
            return (all(size % 4 == 0 for size in sizes),) * len(sizes)
        return tuple(size == 16 for size in sizes)


CHIPS = {
    "v4": Chip(clock=1.05e9, flops=275e12, bandwidth=1228e9, memory=32 * GIB, ici=300e9, directions=3),
    "v5e": Chip(clock=1.5e9, flops=197e12, bandwidth=819e9, memory=15.75 * GIB, ici=200e9, directions=2),
    "v5p": Chip(clock=1.75e9, flops=459e12, bandwidth=2765e9, memory=95 * GIB, ici=600e9, directions=3),
    "v6e": Chip(clock=1.75e9, flops=918e12, bandwidth=1640e9, memory=31.25 * GIB, ici=400e9, directions=2),
}
