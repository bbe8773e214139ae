import io

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jmoe.data import decode
from jmoe.data.decode import DecodeError, decode_image, resize_image

PIXELS = np.random.default_rng(0).integers(0, 256, (13, 17, 3), np.uint8)


def encode(pixels, form, mode=None, **options):
    image = Image.fromarray(pixels)
    file = io.BytesIO()
    (image.convert(mode) if mode else image).save(file, form, **options)
    return file.getvalue()


def smooth(height, width):
    """A picture that JPEG keeps almost exactly."""
    y, x = np.mgrid[:height, :width]
    return np.stack([4 * x, 4 * y, 128 + 0 * x], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("form", ["png", "bmp"])
def test_a_lossless_image_comes_back_exactly(form):
    np.testing.assert_array_equal(decode_image(encode(PIXELS, form)), PIXELS)


@pytest.mark.parametrize(("form", "options"), [("jpeg", {"quality": 95}), ("webp", {"lossless": True})])
def test_a_lossy_image_comes_back_closely(form, options):
    pixels = smooth(31, 47)
    np.testing.assert_allclose(decode_image(encode(pixels, form, **options)).astype(int), pixels, atol=6)


def test_gray_images_become_rgb():
    gray = PIXELS[..., 0]
    np.testing.assert_array_equal(decode_image(encode(gray, "png")), np.repeat(gray[..., None], 3, axis=2))
    jpeg = decode_image(encode(smooth(31, 47)[..., 0], "jpeg"))
    assert jpeg.shape == (31, 47, 3)
    np.testing.assert_array_equal(jpeg[..., 0], jpeg[..., 2])


def test_one_channel_can_be_asked_for():
    gray = PIXELS[..., 0]
    np.testing.assert_array_equal(decode_image(encode(gray, "png"), channels=1), gray[..., None])
    assert decode_image(encode(PIXELS, "jpeg"), channels=1).shape == (13, 17, 1)


def test_alpha_is_dropped():
    with_alpha = np.concatenate([PIXELS, np.full((13, 17, 1), 3, np.uint8)], axis=2)
    np.testing.assert_array_equal(decode_image(encode(with_alpha, "png")), PIXELS)


def test_a_palette_with_transparency_becomes_rgb():
    image = Image.fromarray(PIXELS[..., 0], "L").convert("P")
    file = io.BytesIO()
    image.save(file, "png", transparency=bytes(range(256)))
    np.testing.assert_array_equal(decode_image(file.getvalue()), np.repeat(PIXELS[..., :1], 3, axis=2))


def test_cmyk_jpeg_becomes_rgb():
    pixels = decode_image(encode(smooth(31, 47), "jpeg", mode="CMYK", quality=95))
    np.testing.assert_allclose(pixels.astype(int), smooth(31, 47), atol=8)


def test_sixteen_bits_are_scaled_and_not_clipped():
    deep = (PIXELS[..., 0].astype(np.uint16) * 256) + 7
    np.testing.assert_array_equal(decode_image(encode(deep, "png"))[..., 1], PIXELS[..., 0])


def test_an_animation_gives_its_first_frame():
    first, second = (Image.fromarray(np.full((4, 6), value, np.uint8)) for value in (10, 200))
    file = io.BytesIO()
    first.save(file, "gif", save_all=True, append_images=[second])
    assert (decode_image(file.getvalue()) == 10).all()


def test_exif_orientation_is_ignored():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    assert decode_image(encode(PIXELS, "jpeg", exif=exif)).shape == (13, 17, 3)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"this is a letter, not a picture", "not an image of a known format"),
        (b"\xff\xd8\xff\xe0 and then nothing of a JPEG", "."),
        (encode(smooth(64, 64), "jpeg")[:-300], "truncated"),
        (encode(PIXELS, "png")[:-300], "truncated"),
    ],
)
def test_what_is_no_whole_image_is_refused(data, reason):
    with pytest.raises(DecodeError, match=reason):
        decode_image(data)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    form=st.sampled_from(["jpeg", "png", "gif", "webp", "bmp"]), cut=st.integers(1, 400), noise=st.binary(max_size=40)
)
def test_damaged_bytes_give_an_image_or_a_decode_error_and_nothing_else(form, cut, noise):
    data = encode(PIXELS, form)
    damaged = data[: len(data) // 2] + noise + data[min(len(data), len(data) // 2 + cut) :]
    try:
        image = decode_image(damaged)
    except DecodeError:
        return
    assert image.dtype == np.uint8
    assert image.ndim == 3


@pytest.mark.parametrize("form", ["jpeg", "png"])
def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded(form, monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 200)
    with pytest.raises(DecodeError, match="13 x 17 pixels, more than the limit of 200"):
        decode_image(encode(PIXELS, form))


def test_resizing_interpolates_between_half_pixel_centres():
    row = np.array([[[0], [100]]], np.uint8)  # centres at 0.5 and 1.5; the new ones at 0.25, 0.75, 1.25, 1.75
    np.testing.assert_array_equal(resize_image(row, (1, 4))[0, :, 0], [0, 25, 75, 100])


def test_shrinking_does_not_antialias():
    row = np.array([[[0], [200], [0], [0], [90], [0], [0], [0]]], np.uint8)
    # To 2 pixels: the new centres are at 2 and 6, between old pixels 1 and 2, and 5 and 6; nothing else counts.
    np.testing.assert_array_equal(resize_image(row, (1, 2))[0, :, 0], [(200 + 0) / 2, 0])


def test_resizing_keeps_one_channel_and_an_image_of_the_right_size():
    assert resize_image(PIXELS[..., :1], (3, 4)).shape == (3, 4, 1)
    assert resize_image(PIXELS, (13, 17)) is PIXELS
    np.testing.assert_array_equal(resize_image(PIXELS, (6, 9)), cv2.resize(PIXELS, (9, 6)))
