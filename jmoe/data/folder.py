"""A folder of images with one sub-folder per class."""

import dataclasses
import functools
import hashlib
import logging
import os
import pathlib
import re

from jmoe.data.decode import DecodeError, decode_image
from jmoe.data.sources import BadRecordError, Record
from jmoe.errors import UserError

logger = logging.getLogger(__name__)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp")


@dataclasses.dataclass(frozen=True)
class ImageFolder:
    """Images in path/<split>/<class>/*.jpg (or png, bmp, gif, webp), read as RGB; classes are numbered by sorted name.

    A file that cannot be decoded is named in a warning and the run goes on: training takes the next file in its place,
    and evaluation leaves it out.

    Attributes:
      path: the folder that holds the splits.
      train: the split to train on, or a slice of one, such as "train[:90%]" or "train[1000:]". Slices are of a fixed
        order that mixes the classes, and keep to it when files are added.
      test: the split to evaluate on, or a slice of one.
      max_bad_fraction: the share of a split's files that may be damaged; a run stops when it finds more.
    """

    path: str
    train: str = "train"
    test: str = "test"
    max_bad_fraction: float = 0.01

    @property
    def name(self) -> str:
        return pathlib.Path(self._root()).name

    @property
    def num_classes(self) -> int:
        return len(self._classes(self.train))

    def open(self, split: str) -> "FolderRecords":
        """Lists the files of a split; their contents are looked at when they are read.

        Raises:
          UserError: a folder is missing, holds no class, a class no image, or the classes of the splits differ.
        """
        for other in (self.test, split):
            self._check_same_classes(self.train, other)
        base, start, stop = parse_split(split)
        files = _list_files(self._root(), base)
        if start is not None or stop is not None:
            mixed = sorted(range(len(files)), key=lambda i: hashlib.blake2b(files[i][0].encode()).digest())
            bounds = slice(_boundary(start, len(files)), _boundary(stop, len(files)))
            files = [files[i] for i in sorted(mixed[bounds])]
            if not files:
                raise UserError(f"The slice {split!r} of {self.path} holds no images.")
        return FolderRecords(
            folder=os.path.join(self._root(), base),
            files=files,
            name=f"{self.name} ({split})",
            fingerprint=f"folder {split} {len(files)} {_digest(files)}",
            max_bad_fraction=self.max_bad_fraction,
        )

    def _root(self) -> str:
        return os.path.abspath(os.path.expanduser(self.path))

    def _classes(self, split: str) -> tuple[str, ...]:
        return _list_classes(self._root(), parse_split(split)[0])

    def _check_same_classes(self, first: str, second: str) -> None:
        for name in sorted({*self._classes(first)} ^ {*self._classes(second)}):
            present, absent = (first, second) if name in self._classes(first) else (second, first)
            raise UserError(
                f"The splits of {self.path} must have the same classes, but {name!r} is in {present!r} and not in "
                f"{absent!r}: add or remove that folder."
            )


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class FolderRecords:
    """The files of one split. See `RandomAccess`.

    Attributes:
      folder: the folder of the split.
      files: of each record, its path below that folder and its label.
    """

    folder: str
    files: list[tuple[str, int]]
    name: str
    fingerprint: str
    max_bad_fraction: float

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Record:
        path, label = self.files[index]
        try:
            data = pathlib.Path(self.folder, path).read_bytes()
            return Record(image=decode_image(data), label=label)
        except (DecodeError, OSError) as error:
            raise BadRecordError(f"{self.describe(index)} cannot be read as an image: {error}.") from error

    def describe(self, index: int) -> str:
        return os.path.join(self.folder, self.files[index][0])


def parse_split(split: str) -> tuple[str, str | None, str | None]:
    """Takes "train[10%:90%]" apart into name, start and stop; without a slice both are None.

    Raises:
      UserError: it is not of that form.
    """
    matched = re.fullmatch(r"([^\[\]+]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if not matched:
        raise UserError(f"{split!r} is not a split of a folder: write a name, or a slice such as 'train[:90%]'.")
    return matched[1], matched[2], matched[3]


def _digest(files: list[tuple[str, int]]) -> str:
    """Of the files' paths, which hold the classes; not of their contents, which would mean reading them all."""
    return hashlib.sha256("\0".join(path for path, _ in files).encode()).hexdigest()[:16]


def _boundary(bound: str | None, count: int) -> int | None:
    """An end of a slice as a number of files; a percentage is rounded to the nearest, as TFDS does."""
    if bound is None or not bound.endswith("%"):
        return None if bound is None else int(bound)
    return round(count * int(bound[:-1]) / 100)


@functools.lru_cache(maxsize=8)
def _list_classes(root: str, split: str) -> tuple[str, ...]:
    folder = pathlib.Path(root, split)
    if not folder.is_dir():
        if not folder.parent.is_dir():
            raise UserError(f"There is no folder {root} to read images from.")
        found = ", ".join(sorted(entry.name for entry in os.scandir(root) if entry.is_dir())) or "none"
        raise UserError(f"{root} has no sub-folder {split!r} for that split; its sub-folders are: {found}.")
    classes = tuple(sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")))
    if not classes:
        raise UserError(f"{folder} has no classes: put the images of each class into a sub-folder of its own.")
    return classes


@functools.lru_cache(maxsize=4)
def _list_files(root: str, split: str) -> list[tuple[str, int]]:
    """(path below the split's folder, label) of every image file, by class and then by name."""
    files, others = [], []
    for label, name in enumerate(_list_classes(root, split)):
        folder = pathlib.Path(root, split, name)
        names = sorted(e.name for e in os.scandir(folder) if e.is_file() and not e.name.startswith("."))
        images = [file for file in names if file.lower().endswith(EXTENSIONS)]
        if not images:
            raise UserError(f"{folder} holds no image ({', '.join(EXTENSIONS)}): add some, or remove the class.")
        files += [(f"{name}/{file}", label) for file in images]
        others += [os.fspath(folder / file) for file in names if not file.lower().endswith(EXTENSIONS)]
    if others:
        text = "%d file(s) of %s are not images by their names and left out; the first is %s"
        logger.warning(text, len(others), os.path.join(root, split), others[0])
    return files
