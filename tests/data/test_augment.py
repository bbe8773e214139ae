import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jmoe.data import InceptionCrop, RandomCrop, RandomFlip, Shift
from jmoe.data.decode import resize_image
from jmoe.errors import UserError

IMAGE = np.arange(1, 1 + 5 * 7 * 2, dtype=np.uint8).reshape(5, 7, 2)  # every pixel differs, and from 0
seeds = st.integers(0, 2**32)


def shifted(image, dy, dx, fill):
    """Pixel by pixel: what was at (y, x) is at (y - dy, x - dx)."""
    H, W = image.shape[:2]
    out = np.full_like(image, fill)
    for y in range(H):
        for x in range(W):
            if 0 <= y + dy < H and 0 <= x + dx < W:
                out[y, x] = image[y + dy, x + dx]
    return out


@settings(deadline=None, max_examples=50, derandomize=True)
@given(seed=seeds, pixels=st.integers(0, 9), fill=st.integers(0, 255))
def test_a_shift_is_one_of_the_shifts_within_its_range(seed, pixels, fill):
    image = Shift(pixels, fill)(IMAGE, np.random.default_rng(seed))
    reach = range(-pixels, pixels + 1)
    assert any((image == shifted(IMAGE, dy, dx, fill)).all() for dy in reach for dx in reach)


def test_all_shifts_are_equally_likely():
    rng = np.random.default_rng(0)
    counts = collections.Counter(Shift(1)(IMAGE, rng).tobytes() for _ in range(9000))
    expected = {shifted(IMAGE, dy, dx, 0).tobytes() for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    assert set(counts) == expected
    assert all(abs(count - 1000) < 5 * 30 for count in counts.values())  # 5 standard deviations of a binomial


def test_a_flip_mirrors_half_of_the_images():
    rng = np.random.default_rng(0)
    mirrored = IMAGE[:, ::-1]
    flipped = [(RandomFlip()(IMAGE, rng) == mirrored).all() for _ in range(1000)]
    assert 420 < sum(flipped) < 580
    kept = next(image for image in (RandomFlip()(IMAGE, rng) for _ in range(100)) if not (image == mirrored).all())
    np.testing.assert_array_equal(kept, IMAGE)


def test_a_crop_is_every_window_of_the_padded_image():
    padded = np.pad(IMAGE, ((2, 2), (2, 2), (0, 0)))
    windows = {padded[y : y + 6, x : x + 4].tobytes() for y in range(9 - 6 + 1) for x in range(11 - 4 + 1)}
    rng = np.random.default_rng(0)
    crops = [RandomCrop((6, 4), padding=2)(IMAGE, rng) for _ in range(1000)]
    assert {crop.shape for crop in crops} == {(6, 4, 2)}
    assert {crop.tobytes() for crop in crops} == windows


def test_a_crop_larger_than_the_padded_image_is_refused():
    with pytest.raises(UserError, match="cannot cut 8 x 8 pixels from an image of 5 x 7: choose a smaller size"):
        RandomCrop(8, padding=1)(IMAGE, np.random.default_rng(0))


@settings(deadline=None, max_examples=100, derandomize=True)
@given(seed=seeds, height=st.integers(1, 300), width=st.integers(1, 300), least=st.floats(0.01, 0.5))
def test_an_inception_window_lies_in_the_image_and_has_the_area_asked_for(seed, height, width, least):
    crop = InceptionCrop(4, area=(least, 1.0))
    top, left, h, w = crop._draw(height, width, np.random.default_rng(seed))
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert h * w >= least * height * width
    if (h, w) != (height, width) and h > 20:  # where rounding is small; the whole image is what failing gives
        assert 0.72 < w / h < 1.37


def test_an_inception_crop_is_its_window_resized():
    image = np.random.default_rng(1).integers(0, 256, (61, 47, 3), np.uint8)
    crop = InceptionCrop((8, 9), area=(0.1, 0.9))
    top, left, h, w = crop._draw(61, 47, np.random.default_rng(5))
    expected = resize_image(np.ascontiguousarray(image[top : top + h, left : left + w]), (8, 9))
    np.testing.assert_array_equal(crop(image, np.random.default_rng(5)), expected)


def test_inception_windows_reach_everywhere_in_all_sizes():
    rng = np.random.default_rng(0)
    windows = np.array([InceptionCrop(4)._draw(100, 100, rng) for _ in range(2000)])
    area = windows[:, 2] * windows[:, 3] / 1e4
    assert area.min() < 0.07
    assert area.max() > 0.9
    assert windows[:, 0].max() > 60
    assert windows[:, 1].max() > 60
    assert windows[:, :2].min() == 0


def test_an_impossible_area_is_refused():
    with pytest.raises(UserError, match=r"where 0 < smallest < largest <= 1, not \(0.5, 0.1\)"):
        InceptionCrop(4, area=(0.5, 0.1))
