import numpy as np

from jmoe.data import InMemory, RandomAccess

CONFIGURE = """
import sys
from jmoe.data import TFDS, DataConfig, Digits, ImageFolder, InceptionCrop, RandomFlip
for source in (Digits(), TFDS("cifar10"), ImageFolder("nowhere")):
    DataConfig(source, batch_size=8, augment=(InceptionCrop(8), RandomFlip()))
heavy = {"grain", "tensorflow_datasets", "cv2", "sklearn", "PIL", "simplejpeg", "array_record"} & sys.modules.keys()
assert not heavy, heavy
"""


def test_constructing_a_configuration_imports_nothing_heavy_and_touches_no_disk(run_python):
    done = run_python(CONFIGURE)
    assert done.returncode == 0, done.stderr


def test_arrays_in_memory_are_records():
    images = np.arange(2 * 3 * 5 * 1, dtype=np.uint8).reshape(2, 3, 5, 1)
    records = InMemory("pair", "pair 2", images, np.array([7, 4]))
    assert isinstance(records, RandomAccess)
    assert len(records) == 2
    np.testing.assert_array_equal(records[1]["image"], images[1])
    assert records[1]["label"] == 4
    assert records.describe(1) == "record 1 of pair"
