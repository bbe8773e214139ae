import io
import os
import pickle

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from jmoe.data import TFDS, BadRecordError
from jmoe.errors import UserError


def jmoe_test_image(index):
    return np.random.default_rng(index).integers(0, 256, (6, 4, 3), np.uint8)


class JmoeTestImages(tfds.core.GeneratorBasedBuilder):
    """Eleven training images whose label is their number modulo 3, and two to test on."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(11), "test": self._generate_examples(2)}

    def _generate_examples(self, count):
        for index in range(count):
            file = io.BytesIO()
            Image.fromarray(jmoe_test_image(index)).save(file, "png")
            file.seek(0)
            yield index, {"image": file, "label": index % 3}


class JmoeTestNumbers(tfds.core.GeneratorBasedBuilder):
    """No images."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"number": tfds.features.Scalar(np.int64)})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"number": 5}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return TFDS("jmoe_test_images", data_dir=os.fspath(tmp_path_factory.mktemp("tfds")))


@pytest.fixture
def own_copy(tmp_path):
    """A source in a folder of its own, to be damaged, and the folder of its files."""
    source = TFDS("jmoe_test_images", data_dir=os.fspath(tmp_path))
    assert source.num_classes == 3  # prepares it
    return source, tmp_path / "jmoe_test_images" / "1.0.0"


def test_a_dataset_is_prepared_on_first_use_and_read_record_by_record(source):
    records = source.open("train")
    assert len(records) == 11
    assert source.num_classes == 3
    read = [records[index] for index in range(11)]
    numbers = [next(n for n in range(11) if (jmoe_test_image(n) == record["image"]).all()) for record in read]
    assert sorted(numbers) == list(range(11))
    assert [record["label"] for record in read] == [number % 3 for number in numbers]


def test_slices_are_those_of_tfds(source):
    whole, part = source.open("train"), source.open("train[4:7]")
    assert len(part) == 3
    np.testing.assert_array_equal(part[0]["image"], whole[4]["image"])
    assert "number 4 in" in part.describe(0)
    assert part.fingerprint != whole.fingerprint


def test_records_can_be_sent_to_another_process(source):
    records = source.open("train[4:7]")
    copy = pickle.loads(pickle.dumps(records))
    assert copy.fingerprint == records.fingerprint
    np.testing.assert_array_equal(copy[2]["image"], records[2]["image"])


def sentence_without(name, folder):
    with pytest.raises(UserError) as caught:
        TFDS(name, data_dir=os.fspath(folder)).open("train")
    message = str(caught.value)
    assert message.startswith(f"The dataset '{name}' is not prepared in {folder}")
    assert "\n" not in message
    return message.removeprefix(f"The dataset '{name}' is not prepared in {folder}")


@pytest.mark.parametrize("name", ["no_such_images", "imagenet21k"])
def test_a_dataset_that_tfds_does_not_know_is_named_with_where_it_was_looked_for(name, tmp_path):
    assert sentence_without(name, tmp_path) == (
        ", and TFDS has no builder of that name to prepare it. Write a builder with the features 'image' and 'label' "
        "and prepare it there in the array_record format, name the folder that has it by data_dir or $JMOE_DATA_DIR, "
        "or train on a folder of images with ImageFolder."
    )


def test_a_dataset_to_be_downloaded_by_hand_says_into_which_folder(tmp_path):
    message = sentence_without("imagenet2012", tmp_path)
    assert message.startswith(
        f" and must be downloaded by hand first, into {tmp_path / 'downloads' / 'manual'}. Prepare"
    )
    assert f"`tfds build imagenet2012 --file_format=array_record --data_dir={tmp_path}`" in message


def test_a_dataset_that_cannot_be_prepared_says_why(tmp_path, monkeypatch):
    def fails(self, *args, **kwargs):
        raise OSError("no network\nand a second line")

    monkeypatch.setattr(JmoeTestImages, "download_and_prepare", fails)
    message = sentence_without("jmoe_test_images", tmp_path)
    assert message.startswith(" and could not be prepared here (OSError: no network). Prepare it where TensorFlow")
    assert f"`tfds build jmoe_test_images --file_format=array_record --data_dir={tmp_path}`" in message


def test_an_unknown_split_is_named(source):
    with pytest.raises(UserError, match="jmoe_test_images has no split 'trian': it has train, test, and slices"):
        source.open("trian")


def test_a_dataset_without_labels_is_refused(tmp_path):
    source = TFDS("jmoe_test_numbers", data_dir=os.fspath(tmp_path))
    with pytest.raises(
        UserError, match="has no feature 'label' with a known number of classes to train on; it has number"
    ):
        source.open("train")


def test_a_damaged_record_is_named_and_the_others_are_read(own_copy):
    source, folder = own_copy
    records = source.open("train")
    whole = [records[index]["image"] for index in range(11)]
    file = folder / "jmoe_test_images-train.array_record-00000-of-00001"
    data = file.read_bytes()
    place = data.index(whole_png(whole[5])[40:60])  # in the image data of that record
    file.write_bytes(data[:place] + b"\0\0\0\0" + data[place + 4 :])
    records = source.open("train")
    with pytest.raises(
        BadRecordError, match=r"record 5 of jmoe_test_images \(train\), number 5 in .*train.array_record-0000"
    ):
        records[5]
    for index in (4, 6):
        np.testing.assert_array_equal(records[index]["image"], whole[index])


def whole_png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def test_a_missing_and_a_truncated_file_are_found_when_opened(own_copy):
    source, folder = own_copy
    file = folder / "jmoe_test_images-train.array_record-00000-of-00001"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(
        UserError, match=r"train.array_record-00000-of-00001 of jmoe_test_images is missing or damaged \(11"
    ):
        source.open("train")
    file.unlink()
    with pytest.raises(
        UserError, match=r"train.array_record-00000-of-00001 of jmoe_test_images is missing or damaged \(11"
    ):
        source.open("train")
    assert len(source.open("test")) == 2


def test_another_file_format_is_refused(own_copy):
    source, folder = own_copy
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    for file in folder.glob("*.array_record*"):
        file.rename(os.fspath(file).replace("array_record", "tfrecord"))
    fresh = TFDS("jmoe_test_images:1.0.0", data_dir=source.data_dir)
    with pytest.raises(UserError, match=r"is prepared as tfrecord, and only array_record can be read by random access"):
        fresh.open("train")
