import dataclasses
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jmoe.data import (
    CentralCrop,
    DataConfig,
    ImageFolder,
    InMemory,
    RandomCrop,
    RandomFlip,
    Resize,
    ResizeSmall,
    Shift,
    ValueRange,
    epoch_order,
    pipeline,
    train_batches,
)
from jmoe.data.decode import resize_image
from jmoe.errors import UserError

quickly = settings(deadline=None, max_examples=30, derandomize=True)

# beartype draws which items of a container to check; in the background thread it does so while hypothesis draws.
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module inside strategies")


@dataclasses.dataclass(frozen=True)
class Numbered:
    """A source of `count` images; image i has the pixels of number i in its corner and label i modulo 5."""

    count: int = 23
    num_classes: int = 5
    train: str = "train"
    test: str = "test"
    name: str = "numbered"

    def open(self, split):
        images = np.zeros((self.count, 3, 4, 1), np.uint8)
        images[:, 1, 1, 0] = np.arange(self.count)
        return InMemory(f"numbered ({split})", f"numbered {self.count}", images, np.arange(self.count) % 5)


def numbers(batch):
    """Which images a batch holds."""
    return batch["image"].max(axis=(1, 2, 3)).tolist()


def take(count, config, **options):
    batches = train_batches(config, **options)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def assert_same(first, second):
    assert first.keys() == second.keys()
    for key in first:
        assert first[key].dtype == second[key].dtype
        np.testing.assert_array_equal(first[key], second[key])


# What a batch is


def test_a_batch_has_the_shapes_and_types_of_its_contract():
    batch = take(1, DataConfig(Numbered(), 7), seed=0)[0]
    assert {key: (value.shape, value.dtype.name) for key, value in batch.items()} == {
        "image": ((7, 3, 4, 1), "uint8"),
        "label": ((7,), "int32"),
        "mask": ((7,), "bool"),
    }
    assert batch["mask"].all()
    assert batch["label"].tolist() == [number % 5 for number in numbers(batch)]


@quickly
@given(count=st.integers(2, 40), batch_size=st.integers(1, 40), seed=st.integers(-(2**40), 2**70))
def test_every_epoch_holds_each_image_once(count, batch_size, seed):
    batch_size = min(count, batch_size)
    batches = take(-(-3 * count // batch_size), DataConfig(Numbered(count), batch_size), seed=seed)
    seen = [number for batch in batches for number in numbers(batch)]
    for epoch in range(3):  # they follow each other without a gap
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(epoch_order(seed, epoch, 50)) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_all_orders_are_equally_likely():
    counts = {}
    for seed in range(200):
        for epoch in range(30):
            order = tuple(epoch_order(seed, epoch, 3))
            counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 6
    assert all(abs(count - 1000) < 5 * 29 for count in counts.values())  # 5 standard deviations


def test_batches_are_what_numpy_computes_from_seed_and_step():
    config = DataConfig(Numbered(), 7, augment=(Shift(1), RandomFlip()))
    images = config.source.open("train").images
    batches = take(8, config, seed=3)
    for step, row in [(0, 0), (2, 6), (3, 1), (3, 2), (7, 5)]:  # step 3 has the end of the first epoch
        position = step * 7 + row
        shuffle = np.random.Generator(np.random.Philox(key=[3, 0], counter=[0, 0, 0, position // 23]))
        rng = np.random.Generator(np.random.Philox(key=[3, 1], counter=[0, 0, 0, position]))
        image = images[shuffle.permutation(23)[position % 23]]
        expected = RandomFlip()(Shift(1)(image, rng), rng)
        np.testing.assert_array_equal(batches[step]["image"][row], expected)


# What it depends on


@quickly
@given(start=st.integers(0, 60), seed=st.integers(0, 5))
def test_a_resumed_run_gets_the_batches_of_the_uninterrupted_one(start, seed):
    config = DataConfig(Numbered(), 5, augment=(Shift(1),))
    for one, other in zip(
        take(start + 3, config, seed=seed)[start:], take(3, config, seed=seed, start_step=start), strict=True
    ):
        assert_same(one, other)


def test_a_run_can_be_resumed_after_billions_of_images():
    config = DataConfig(Numbered(), 5, augment=(Shift(1),))
    one = take(2, config, seed=0, start_step=10**12)
    assert_same(one[1], take(1, config, seed=0, start_step=10**12 + 1)[0])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_together_have_the_batch_of_one(processes):
    config = DataConfig(Numbered(), 8, augment=(Shift(1), RandomFlip()))
    whole = take(6, config, seed=1, start_step=2)
    shares = [take(6, config, seed=1, start_step=2, rows=range(index, 8, processes)) for index in range(processes)]
    for step in range(6):
        for index in range(processes):
            share = {key: value[index::processes] for key, value in whole[step].items()}
            assert_same(shares[index][step], share)


def test_worker_processes_change_nothing(image_folder):
    path = image_folder({"train": {"a": 7, "b": 6}, "test": {"a": 4, "b": 3}})
    (path / "train" / "a" / "003.png").write_bytes(b"broken")
    source = ImageFolder(os.fspath(path), max_bad_fraction=0.2)
    alone = DataConfig(source, 4, image_size=(3, 7), augment=(RandomCrop((4, 5), padding=1), RandomFlip()))
    helped = dataclasses.replace(alone, num_workers=2)
    batches, others = (train_batches(config, seed=1, start_step=3) for config in (alone, helped))
    for _ in range(7):
        first, second = next(batches), next(others)
        assert_same(first, second)
        assert type(second["image"]) is np.ndarray  # not shared memory
    assert batches.bad == others.bad
    assert len(others.bad) == 1
    others.close()


def test_the_fingerprint_is_that_of_the_training_split():
    assert pipeline.fingerprint(DataConfig(Numbered(31), 4)) == "numbered 31"


def test_the_number_of_steps_is_that_of_whole_batches():
    config = DataConfig(Numbered(23), 5)
    assert (pipeline.num_train_images(config), pipeline.num_test_images(config)) == (23, 23)
    assert pipeline.steps_per_epoch(config) == 4


# Evaluation


@quickly
@given(
    count=st.integers(1, 40), share=st.integers(1, 9), processes=st.sampled_from([1, 2, 4]), padding=st.integers(0, 3)
)
def test_evaluation_has_every_image_once_in_order_and_pads_the_rest(count, share, processes, padding):
    rows = share * processes  # of which the last are padding, in every batch
    batch_size = max(1, rows - padding)
    config = DataConfig(Numbered(count), 1, augment=(Shift(1),))
    shares = [
        list(pipeline.test_batches(config, batch_size=batch_size, rows=range(index, rows, processes)))
        for index in range(processes)
    ]
    assert {len(batches) for batches in shares} == {-(-count // batch_size)}
    seen = []
    for together in zip(*shares, strict=True):
        for row in range(share):
            for batch in together:
                if batch["mask"][row]:
                    seen.append(int(batch["image"][row].max()))
                    assert batch["label"][row] == seen[-1] % 5
                else:
                    assert batch["image"][row].max() == 0
                    assert batch["label"][row] == 0
    assert seen == list(range(count))
    assert all(batch["image"].shape == (share, 3, 4, 1) for batches in shares for batch in batches)


def test_evaluation_takes_the_split_and_batch_size_of_the_config_by_default(image_folder):
    source = ImageFolder(os.fspath(image_folder({"train": {"a": 6}, "test": {"a": 3}})))
    config = DataConfig(source, 2)
    assert [batch["mask"].sum() for batch in pipeline.test_batches(config)] == [2, 1]
    assert [batch["mask"].sum() for batch in pipeline.test_batches(config, split="train[:50%]", batch_size=3)] == [3]


def test_images_of_other_sizes_are_resized(image_folder):
    path = image_folder({"train": {"a": 4}, "test": {"a": 1}})
    image_folder({"train": {"b": 4}, "test": {"b": 1}}, size=(9, 6))
    config = DataConfig(ImageFolder(os.fspath(path)), 8, image_size=(6, 5))
    records = config.source.open("train")
    image = take(1, config, seed=0)[0]["image"]
    assert image.shape == (8, 6, 5, 3)
    rounded = [resize_image(records[index]["image"], (6, 5)) for index in epoch_order(0, 0, 8).tolist()]
    np.testing.assert_array_equal(image, rounded)  # in training
    truncated = [Resize((6, 5))(records[index]["image"]) for index in range(8)]
    np.testing.assert_array_equal(next(pipeline.test_batches(config, split="train"))["image"], truncated)


def test_evaluation_images_can_be_preprocessed_as_published(image_folder):
    operations = (ResizeSmall(7), CentralCrop((6, 5)))
    path = image_folder({"train": {"a": 3, "b": 2}, "test": {"a": 3, "b": 2}}, size=(9, 8))
    config = DataConfig(ImageFolder(os.fspath(path)), 4, image_size=3, test_preprocess=operations)
    batches = list(pipeline.test_batches(config))
    assert [(batch["image"].shape, batch["image"].dtype) for batch in batches] == [((4, 6, 5, 3), np.float32)] * 2
    last = config.source.open("test")[4]["image"]
    np.testing.assert_array_equal(batches[1]["image"][0], operations[1](operations[0](last)))
    assert not batches[1]["image"][1:].any()
    assert take(1, config, seed=0)[0]["image"].shape == (4, 3, 3, 3)  # training does not see them


def test_evaluation_images_of_different_sizes_are_refused(image_folder):
    path = image_folder({"train": {"a": 4, "b": 1}, "test": {"a": 1}})
    image_folder({"test": {"b": 1}}, size=(9, 6))
    config = DataConfig(ImageFolder(os.fspath(path)), 2, test_preprocess=(ResizeSmall(4),))
    with pytest.raises(
        UserError, match=r"\[4, 6, 3\].* has \[6, 4, 3\]. End test_preprocess with CentralCrop or Resize."
    ):
        next(pipeline.test_batches(config))


def test_what_leaves_the_scale_of_pixels_is_no_preprocessing_of_batches():
    with pytest.raises(
        ValueError, match=r"test_preprocess cannot hold ValueRange\(vmin=-1, .*\): it takes images on the"
    ):
        DataConfig(Numbered(), 2, test_preprocess=(CentralCrop(2), ValueRange(-1, 1)))


# Damaged files


@pytest.fixture
def damaged(image_folder):
    """A folder of 20 training and 20 test images whose fifth is damaged in both."""
    path = image_folder({split: {"a": 10, "b": 10} for split in ("train", "test")})
    for split in ("train", "test"):
        (path / split / "a" / "005.png").write_bytes(b"broken")
    return path


def test_a_damaged_file_is_named_counted_and_replaced_by_the_next(damaged, caplog):
    config = DataConfig(ImageFolder(os.fspath(damaged), max_bad_fraction=0.05), 20)
    batches = train_batches(config, seed=0)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            batch = next(batches)
            following = np.asarray(Image.open(damaged / "train" / "a" / "006.png"))
            assert sum((image == following).all() for image in batch["image"]) == 2
    batches.close()
    assert batches.bad == [f"{damaged}/train/a/005.png cannot be read as an image: not an image of a known format."]
    assert caplog.text.count("train/a/005.png") == 1  # once, not once an epoch
    assert "Bad files so far: 1" in caplog.text


def test_resuming_is_exact_with_damaged_files(damaged):
    config = DataConfig(ImageFolder(os.fspath(damaged), max_bad_fraction=0.05), 7)
    for one, other in zip(take(9, config, seed=0)[4:], take(5, config, seed=0, start_step=4), strict=True):
        assert_same(one, other)


def test_evaluation_leaves_a_damaged_file_out(damaged):
    config = DataConfig(ImageFolder(os.fspath(damaged), max_bad_fraction=0.05), 8)
    mask = np.concatenate([batch["mask"] for batch in pipeline.test_batches(config)])
    assert np.flatnonzero(~mask).tolist() == [5, 20, 21, 22, 23]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_damaged_files_stop_the_run(damaged, num_workers):
    (damaged / "train" / "b" / "001.png").write_bytes(b"")
    config = DataConfig(ImageFolder(os.fspath(damaged), max_bad_fraction=0.05), 5, num_workers=num_workers)
    with pytest.raises(UserError) as caught:
        take(4, config, seed=0)
    message = str(caught.value)
    assert "At least 2 of the 20 files of images (train) cannot be read as images" in message
    assert "more than the max_bad_fraction=0.05 allowed: remove or repair them" in message
    assert "train/a/005.png cannot" in message
    assert "train/b/001.png cannot be read as an image: the file is empty." in message


def test_a_folder_without_a_single_image_stops_at_once(image_folder):
    path = image_folder({"train": {"a": 4}, "test": {"a": 4}})
    for file in (path / "train" / "a").iterdir():
        file.write_bytes(b"broken")
    config = DataConfig(ImageFolder(os.fspath(path), max_bad_fraction=1.0), 2)
    with pytest.raises(
        UserError, match=r"None of the 4 records of images \(train\) can be read: .*000.png|None of the 4"
    ):
        take(1, config, seed=0)


# What is refused


def test_fewer_images_than_a_batch_are_refused():
    with pytest.raises(UserError, match=r"A batch of 24 images is more than the 23 of numbered \(train\): choose a"):
        train_batches(DataConfig(Numbered(), 24), seed=0)


def test_an_empty_batch_is_refused_where_it_is_set():
    with pytest.raises(ValueError, match="DataConfig wants a batch_size of at least 1; it got 0"):
        DataConfig(Numbered(), 0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_label_out_of_range_is_named_with_its_record(num_workers):
    config = DataConfig(Numbered(num_classes=4), 23, num_workers=num_workers)
    with pytest.raises(UserError, match=r"record \d+ of numbered \(train\) has label 4, outside \[0, 4\): correct it"):
        take(1, config, seed=0)


def test_images_of_different_sizes_without_an_image_size_are_refused(image_folder):
    path = image_folder({"train": {"a": 4}, "test": {"a": 1}})
    image_folder({"train": {"b": 4}, "test": {"b": 1}}, size=(9, 6))
    with pytest.raises(UserError) as caught:
        take(1, DataConfig(ImageFolder(os.fspath(path)), 8), seed=0)
    message = str(caught.value)
    assert f"{path}/train/a/" in message
    assert f"{path}/train/b/" in message
    assert "[5, 7, 3]" in message
    assert "[9, 6, 3]" in message
    assert message.endswith("Set image_size.")


def test_an_image_of_another_type_is_refused():
    class Records:
        name = fingerprint = "floats"
        max_bad_fraction = 0.0

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return {"image": np.zeros((2, 2, 3), np.float32), "label": 0}

        def describe(self, index):
            return f"float {index}"

    class Floats(Numbered):
        def open(self, split):
            return Records()

    with pytest.raises(UserError, match=r"float \d should be an image uint8 \[H, W, C\] and is float32 \[2, 2, 3\]"):
        take(1, DataConfig(Floats(), 2), seed=0)


def test_a_killed_worker_is_an_error_and_not_a_hang():
    parent = os.getpid()

    class FatalRecords(InMemory):
        def __getitem__(self, index):
            if index == 11 and os.getpid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__getitem__(index)

    class Fatal(Numbered):
        def open(self, split):
            return FatalRecords(**vars(super().open(split)))

    with pytest.raises(UserError, match="A process that reads data was killed, perhaps for lack of memory"):
        take(5, DataConfig(Fatal(), 5, num_workers=1), seed=0)


def test_workers_leave_sigterm_to_the_run_which_needs_them_to_finish_its_step():
    parent = os.getpid()

    class Signalled(InMemory):
        def __getitem__(self, index):
            if os.getpid() != parent:
                # Blocked already when the process was started: the signal can come while it imports.
                assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, [])
                assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__getitem__(index)

    class Source(Numbered):
        def open(self, split):
            return Signalled(**vars(super().open(split)))

    assert len(take(3, DataConfig(Source(), 5, num_workers=2), seed=0)) == 3
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.slow
def test_no_worker_outlives_a_run_that_was_killed():
    program = (
        "import os, multiprocessing\n"
        "from jmoe.data import DataConfig, train_batches\n"
        "from tests.data.test_pipeline import Numbered\n"
        "batches = train_batches(DataConfig(Numbered(), 5, num_workers=2), seed=0)\n"
        "next(batches), next(batches)\n"
        "print(*[child.pid for child in multiprocessing.active_children()], flush=True)\n"
        "os._exit(1)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    workers = [int(pid) for pid in ended.stdout.split()]
    assert len(workers) == 2, ended.stderr
    deadline = time.monotonic() + 10
    while any(pathlib.Path(f"/proc/{pid}/cmdline").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_no_batches_come_after_closing():
    batches = train_batches(DataConfig(Numbered(), 4), seed=0)
    next(batches)
    batches.close()
    assert list(batches) == []
