import io
import json
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jmoe.data import CentralCrop, OneHot, Resize, ResizeSmall, ValueRange, parse_pipeline
from jmoe.data.decode import decode_image
from jmoe.data.preprocess import Decode, Keep, Step
from jmoe.errors import UserError

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
PIXELS = np.random.default_rng(0).integers(0, 256, (13, 17, 3), np.uint8)
sides = st.integers(1, 40)


def row(*values):
    return np.array(values, np.uint8).reshape(1, -1, 1)


def bilinear(image, height, width):
    """One pixel after the other, in float64."""
    H, W, C = image.shape
    result = np.zeros((height, width, C))
    for i in range(height):
        for j in range(width):
            y, x = (i + 0.5) * H / height - 0.5, (j + 0.5) * W / width - 0.5
            for a in (int(np.floor(y)), int(np.floor(y)) + 1):
                for b in (int(np.floor(x)), int(np.floor(x)) + 1):
                    weight = (1 - abs(y - a)) * (1 - abs(x - b))
                    result[i, j] += weight * image[min(max(a, 0), H - 1), min(max(b, 0), W - 1)]
    return result


def area(image, height, width):
    """The integral of the image, as steps, over the area of each new pixel; in float64."""
    H, W, _ = image.shape

    def overlap(i, count, n, pixel):
        return max(0, min((i + 1) * n / count, pixel + 1) - max(i * n / count, pixel))

    rows = np.array([[overlap(i, height, H, a) for a in range(H)] for i in range(height)]) * height / H
    columns = np.array([[overlap(j, width, W, b) for b in range(W)] for j in range(width)]) * width / W
    return np.einsum("ia,jb,abc->ijc", rows, columns, image)


# Operations


@given(height=sides, width=sides)
def test_resize_is_bilinear_between_half_pixel_centres(height, width):
    image = PIXELS.astype(np.float32)
    np.testing.assert_allclose(Resize((height, width))(image), bilinear(image, height, width), atol=1e-3)


def test_resize_truncates_to_the_dtype_that_came():
    # The new centres are at 0.25, 0.75, 1.25 and 1.75 of the old pixels 0.5 and 1.5.
    assert Resize((1, 4))(row(0, 99))[0, :, 0].tolist() == [0, 24, 74, 99]  # 24.75 and 74.25
    resized = Resize((1, 4))(row(0, 99).astype(np.float32))
    assert resized.dtype == np.float32
    assert resized[0, :, 0].tolist() == [0, 24.75, 74.25, 99]


def test_resize_keeps_a_plain_colour_exactly():
    assert (Resize((29, 31))(np.full((7, 5, 3), 100, np.uint8)) == 100).all()


def test_resize_shrinks_without_antialiasing():
    assert Resize((1, 2))(row(0, 200, 0, 0, 90, 0, 0, 0))[0, :, 0].tolist() == [100, 0]


def test_resize_leaves_an_image_of_the_right_size_alone():
    assert Resize((13, 17))(PIXELS) is PIXELS
    assert Resize(5)(PIXELS[..., :1]).shape == (5, 5, 1)


@given(size=sides)
def test_resize_small_averages_what_a_pixel_covers(size):
    result = ResizeSmall(size)(PIXELS)
    assert result.dtype == np.float32
    assert result.shape == (size, round(17 * float(np.float32(size) / np.float32(13))), 3)
    np.testing.assert_allclose(result, area(PIXELS, *result.shape[:2]), atol=2e-3)


def test_resize_small_worked_by_hand():
    shrunk = ResizeSmall(2)(np.array([[0, 30, 60], [0, 30, 60], [90, 0, 0]], np.uint8)[..., None])
    # Each new pixel covers 1.5 x 1.5 old ones: (0 + 30/2 + 0/2 + 30/4) / 2.25 = 10, and so on.
    np.testing.assert_allclose(shrunk[..., 0], [[(0 + 15 + 0 + 7.5) / 2.25, (15 + 60 + 7.5 + 30) / 2.25],
                                                [(90 + 0 + 0 + 7.5) / 2.25, (7.5 + 30) / 2.25]], rtol=1e-6)  # fmt: skip
    # Enlarged by 1.5: pixels are repeated, and mixed where a new one covers two.
    np.testing.assert_allclose(ResizeSmall(3)(np.repeat(row(0, 90), 2, axis=0))[0, :, 0], [0, 45, 90], atol=1e-4)


def test_resize_small_rounds_the_larger_side_half_to_even():
    assert ResizeSmall(25)(np.zeros((45, 30, 3), np.uint8)).shape == (38, 25, 3)  # 37.5
    assert ResizeSmall(31)(np.zeros((45, 30, 3), np.uint8)).shape == (46, 31, 3)  # 46.5


def test_a_central_crop_is_nearer_to_the_top_left():
    np.testing.assert_array_equal(CentralCrop((4, 5))(PIXELS), PIXELS[4:8, 6:11])  # 9 and 12 to spare
    np.testing.assert_array_equal(CentralCrop(13)(PIXELS), PIXELS[:, 2:15])


def test_a_crop_larger_than_the_image_is_refused():
    with pytest.raises(
        UserError, match=r"CentralCrop\(size=14\) cannot cut 14 x 14 pixels from an image of 13 x 17: ch"
    ):
        CentralCrop(14)(PIXELS)


@pytest.mark.parametrize("size", [0, (3, 0), (3, 4, 5)])
@pytest.mark.parametrize("operation", [Resize, CentralCrop, ResizeSmall])
def test_a_size_without_pixels_is_refused(operation, size, untyped):
    with pytest.raises(UserError, match=f"{operation.__name__} wants a size of at least 1 pixel.* it got"):
        operation(size)


def test_value_range_is_linear_and_clips_on_request():
    image = np.array([[[0, 0], [100, 255]]], np.uint8)
    np.testing.assert_allclose(ValueRange(-1, 1)(image), image / 127.5 - 1, atol=1e-6)
    by_channel = ValueRange(0, 10, in_min=(0, 5), in_max=(100, 255))
    np.testing.assert_allclose(by_channel(image), [[[0, -0.2], [10, 10]]], atol=1e-6)
    clipped = ValueRange(0, 10, in_min=50, in_max=150, clip_values=True)(image)
    np.testing.assert_allclose(clipped, [[[0, 0], [5, 10]]], atol=1e-6)


def test_one_hot_labels():
    assert OneHot(3)(1).tolist() == [0, 1, 0]
    assert OneHot(3)(-1).tolist() == OneHot(3)(3).tolist() == [0, 0, 0]
    assert OneHot(4)(np.array([3, 0, 3])).tolist() == [1, 0, 0, 1]
    assert OneHot(4)(np.array([], np.int32)).tolist() == [0, 0, 0, 0]
    assert OneHot(3, multi=False)(np.array([2, 0])).tolist() == [[0, 0, 1], [1, 0, 0]]
    np.testing.assert_allclose(OneHot(3, on=0.9, off=0.1)(2), [0.1, 0.1, 0.9])


# Decoding, by the recorded files


def test_png_and_jpeg_are_decoded_to_the_very_pixels_of_tensorflow():
    with np.load(GOLDENS / "pp_eval_pipelines.npz") as file:
        kinds = {pipeline["id"]: pipeline["kind"] for pipeline in json.loads(str(file["config"]))["pipelines"]}
        assert {"png", "png_gray", "jpg420", "jpg444"} <= set(kinds.values())
        for i in kinds:
            decoded = decode_image(file[f"{i}/encoded_bytes"].tobytes())
            np.testing.assert_array_equal(decoded, file[f"{i}/decoded"])


# Pipelines


def test_a_published_pipeline_is_read():
    text = 'decode|resize_small(32)|central_crop(28)|value_range(-1,1)|onehot(10, inkey="label", outkey="labels")'
    assert parse_pipeline(text + '|keep("image", "labels")') == (
        Step(Decode(), "image", "image"),
        Step(ResizeSmall(32), "image", "image"),
        Step(CentralCrop(28), "image", "image"),
        Step(ValueRange(-1, 1), "image", "image"),
        Step(OneHot(10), "label", "labels"),
        Keep(("image", "labels")),
    )
    assert parse_pipeline(' resize((20, 30), key="x") | value_range(0, 1, in_max=[1, 2, 3.5]) | keep(["x"])') == (
        Step(Resize((20, 30)), "x", "x"),
        Step(ValueRange(0, 1, in_max=(1, 2, 3.5)), "image", "image"),
        Keep(("x",)),
    )
    assert parse_pipeline('resize(4, inkey="a")') == (Step(Resize(4), "a", "image"),)  # as published
    assert parse_pipeline("onehot(depth=4, multi=False)") == (Step(OneHot(4, multi=False), "labels", "labels"),)


def test_a_pipeline_runs_on_the_features_of_an_example():
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, "png")
    features = {"image": file.getvalue(), "label": 2, "name": "x"}
    for step in parse_pipeline('decode|central_crop(5)|onehot(3, inkey="label")|keep("image", "labels")'):
        features = step(features)
    assert features.keys() == {"image", "labels"}
    np.testing.assert_array_equal(features["image"], PIXELS[4:9, 6:11])
    assert features["labels"].tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("resize(", "'resize(' is not a pipeline, which is operations with their arguments between bars, such as 'de"),
        ("", "'' is not a pipeline"),
        (
            "decode|rezise(4)",
            "There is no operation 'rezise' for evaluation (from the pipeline 'decode|rezise(4)'). Did",
        ),
        ("decode|rezise(4)", "Did you mean 'resize'? There are decode, resize, resize_small,"),
        ("decode|flip_lr", "There is no operation 'flip_lr' for evaluation"),
        ("decode|flip_lr", "onehot, keep; what changes training images is in jmoe.data.augment."),
        ("decode|3", "There is no operation '3' for evaluation"),
        ("os.remove('x')", "There is no operation \"os.remove('x')\" for evaluation"),
        ("resize(size(3))", "The arguments of 'resize(size(3))' must be numbers, text, True, False or lists of them"),
        ("resize(*[4])", "The arguments of 'resize(*[4])' must be numbers, text, True, False or lists of them"),
        (
            "resize()",
            "The arguments of 'resize()' do not fit (missing a required argument: 'size'): resize takes size,",
        ),
        ("resize", "The arguments of 'resize' do not fit (missing a required argument: 'size')"),
        (
            "resize(4, method=2)",
            "do not fit (got an unexpected keyword argument 'method'): resize takes size, and inkey",
        ),
        ("resize(4, inkey=5)", "'resize(4, inkey=5)' must name features by text, as in inkey=\"label\""),
        ("resize(0)", "Resize wants a size of at least 1 pixel, or (height, width); it got 0."),
        ("keep(3)", "'keep(3)' must name the features to keep, as in 'keep(\"image\", \"labels\")'."),
        ("keep", "'keep' must name the features to keep"),
    ],
)
def test_what_is_no_pipeline_is_said_in_a_sentence(text, sentence):
    with pytest.raises(UserError) as caught:
        parse_pipeline(text)
    assert sentence in str(caught.value)


def test_a_feature_that_is_not_there_is_named():
    (step,) = parse_pipeline("onehot(3)")
    with pytest.raises(
        UserError, match="reads the feature 'labels', and there are image, label: name another by inkey"
    ):
        step({"image": PIXELS, "label": 2})
