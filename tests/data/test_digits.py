import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from jmoe.data import Digits
from jmoe.data.digits import prepare
from jmoe.errors import UserError

OPEN = "import sys; from jmoe.data import Digits; print(Digits(data_dir=sys.argv[1]).open('train').fingerprint)"

# As where TensorFlow is not installed, although it may be here: finding it gives nothing, importing it fails.
WITHOUT_TENSORFLOW = """
import importlib.machinery, importlib.util, sys
class Finder(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "tensorflow" else super().find_spec(name, path, target)
sys.meta_path = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
assert importlib.util.find_spec("tensorflow") is None
"""

KILLED_WHILE_WRITING = """
import os, signal
from jmoe.data import digits_builder
generate = digits_builder.Digits._generate_examples
def stop_halfway(self, *arguments):
    for number, example in enumerate(generate(self, *arguments)):
        if number == 700:
            os.kill(os.getpid(), signal.SIGKILL)
        yield example
digits_builder.Digits._generate_examples = stop_halfway
"""


def both_splits(source):
    opened = [source.open(split) for split in ("train", "test")]
    return np.concatenate([o.images for o in opened]), np.concatenate([o.labels for o in opened])


def rows(images, labels):
    """Each image with its label as bytes, sorted: a multiset that can be compared."""
    return sorted(image.tobytes() + bytes([label]) for image, label in zip(images, labels, strict=True))


def test_the_two_splits_together_are_the_images_of_scikit_learn(digits):
    original = load_digits()
    images, labels = both_splits(digits)
    assert images.shape == (1797, 8, 8, 1)
    assert images.dtype == np.uint8
    expected = [[[round(v * 255 / 16) for v in row] for row in image] for image in original.images.tolist()]
    expected = np.array(expected, np.uint8)[..., None]
    assert rows(images, labels) == rows(expected, original.target)


def test_the_test_split_has_36_images_of_each_class(digits):
    assert len(digits.open("train")) == 1437
    assert np.bincount(digits.open("test").labels).tolist() == [36] * 10


def test_the_split_is_the_same_everywhere(digits):
    # Sums over the test split, from the split's definition: 36 of each class in the order of RandomState(0).
    original = load_digits()
    taken = {label: [] for label in range(10)}
    for index in np.random.RandomState(0).permutation(1797).tolist():
        label = int(original.target[index])
        if len(taken[label]) < 36:
            taken[label].append(np.rint(original.images[index] * 255 / 16).astype(np.uint8))
    expected = rows(np.concatenate([taken[label] for label in range(10)]), np.repeat(np.arange(10), 36))
    records = digits.open("test")
    assert rows(records.images, records.labels) == expected


def test_slices_of_a_split_divide_it(digits):
    first, second, whole = (digits.open(split) for split in ("train[:90%]", "train[90%:]", "train"))
    assert len(first) == 1293
    assert rows(np.concatenate([first.images, second.images]), np.concatenate([first.labels, second.labels])) == rows(
        whole.images, whole.labels
    )
    assert first.fingerprint != whole.fingerprint


def test_an_unknown_split_is_named_with_those_there_are(digits):
    with pytest.raises(UserError, match=r"digits has no split 'valid': it has train, test, and slices such as"):
        digits.open("valid")


def test_preparing_again_writes_nothing(digits):
    digits.open("train")
    folder = os.path.join(digits.data_dir, "digits", "1.0.0")
    before = {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(folder)}
    assert prepare(digits.data_dir) == folder
    assert {entry.name: entry.stat().st_mtime_ns for entry in os.scandir(folder)} == before


def test_tensorflow_is_not_needed_to_prepare_or_to_read(tmp_path, run_python):
    done = run_python(WITHOUT_TENSORFLOW + OPEN + "; assert 'tensorflow' not in sys.modules", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("digits:1.0.0 train 1437 ")  # and no progress bars on the output


def test_a_killed_preparation_leaves_nothing_that_looks_complete(tmp_path, run_python, digits):
    killed = run_python(KILLED_WHILE_WRITING + OPEN, tmp_path)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "digits" / "1.0.0").exists()
    assert Digits(data_dir=os.fspath(tmp_path)).open("train").fingerprint == digits.open("train").fingerprint


def test_two_processes_at_once_both_succeed(tmp_path, digits):
    command = [sys.executable, "-c", OPEN, os.fspath(tmp_path)]
    paths = {"PYTHONPATH": os.pathsep.join(sys.path)}
    running = [subprocess.Popen(command, env={**os.environ, **paths}, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    outputs = [process.communicate(timeout=120)[0].strip() for process in running]
    assert outputs == [digits.open("train").fingerprint] * 2
    assert os.listdir(tmp_path) == ["digits"]


def test_the_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", os.fspath(tmp_path / "tfds"))
    monkeypatch.delenv("JMOE_DATA_DIR", raising=False)
    Digits().open("test")
    assert os.listdir(tmp_path) == ["tfds"]
    monkeypatch.setenv("JMOE_DATA_DIR", os.fspath(tmp_path / "jmoe"))
    Digits().open("test")
    assert sorted(os.listdir(tmp_path)) == ["jmoe", "tfds"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        UserError, match=r"Cannot write the digits dataset to .*/file/sub .*: name a folder that can be"
    ):
        Digits(data_dir=os.fspath(tmp_path / "file" / "sub")).open("train")


def test_damaged_bytes_are_found_and_the_file_named(tmp_path):
    source = Digits(data_dir=os.fspath(tmp_path))
    source.open("test")  # prepares it; the training split is not in memory yet
    file = tmp_path / "digits" / "1.0.0" / "digits-train.array_record-00000-of-00001"
    data = bytearray(file.read_bytes())
    data[100_000] ^= 1
    file.write_bytes(data)
    with pytest.raises(
        UserError, match=r"in .*digits-train.array_record-00000-of-00001, is damaged .*: restore the file"
    ):
        source.open("train")


def test_a_truncated_file_is_found_when_opened(tmp_path):
    source = Digits(data_dir=os.fspath(tmp_path))
    source.open("test")
    file = tmp_path / "digits" / "1.0.0" / "digits-train.array_record-00000-of-00001"
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(
        UserError, match=r"digits-train.array_record-00000-of-00001 of digits is missing or damaged \(1437"
    ):
        source.open("train")


def test_damaged_metadata_are_found(tmp_path):
    source = Digits(data_dir=os.fspath(tmp_path))
    source.open("test")
    (tmp_path / "digits" / "1.0.0" / "dataset_info.json").write_text("{ not JSON")
    with pytest.raises(UserError, match=r"Cannot open .*/digits/1.0.0 \(ParseError: .*\): if damaged, delete it"):
        source.open("train")
