"""What a source of images is: a small frozen configuration that opens a split for random access."""

import dataclasses
import os
import pathlib
from typing import Protocol, TypedDict, runtime_checkable

import numpy as np
from jaxtyping import Int, UInt8

from jmoe.errors import UserError


class Record(TypedDict):
    """One labelled image: uint8 [H, W, C], and the index of its class."""

    image: np.ndarray
    label: int


@runtime_checkable
class RandomAccess(Protocol):
    """The records of one split, in a fixed order.

    It is pickled and sent to worker processes, so it opens its files lazily.

    Attributes:
      name: what messages call it, such as "digits (train)".
      fingerprint: identifies content and order; it differs when records were added, removed or reordered.
      max_bad_fraction: the share of records that may raise `BadRecordError` before a run stops; 0 stops at the first.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def max_bad_fraction(self) -> float: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Reads and decodes one record; raises `BadRecordError` when its bytes are damaged."""
        ...

    def describe(self, index: int) -> str:
        """Where the record comes from, for messages: a path, or a number and a name."""
        ...


class Source(Protocol):
    """A dataset as an experiment names it. Any frozen dataclass with these members can be a `DataConfig.source`.

    Attributes:
      train: the split, or slice of a split, to train on, such as "train[:99%]".
      test: the one to evaluate on.
    """

    @property
    def train(self) -> str: ...

    @property
    def test(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def num_classes(self) -> int: ...

    def open(self, split: str) -> RandomAccess: ...


class BadRecordError(UserError):
    """A record whose bytes cannot be read or decoded; the sentence names the record and says why."""


@dataclasses.dataclass(frozen=True, eq=False)
class InMemory:
    """Records held as two arrays, for datasets that fit in memory many times over."""

    name: str
    fingerprint: str
    images: UInt8[np.ndarray, "N H W C"]
    labels: Int[np.ndarray, " N"]
    max_bad_fraction: float = 0.0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        return Record(image=self.images[index], label=int(self.labels[index]))

    def describe(self, index: int) -> str:
        return f"record {index} of {self.name}"


def data_directory(data_dir: str | None) -> pathlib.Path | None:
    """The folder of prepared datasets that was asked for: the argument, else $JMOE_DATA_DIR, else None."""
    chosen = data_dir or os.environ.get("JMOE_DATA_DIR")
    return pathlib.Path(chosen).expanduser() if chosen else None
