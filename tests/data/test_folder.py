import logging
import os
import pathlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jmoe.data import BadRecordError, ImageFolder
from jmoe.data.folder import _boundary
from jmoe.errors import UserError

PETS = {"train": {"dog": 3, "cat": 2}, "test": {"dog": 1, "cat": 1}}


def test_classes_are_numbered_by_sorted_name_and_files_follow_by_name(image_folder):
    path = image_folder(PETS)
    source = ImageFolder(os.fspath(path))
    records = source.open("train")
    assert source.num_classes == 2
    expected = [("cat/000.png", 0), ("cat/001.png", 0), ("dog/000.png", 1), ("dog/001.png", 1), ("dog/002.png", 1)]
    assert len(records) == 5
    for index, (file, label) in enumerate(expected):
        record = records[index]
        assert record["label"] == label
        np.testing.assert_array_equal(record["image"], np.asarray(Image.open(path / "train" / file)))
        assert records.describe(index) == os.fspath(path / "train" / file)


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".png", ".bmp", ".gif", ".webp"])
def test_every_common_kind_of_image_is_read_as_rgb(image_folder, suffix):
    records = ImageFolder(os.fspath(image_folder(PETS, suffix=suffix))).open("train")
    assert len(records) == 5
    assert records[0]["image"].shape == (5, 7, 3)


def test_an_image_is_known_by_its_content_and_not_by_its_name(image_folder):
    path = image_folder(PETS)
    file = path / "train" / "cat" / "000.png"
    pixels = np.asarray(Image.open(file))
    file.rename(file.with_suffix(".jpg"))
    np.testing.assert_array_equal(ImageFolder(os.fspath(path)).open("train")[0]["image"], pixels)


def test_other_files_are_left_out_and_counted_in_a_warning(image_folder, caplog):
    path = image_folder(PETS)
    (path / "train" / "cat" / "notes.txt").write_text("about cats")
    (path / "train" / "dog" / ".hidden.png").touch()
    (path / "train" / "README").write_text("about pets")
    with caplog.at_level(logging.WARNING):
        assert len(ImageFolder(os.fspath(path)).open("train")) == 5
    assert "1 file(s) of" in caplog.text
    assert "cat/notes.txt" in caplog.text


def test_a_file_that_is_no_image_raises_with_its_path_and_the_reason(image_folder):
    path = image_folder(PETS)
    (path / "train" / "cat" / "001.png").write_text("not a picture")
    records = ImageFolder(os.fspath(path)).open("train")
    with pytest.raises(
        BadRecordError, match=r"train/cat/001.png cannot be read as an image: not an image of a known format"
    ):
        records[1]


@settings(deadline=None, max_examples=100, derandomize=True)
@given(count=st.integers(1, 300), cut=st.integers(0, 100))
def test_two_slices_that_meet_divide_the_split(count, cut):
    middle = _boundary(f"{cut}%", count)
    assert abs(middle - count * cut / 100) <= 0.5
    assert len(range(count)[:middle]) + len(range(count)[middle:]) == count


def test_slices_mix_the_classes_and_divide_the_files(image_folder):
    source = ImageFolder(os.fspath(image_folder({"train": {"a": 30, "b": 30}, "test": {"a": 1, "b": 1}})))
    first, second, whole = (source.open(split) for split in ("train[:70%]", "train[70%:]", "train"))
    assert len(first) == 42
    assert sorted(first.files + second.files) == sorted(whole.files)
    assert {label for _, label in second.files} == {0, 1}
    assert len({r.fingerprint for r in (first, second, whole)}) == 3
    assert source.open("train[-5:]").files == [f for f in whole.files if f in source.open("train[55:]").files]


def test_a_test_split_can_be_a_slice_of_the_training_split(image_folder):
    path = image_folder({"train": {"a": 10, "b": 10}})
    source = ImageFolder(os.fspath(path), train="train[:80%]", test="train[80%:]")
    assert not set(source.open(source.train).files) & set(source.open(source.test).files)


def test_the_fingerprint_follows_the_files_and_not_the_place(image_folder, tmp_path):
    here = ImageFolder(os.fspath(image_folder(PETS)))
    there = ImageFolder(os.fspath(image_folder(PETS, root=tmp_path / "elsewhere")))
    assert here.open("train").fingerprint == there.open("train").fingerprint
    (tmp_path / "third").mkdir()
    more = ImageFolder(os.fspath(image_folder({**PETS, "train": {"dog": 3, "cat": 3}}, root=tmp_path / "third")))
    assert more.open("train").fingerprint != here.open("train").fingerprint


def make_no_folder(path):
    return ImageFolder(os.fspath(path / "nowhere"))


def make_no_split(path):
    return ImageFolder(os.fspath(path), test="validation")


def make_no_classes(path):
    (path / "flat").mkdir()
    return ImageFolder(os.fspath(path), test="flat")


def make_an_empty_class(path):
    for split in ("train", "test"):
        (path / split / "cow").mkdir()
    return ImageFolder(os.fspath(path))


def make_other_classes(path):
    (path / "test" / "dog").rename(path / "test" / "dogs")
    return ImageFolder(os.fspath(path))


def make_a_bad_expression(path):
    return ImageFolder(os.fspath(path), train="train[50]")


def make_an_empty_slice(path):
    return ImageFolder(os.fspath(path), train="train[:1%]")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_no_folder, r"There is no folder .*/nowhere to read images from"),
        (make_no_split, r"has no sub-folder 'validation' for that split; its sub-folders are: test, train"),
        (make_no_classes, r"flat has no classes: put the images of each class into a sub-folder of its own"),
        (make_an_empty_class, r"train/cow holds no image \(.jpg, .*\): add some, or remove the class"),
        (make_other_classes, r"must have the same classes, but 'dog' is in 'train' and not in 'test': add or remove"),
        (make_a_bad_expression, r"'train\[50\]' is not a split of a folder: write a name, or a slice such as"),
        (make_an_empty_slice, r"The slice 'train\[:1%\]' of .* holds no images"),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(image_folder, make, message):
    source = make(image_folder(PETS))
    with pytest.raises(UserError, match=message):
        source.open(source.train)


def test_the_path_may_begin_with_the_home_folder(image_folder, monkeypatch):
    path = image_folder(PETS)
    monkeypatch.setenv("HOME", os.fspath(path.parent))
    assert len(ImageFolder(f"~/{pathlib.Path(path).name}").open("train")) == 5
