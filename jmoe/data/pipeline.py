# ruff: noqa: PT028  (test_batches is no test)
"""Batches of images for training and evaluation.

Batch k of a training run is a pure function of the data, the seed and k: which records, in which order, and how each is
augmented. Nothing depends on the number of processes, of worker processes, or on where a run was interrupted, so the
data position to save is the step alone, and resuming is `start_step`. Processes that share a batch take `rows` of it.

Batches are dicts of numpy arrays: "image" uint8 [B, H, W, C] (or float32 on the same scale, where the preprocessing of
evaluation returns that), "label" int32 [B], and "mask" bool [B], which is False where evaluation has padded. Scaling,
one-hot labels and mixup are left to the device.
"""

import contextlib
import dataclasses
import functools
import logging
import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import threading
import typing
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jmoe.data.augment import Augmentation, height_and_width
from jmoe.data.decode import resize_image
from jmoe.data.preprocess import Decode, OneHot, Preprocess, Resize, ValueRange
from jmoe.data.sources import BadRecordError, RandomAccess, Source
from jmoe.errors import UserError

logger = logging.getLogger(__name__)

ENDLESS = 2**48  # batches; a training run ends before
SHUFFLE_STREAM, AUGMENT_STREAM = 0, 1  # second word of the key of every generator


@typing.no_type_check  # Checking a source against the protocol would call its properties, which may read the disk.
@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where images come from, and how they become batches.

    Attributes:
      source: the dataset, such as `Digits()`, `TFDS("cifar10")` or `ImageFolder("path")`.
      batch_size: images per step, over all processes.
      image_size: height and width of every image in pixels, an int for a square; others are resized bilinearly, in
        training after the augmentations. None takes the images as they are, which must then be of one size.
      augment: augmentations of training images, applied in order.
      test_preprocess: operations on images of evaluation, in order, instead of the resize to image_size (which there is
        `Resize`, exactly as published), such as (ResizeSmall(256), CentralCrop(224)). Pixels keep the scale of 0 to
        255; they become float32 where an operation returns that.
      num_workers: processes that read and decode, per process of the run; 0 for a background thread, which is enough
        for small images.
    """

    source: Source
    batch_size: int
    image_size: int | tuple[int, int] | None = None
    augment: tuple[Augmentation, ...] = ()
    test_preprocess: tuple[Preprocess, ...] = ()
    num_workers: int = 0

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"DataConfig wants a batch_size of at least 1; it got {self.batch_size}.")
        if self.num_workers < 0:
            raise ValueError(f"DataConfig wants num_workers of at least 0; it got {self.num_workers}.")
        for operation in self.test_preprocess:
            if isinstance(operation, Decode | OneHot | ValueRange):
                raise ValueError(
                    f"test_preprocess cannot hold {operation}: it takes images on the scale of 0 to 255 and returns "
                    "such, as Resize, ResizeSmall and CentralCrop do; they are scaled on the device."
                )


class Batches(Iterator[dict[str, np.ndarray]]):
    """Iterates over batches that are made ahead, in a background thread or in worker processes.

    Attributes:
      bad: a sentence for every record that was found damaged so far, and replaced or left out.
    """

    def __init__(self, maker: "_BatchMaker", start: int, num_workers: int):
        import grain
        from absl import flags

        self.bad: list[str] = []
        self._records = maker.records
        self._copy = True if num_workers else None
        dataset = grain.MapDataset.source(maker)[start:]
        dataset = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
        if num_workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # grain reads a flag of its own, and fails in programs without absl's main
            multiprocessing.resource_tracker.ensure_running()  # here, as it lets SIGTERM through to who starts it
            options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
            dataset = dataset.mp_prefetch(options, worker_init_fn=_start_worker)
        self._open: list[Any] = [iter(dataset)]  # empty once closed
        weakref.finalize(self, _close, self._open)  # at the latest when the program ends

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._open:
            raise StopIteration
        try:
            with _sigterm_held() if self._copy else contextlib.nullcontext():
                batch = next(self._open[0])
        except BaseException as error:  # StopIteration, or an error after which there is nothing more to read
            self.close()
            if isinstance(error, RuntimeError) and "process was terminated" in str(error):
                raise UserError(
                    "A process that reads data was killed, perhaps for lack of memory: try a smaller num_workers."
                ) from error
            raise
        for sentence in batch.pop("bad"):
            if sentence not in self.bad:
                self.bad.append(sentence)
                logger.warning("%s Bad files so far: %d", sentence, len(self.bad))
        _check_bad(self._records, self.bad)
        # From a worker, arrays lie in shared memory, which is scarce in containers and should be given back at once.
        return {key: np.array(value, subok=False, copy=self._copy) for key, value in batch.items()}

    def close(self) -> None:
        """Ends the background thread or the worker processes; there are no more batches then."""
        _close(self._open)


def train_records(config: DataConfig) -> RandomAccess:
    """The training images; raises UserError if there are fewer than in a batch."""
    records = config.source.open(config.source.train)
    if len(records) < config.batch_size:
        raise UserError(
            f"A batch of {config.batch_size} images is more than the {len(records)} of {records.name}: choose a "
            f"batch_size of at most {len(records)}."
        )
    return records


def train_batches(config: DataConfig, *, seed: int, start_step: int = 0, rows: Sequence[int] | None = None) -> Batches:
    """Endless batches of shuffled and augmented training images, from step `start_step` on.

    Every stretch of as many images as the split has, counted from step 0, holds each of them once: epochs follow each
    other without a gap, also within a batch.

    Args:
      config: the data.
      seed: of order and augmentation; any integer, taken modulo 2**64.
      start_step: the step whose batch comes first.
      rows: which images of each batch are wanted, by number: those of one process, where several share a batch. All
        of them if None.

    Raises:
      UserError: there are fewer images than in a batch. While iterating: a wrong label, images of different sizes
        without image_size, too many damaged files.
    """
    if start_step < 0:
        raise ValueError(f"train_batches counts steps from 0, not {start_step=}.")
    records = train_records(config)
    size = None if config.image_size is None else height_and_width(config.image_size)
    maker = _BatchMaker(
        records=records,
        num_classes=config.source.num_classes,
        batch_size=config.batch_size,
        rows=_rows(rows, config.batch_size),
        seed=seed % 2**64,
        augment=config.augment,
        preprocess=() if size is None else (functools.partial(resize_image, size=size),),
    )
    return Batches(maker, start_step, config.num_workers)


def test_batches(
    config: DataConfig,
    *,
    split: str | None = None,
    batch_size: int | None = None,
    rows: Sequence[int] | None = None,
) -> Batches:
    """Every image of a split once, in order; where the last batch is not full, mask is False and the rest zero.

    Args:
      config: the data; its augmentations are not applied.
      split: the split, or slice of one; the source's `test` by default.
      batch_size: images per batch; that of training by default.
      rows: which images of each batch are wanted, by number, as for `train_batches`. Those from batch_size on are
        padding, so that batches can be divided among devices.

    Raises:
      UserError: as `train_batches`.
    """
    batch_size = batch_size or config.batch_size
    maker = _BatchMaker(
        records=config.source.open(split or config.source.test),
        num_classes=config.source.num_classes,
        batch_size=batch_size,
        rows=_rows(rows, batch_size),
        seed=None,
        augment=(),
        preprocess=config.test_preprocess or (() if config.image_size is None else (Resize(config.image_size),)),
    )
    return Batches(maker, 0, config.num_workers)


def num_train_images(config: DataConfig) -> int:
    """Number of images in the training split."""
    return len(config.source.open(config.source.train))


def num_test_images(config: DataConfig) -> int:
    """Number of images in the test split."""
    return len(config.source.open(config.source.test))


def steps_per_epoch(config: DataConfig) -> int:
    """Whole batches in one pass over the training split."""
    return num_train_images(config) // config.batch_size


def fingerprint(config: DataConfig) -> str:
    """Identifies the training images and their order, to tell whether a run is resumed with the data it began with."""
    return config.source.open(config.source.train).fingerprint


def epoch_order(seed: int, epoch: int, num_records: int) -> np.ndarray:
    """The order of an epoch: a permutation of range(num_records), the same wherever it is computed."""
    rng = np.random.Generator(np.random.Philox())
    _set_stream(rng, seed, SHUFFLE_STREAM, epoch)
    return rng.permutation(num_records)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _BatchMaker:
    """Some images of every batch, by its number: a grain data source whose elements are whole batches.

    Whole batches, and an order of our own, because grain's price per element (30 microseconds, half of it for its
    shuffle, which walks through a cycle of 65,536 whatever the size) would be most of the cost of images as small as
    the digits.
    """

    records: RandomAccess
    num_classes: int
    batch_size: int
    rows: tuple[int, ...]  # of each batch
    seed: int | None  # None to go through the records once and in order, without augmentation
    augment: tuple[Augmentation, ...]
    preprocess: tuple[Preprocess, ...]  # in order, after the augmentations

    def __len__(self) -> int:
        return -(-len(self.records) // self.batch_size) if self.seed is None else ENDLESS

    def __getitem__(self, index: int) -> dict[str, Any]:
        first = index * self.batch_size
        rng = np.random.Generator(np.random.Philox())
        bad: list[str] = []
        images, labels, mask = [], np.zeros(len(self.rows), np.int32), np.zeros(len(self.rows), bool)
        where = []  # the record of each image, for the message about their sizes
        for row, place in enumerate(self.rows):
            position = first + place
            if self.seed is None:
                made = self._test_image(position, bad) if place < self.batch_size else None
            else:
                made = self._train_image(position, self.seed, rng, bad)
            if made is not None:
                image, labels[row], record = made
                mask[row] = True
                images.append(image)
                where.append(record)
        self._check_sizes(images, where)
        if mask.all():
            batch = np.stack(images)
        else:
            example = images[0] if images else self._any_image(bad)
            batch = np.zeros((len(self.rows), *example.shape), example.dtype)
            batch[mask] = images or 0
        return {"image": batch, "label": labels, "mask": mask, "bad": bad}

    def _train_image(
        self, position: int, seed: int, rng: np.random.Generator, bad: list[str]
    ) -> tuple[np.ndarray, int, int]:
        """The image at a position of the endless sequence of shuffled epochs."""
        epoch, place = divmod(position, len(self.records))
        image, label, index = self._read(int(_cached_order(seed, epoch, len(self.records))[place]), bad)
        if self.augment:
            _set_stream(rng, seed, AUGMENT_STREAM, position)
            for augment in self.augment:
                image = augment(image, rng)
        return self._prepare(image), label, index

    def _test_image(self, position: int, bad: list[str]) -> tuple[np.ndarray, int, int] | None:
        """The image at a position; None past the end, and for a damaged record."""
        if position >= len(self.records):
            return None
        image, label, index = self._read(position, bad)
        return (self._prepare(image), label, index) if index == position else None

    def _any_image(self, bad: list[str]) -> np.ndarray:
        """What an image looks like, for a share of a batch that has none."""
        return self._prepare(self._read(0, bad)[0])

    def _read(self, index: int, bad: list[str]) -> tuple[np.ndarray, int, int]:
        """The image and label of a record, or of the next that is not damaged; and the index it was read from."""
        for _ in range(len(self.records)):
            try:
                record = self.records[index]
            except BadRecordError as error:
                if str(error) not in bad:
                    bad.append(str(error))
                    _check_bad(self.records, bad)
                index = (index + 1) % len(self.records)
                continue
            image, label = record["image"], record["label"]
            if image.dtype != np.uint8 or image.ndim != 3:
                raise UserError(
                    f"{self.records.describe(index)} should be an image uint8 [H, W, C] and is {image.dtype} "
                    f"{list(image.shape)}: convert it where the source reads it."
                )
            if not 0 <= label < self.num_classes:
                raise UserError(
                    f"{self.records.describe(index)} has label {label}, outside [0, {self.num_classes}): correct it, "
                    "or the num_classes of the source."
                )
            return image, label, index
        raise UserError(f"None of the {len(self.records)} records of {self.records.name} can be read: {bad[0]}")

    def _prepare(self, image: np.ndarray) -> np.ndarray:
        for operation in self.preprocess:
            image = operation(image)
        return image

    def _check_sizes(self, images: list[np.ndarray], where: list[int]) -> None:
        for image, index in zip(images, where, strict=True):
            if image.shape != images[0].shape:
                mend = "End test_preprocess with CentralCrop or Resize." if self.preprocess else "Set image_size."
                raise UserError(
                    f"The images of a batch must have one shape [H, W, C]: {self.records.describe(where[0])} has "
                    f"{list(images[0].shape)}, {self.records.describe(index)} has {list(image.shape)}. {mend}"
                )


@functools.lru_cache(maxsize=2)  # a batch lies in at most two epochs
def _cached_order(seed: int, epoch: int, num_records: int) -> np.ndarray:
    return epoch_order(seed, epoch, num_records)


def _set_stream(rng: np.random.Generator, seed: int, stream: int, index: int) -> None:
    """Turns rng to the numbers that belong to (seed, stream, index) alone: Philox hashes its key and a counter.

    The same as a new `Generator(Philox(key=[seed, stream], counter=[0, 0, 0, index]))`, which takes ten times as long.
    """
    rng.bit_generator.state = {
        "bit_generator": "Philox",
        "state": {"key": np.array([seed, stream], np.uint64), "counter": np.array([0, 0, 0, index], np.uint64)},
        "buffer": np.zeros(4, np.uint64),
        "buffer_pos": 4,  # nothing buffered
        "has_uint32": 0,
        "uinteger": 0,
    }


def _rows(rows: Sequence[int] | None, batch_size: int) -> tuple[int, ...]:
    return tuple(range(batch_size) if rows is None else rows)


def _check_bad(records: RandomAccess, bad: list[str]) -> None:
    """Stops when more records are damaged than the source allows."""
    if not bad or len(bad) <= records.max_bad_fraction * len(records):
        return
    if records.max_bad_fraction == 0:
        raise UserError(bad[0])
    raise UserError(
        f"At least {len(bad)} of the {len(records)} files of {records.name} cannot be read as images, more than the "
        f"max_bad_fraction={records.max_bad_fraction} allowed: remove or repair them. The first: {' '.join(bad[:3])}"
    )


def _close(iterators: list[Any]) -> None:
    """Closes and forgets: grain's iterators clean up once more when deleted, which fails at the end of a program."""
    while iterators:
        iterators.pop().close()


@contextlib.contextmanager
def _sigterm_held() -> Iterator[None]:
    """Keeps SIGTERM from this thread, and for good from the threads and processes that it starts meanwhile.

    Other threads of this process get it, or this one afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker(index: int, count: int) -> None:
    """Leaves signals to the process that started the worker, and threads to the other workers.

    Ctrl-C and many schedulers signal all processes of a job at once. A run needs its workers until it has finished its
    step; then it ends them, and where it cannot, as it was killed, they see that it is gone.
    """
    import cv2

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, name="jmoe-parent", daemon=True).start()
    cv2.setNumThreads(0)


def _end_with_parent() -> None:
    """Ends this worker when the process that started it has ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
