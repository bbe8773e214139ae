"""The sizes at which ops and layers are timed, and the rows that a router would have them move there."""

import dataclasses
import functools
import math

import numpy as np

IMAGES_PER_GROUP = 8  # routed together, as published
MULTIPLE = 4  # to which the slots of an expert are rounded up, as published


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A sparse layer and the batch that it is given.

    Attributes:
      name: of the network it is taken from.
      width: D.
      hidden_dim: F.
      tokens: T, per image.
      images: B, routed in groups of 8; fewer are one group.
      num_experts: E.
      k: K, experts that each token chooses.
      capacity_factor: slots over choices; k * capacity_factor = 1 gives as many slots as tokens.
    """

    name: str
    width: int
    hidden_dim: int
    tokens: int
    images: int = 8
    num_experts: int = 8
    k: int = 2
    capacity_factor: float = 1.05

    def __post_init__(self):
        for name in ("width", "hidden_dim", "tokens", "images", "num_experts", "k"):
            if getattr(self, name) < 1:
                raise ValueError(f"A case wants {name} of at least 1; it got {getattr(self, name)}.")
        if self.k > self.num_experts:
            raise ValueError(f"A token cannot choose k={self.k} of num_experts={self.num_experts} experts.")
        if not (self.capacity_factor > 0 and math.isfinite(self.capacity_factor)):
            raise ValueError(f"A case wants a capacity_factor above 0; it got {self.capacity_factor}.")
        if self.images > IMAGES_PER_GROUP and self.images % IMAGES_PER_GROUP:
            raise ValueError(
                f"Images are routed in groups of {IMAGES_PER_GROUP}, which do not divide {self.images} images; use "
                f"fewer than {IMAGES_PER_GROUP}, or a multiple."
            )

    @property
    def groups(self) -> int:
        """G."""
        return max(1, self.images // IMAGES_PER_GROUP)

    @property
    def group_size(self) -> int:
        """S, tokens per group."""
        return self.images * self.tokens // self.groups

    @property
    def capacity(self) -> int:
        """C, the slots of each expert for one group."""
        share = self.group_size * self.k * self.capacity_factor / self.num_experts
        return math.ceil(math.ceil(share) / MULTIPLE) * MULTIPLE

    @functools.cached_property
    def rows(self) -> "Rows":
        """Which row goes where, if every token chooses K distinct experts at random, all as likely.

        All first choices take slots before all second ones, in the order of tokens; who finds none left is dropped.
        """
        G, S, E, K, C = self.groups, self.group_size, self.num_experts, self.k, self.capacity
        rng = np.random.default_rng(0)
        expert = rng.permuted(np.broadcast_to(np.arange(E), (G, S, E)), axis=-1)[..., :K]
        taken = (expert.swapaxes(1, 2)[..., None] == np.arange(E)).reshape(G, K * S, E)  # first choices first
        place = (np.cumsum(taken, axis=1) * taken).sum(-1).reshape(G, K, S).swapaxes(1, 2) - 1  # [G, S, K]
        kept = place < C
        slots = np.where(kept, (expert * G + np.arange(G)[:, None, None]) * C + place, E * G * C).reshape(G * S, K)
        choice = np.full(E * G * C + 1, G * S * K)
        choice[slots.reshape(-1)] = np.arange(G * S * K)
        return Rows(
            slots=slots.astype(np.int32),
            choice=choice[:-1].astype(np.int32),
            group_sizes=np.bincount(expert[kept], minlength=E).astype(np.int32),
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """One decision of a router, as the ops take it.

    Attributes:
      slots: [n, k], the slot of each choice of each token, m where it was dropped.
      choice: [m], its inverse; n * k for an empty slot.
      group_sizes: [e], filled slots of each expert.
    """

    slots: np.ndarray
    choice: np.ndarray
    group_sizes: np.ndarray

    @property
    def filled(self) -> int:
        """How many slots hold a token."""
        return int(self.group_sizes.sum())

    @property
    def served(self) -> int:
        """How many tokens have a slot."""
        return int((self.slots < len(self.choice)).any(axis=1).sum())


CASES = {
    case.name: case
    for case in (
        Case(name="S/32", width=512, hidden_dim=2048, tokens=50),
        Case(name="B/16", width=768, hidden_dim=3072, tokens=197),
        Case(name="B/16-384", width=768, hidden_dim=3072, tokens=577),
        Case(name="H/14", width=1280, hidden_dim=5120, tokens=257),
    )
}
