"""The handwritten digits that ship with scikit-learn, as a TFDS dataset that prepares itself without a network."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import logging
import os
import pathlib
import shutil
import tempfile

import numpy as np

from jmoe.data.sources import InMemory, data_directory
from jmoe.data.tfds_source import first_line, open_prepared
from jmoe.errors import UserError

logger = logging.getLogger(__name__)

VERSION = "1.0.0"


@dataclasses.dataclass(frozen=True)
class Digits:
    """1,797 handwritten digits of 8 x 8 pixels and one channel, in 10 classes; 360 of them, 36 per class, to test on.

    They are scikit-learn's copy of a part of "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak, 1998).
    The first use writes them as ArrayRecord, which takes seconds.

    Attributes:
      train: the split to train on; slices such as "train[:90%]" work.
      test: the split to evaluate on.
      data_dir: the folder of prepared datasets; by default $JMOE_DATA_DIR, else $TFDS_DATA_DIR, else
        ~/.cache/jmoe/datasets.
    """

    train: str = "train"
    test: str = "test"
    data_dir: str | None = None

    @property
    def name(self) -> str:
        return "digits"

    @property
    def num_classes(self) -> int:
        return 10

    def open(self, split: str) -> InMemory:
        """Reads a split into memory, from the prepared dataset.

        Raises:
          UserError: no such split, a damaged file, or a folder that cannot be written.
        """
        default = os.environ.get("TFDS_DATA_DIR") or "~/.cache/jmoe/datasets"
        data_dir = data_directory(self.data_dir) or pathlib.Path(default).expanduser()
        return _load(os.fspath(data_dir.absolute()), split)


def prepare(data_dir: str) -> str:
    """Writes the dataset under data_dir unless it is there, and returns its own folder.

    It is written to a temporary folder first and moved into place at the end, so that an interrupted preparation leaves
    nothing that looks complete, and of two processes at once one wins and the other takes what the first made.
    """
    final = pathlib.Path(data_dir, "digits", VERSION)
    complete = final / "dataset_info.json"
    if complete.exists():
        return os.fspath(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.mkdtemp(prefix=".preparing-digits-", dir=data_dir)
        try:
            _write(scratch)
            with contextlib.suppress(OSError):  # another process was faster; looked at below
                os.rename(pathlib.Path(scratch, "digits", VERSION), final)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except (OSError, RuntimeError) as error:  # RuntimeError is what ArrayRecord raises on a full disk
        raise UserError(
            f"Cannot write the digits dataset to {data_dir} ({first_line(error)}): name a folder that can be "
            "written by data_dir or $JMOE_DATA_DIR."
        ) from error
    if not complete.exists():
        raise UserError(f"{final} is not a complete dataset, and in the way of writing one: move or delete it.")
    logger.info("Prepared the digits dataset in %s", final)
    return os.fspath(final)


def _write(data_dir: str) -> None:
    from jmoe.data.digits_builder import Digits as Builder

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        Builder(data_dir=data_dir, file_format="array_record").download_and_prepare()


@functools.lru_cache(maxsize=8)
def _load(data_dir: str, split: str) -> InMemory:
    directory = prepare(data_dir)
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(directory)
    except Exception as error:  # damaged metadata comes as any of JSON's, protobuf's and TFDS's own errors
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"Cannot open {directory} ({reason}): if damaged, delete it, and a run prepares it.") from error
    records = open_prepared(builder, split, "digits")
    examples = [records[index] for index in range(len(records))]
    images = np.stack([example["image"] for example in examples])
    labels = np.array([example["label"] for example in examples], np.int32)
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16]
    return InMemory(records.name, f"digits:{VERSION} {split} {len(labels)} {digest}", images, labels)
