"""Datasets of TensorFlow Datasets, prepared as ArrayRecord and read by random access, without TensorFlow."""

import bisect
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
import pathlib
import sys
from typing import Any

from jmoe.data.decode import DecodeError, decode_image
from jmoe.data.sources import BadRecordError, Record, data_directory
from jmoe.errors import UserError


@dataclasses.dataclass(frozen=True)
class TFDS:
    """A dataset of TensorFlow Datasets by name, with the features "image" and "label".

    It is read where it lies prepared in the array_record format. If it is not there, TFDS downloads and prepares it,
    which works without TensorFlow for some datasets only.

    Attributes:
      name: as in `tfds.load`, with version or configuration if need be: "cifar10", "imagenet2012:5.1.0".
      train: the split to train on; slices such as "train[:99%]" are TFDS's own.
      test: the split to evaluate on.
      data_dir: the folder of prepared datasets; by default $JMOE_DATA_DIR, else what TFDS itself takes: $TFDS_DATA_DIR
        or ~/tensorflow_datasets.
    """

    name: str
    train: str = "train"
    test: str = "test"
    data_dir: str | None = None

    @property
    def num_classes(self) -> int:
        return _label_feature(self._builder(), self.name).num_classes

    def open(self, split: str) -> "ArrayRecords":
        """Opens a split.

        Raises:
          UserError: the dataset is not there and cannot be prepared, is not in array_record, or a file is damaged.
        """
        return open_prepared(self._builder(), split, self.name)

    def _builder(self) -> Any:
        data_dir = data_directory(self.data_dir)
        return _find_or_prepare(self.name, None if data_dir is None else os.fspath(data_dir))


class ArrayRecords:
    """The records of one split of a prepared dataset. See `RandomAccess`."""

    max_bad_fraction = 0.0  # ArrayRecord checks every record it reads: damage is damage of the disk or of the copy

    def __init__(self, directory: str, split: str, dataset: str):
        import tensorflow_datasets as tfds

        builder: Any = tfds.builder_from_directory(directory)
        # The image is taken as the encoded bytes of the file; TFDS itself would need TensorFlow to decode some.
        skip_decoding: Any = tfds.decode.SkipDecoding
        self._records = builder.as_data_source(split, decoders={"image": skip_decoding()})
        self._arguments = (directory, split, dataset)
        self._channels = builder.info.features["image"].shape[-1] or 3
        self._shards = builder.info.splits[split].file_instructions
        self._shard_ends = list(itertools.accumulate(shard.take for shard in self._shards))
        self.name = f"{dataset} ({split})"
        contents = [(pathlib.Path(shard.filename).name, shard.skip, shard.take) for shard in self._shards]
        digest = hashlib.sha256(repr(contents).encode()).hexdigest()[:16]
        self.fingerprint = f"{builder.info.full_name} {split} {len(self._records)} {digest}"

    def __reduce__(self):
        return ArrayRecords, self._arguments  # a worker process opens the files itself

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        try:
            record = self._records[index]
            return Record(image=decode_image(record["image"], self._channels), label=int(record["label"]))
        except (RuntimeError, DecodeError) as error:  # RuntimeError is what ArrayRecord raises on a wrong checksum
            raise BadRecordError(
                f"{self.describe(index)} is damaged ({first_line(error)}): restore the file, or delete "
                f"{self._arguments[0]} and prepare the dataset again."
            ) from error

    def describe(self, index: int) -> str:
        shard = bisect.bisect_right(self._shard_ends, index)
        first = self._shard_ends[shard] - self._shards[shard].take
        position = index - first + self._shards[shard].skip
        return f"record {index} of {self.name}, number {position} in {self._shards[shard].filename},"


def open_prepared(builder: Any, split: str, dataset: str) -> ArrayRecords:
    """Opens a split of a builder whose dataset is prepared, after a look at each of its files.

    Raises:
      UserError: no such split, not in array_record, features that are not an image and a label, a damaged file.
    """
    from array_record.python.array_record_module import ArrayRecordReader

    info = builder.info
    try:
        shards = info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        known = ", ".join(info.splits) or "none"
        raise UserError(
            f"{dataset} has no split {split!r}: it has {known}, and slices such as 'train[:90%]'."
        ) from error
    _label_feature(builder, dataset)
    if "image" not in info.features:
        raise UserError(f"{dataset} has no feature 'image' to train on; it has {', '.join(info.features)}.")
    try:
        records = ArrayRecords(os.fspath(builder.data_path), split, dataset)
    except NotImplementedError as error:
        raise UserError(
            f"{dataset} in {builder.data_path} is prepared as {info.file_format.value}, and only array_record can be "
            "read by random access: prepare it with `tfds build --file_format=array_record`."
        ) from error
    if not len(records):
        raise UserError(f"{dataset} has no records in split {split!r}.")
    for shard in shards:
        try:
            reader = ArrayRecordReader(shard.filename)
            found = reader.num_records()
            reader.close()
        except (RuntimeError, OSError) as error:
            found = first_line(error)
        if found != shard.examples_in_shard:
            raise UserError(
                f"{shard.filename} of {dataset} is missing or damaged ({shard.examples_in_shard} records expected, "
                f"found: {found}): restore the file, or delete {builder.data_path} and prepare the dataset again."
            )
    return records


@functools.lru_cache(maxsize=8)
def _find_or_prepare(name: str, data_dir: str | None) -> Any:
    """The builder of a prepared dataset, which is prepared if it was not."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    try:
        return builder_from_files(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError:
        pass  # not prepared yet
    except Exception as error:  # damaged metadata comes as any of JSON's, protobuf's and TFDS's own errors
        raise _cannot_prepare(name, data_dir, error) from error
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what it reports is not the output of our command
            builder: Any = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        raise UserError(
            f"The dataset {name!r} is not prepared in {_folder(data_dir)}, and TFDS has no builder of that name to "
            "prepare it. Write a builder with the features 'image' and 'label' and prepare it there in the array_record"
            " format, name the folder that has it by data_dir or $JMOE_DATA_DIR, or train on a folder of images with "
            "ImageFolder."
        ) from error
    try:
        with contextlib.redirect_stdout(sys.stderr):
            builder.download_and_prepare()
    except Exception as error:  # TFDS passes on whatever the network, the disk or the builder's own code raised
        raise _cannot_prepare(name, data_dir, error) from error
    return builder


def _cannot_prepare(name: str, data_dir: str | None, error: Exception) -> UserError:
    folder = _folder(data_dir)
    if isinstance(error, AssertionError) and str(error).startswith("Manual directory"):
        reason = f"must be downloaded by hand first, into {os.path.join(folder, 'downloads', 'manual')}"
    else:
        reason = f"could not be prepared here ({type(error).__name__}: {first_line(error)})"
    return UserError(
        f"The dataset {name!r} is not prepared in {folder} and {reason}. Prepare it where TensorFlow and the network "
        f"are, with `tfds build {name} --file_format=array_record --data_dir={folder}`, or name the folder that has it "
        "by data_dir or $JMOE_DATA_DIR."
    )


def _folder(data_dir: str | None) -> str:
    from tensorflow_datasets.core.constants import DATA_DIR

    return data_dir or DATA_DIR


def _label_feature(builder: Any, dataset: str) -> Any:
    features = builder.info.features
    label = features["label"] if "label" in features else None  # noqa: SIM401  (not a dict: it has no get)
    if not getattr(label, "num_classes", None):
        raise UserError(
            f"{dataset} has no feature 'label' with a known number of classes to train on; it has "
            f"{', '.join(features)}."
        )
    return label


def first_line(error: Exception) -> str:
    """What an error says, cut to one line that fits into a sentence."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200].rstrip(".") if lines else type(error).__name__
