import numpy as np
import pytest
import scipy.ndimage

from jmoe.convert.positions import resize_positions, square_grid, zoom
from jmoe.errors import UserError


def normal(*shape, dtype=np.float32):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(dtype)


def test_zoom_by_hand():
    # 3 entries to 5: places 0, 0.5, 1, 1.5, 2. 3 entries to 2: the ends.
    np.testing.assert_array_equal(zoom(np.array([1.0, 3.0, 4.0]), (5,)), [1, 2, 3, 3.5, 4])
    np.testing.assert_array_equal(zoom(np.array([1.0, 3.0, 4.0]), (2,)), [1, 4])


@pytest.mark.parametrize("shape", [(6, 9, 4), (2, 3, 4), (3, 1, 7), (1, 1, 1), (3, 5, 4)])
def test_zoom_is_that_of_scipy_which_the_published_trainers_use(shape):
    x = normal(3, 5, 4)
    expected = scipy.ndimage.zoom(x, np.divide(shape, x.shape), order=1)
    np.testing.assert_allclose(zoom(x, shape), expected, rtol=1e-6, atol=1e-7)


def test_one_entry_becomes_many_of_the_same():
    np.testing.assert_array_equal(zoom(normal(1, 3), (4, 3)), np.repeat(normal(1, 3), 4, axis=0))


@pytest.mark.parametrize(("before", "after"), [(28, 14), (15, 26), (14, 24), (7, 12), (64, 63)])
def test_the_first_and_the_last_entry_stay_as_they_are(before, after):
    x = normal(before, 2)
    np.testing.assert_array_equal(zoom(x, (after, 2))[[0, -1]], x[[0, -1]])


def test_the_dtype_is_kept():
    assert zoom(normal(3, dtype=np.float16), (5,)).dtype == np.float16
    assert zoom(normal(3), (5,)).dtype == np.float32


def test_a_linear_field_stays_linear_on_a_grid_that_is_not_square():
    """Positions that are the coordinates themselves, from 0 to 1 along either side."""

    def coordinates(H, W):
        y, x = np.meshgrid(np.linspace(0, 1, H), np.linspace(0, 1, W), indexing="ij")
        return np.stack([y, x], axis=-1).reshape(1, H * W, 2)

    token = np.full((1, 1, 2), 7.0)
    source = np.concatenate([token, coordinates(3, 3)], axis=1)
    resized = resize_positions(source, (4, 6), class_token=np.zeros((1, 1, 2)))
    np.testing.assert_array_equal(resized[:, :1], token)  # the source's, not the one that was given
    np.testing.assert_allclose(resized[:, 1:], coordinates(4, 6), atol=1e-12)

    back = resize_positions(resized, (2, 5), class_token=None, source_grid=(4, 6))
    np.testing.assert_allclose(back, coordinates(2, 5), atol=1e-12)


def test_the_row_of_the_class_token_is_kept_dropped_or_begun():
    patches, token, given = normal(1, 4, 3), normal(1, 1, 3), normal(1, 1, 3) + 5
    both = np.concatenate([token, patches], axis=1)
    np.testing.assert_array_equal(resize_positions(both, (2, 2), class_token=given), both)
    np.testing.assert_array_equal(resize_positions(both, (2, 2), class_token=None), patches)
    np.testing.assert_array_equal(resize_positions(patches, (2, 2), class_token=given)[:, 0], given[:, 0])
    np.testing.assert_array_equal(resize_positions(patches, (2, 2), class_token=None), patches)


@pytest.mark.parametrize(("N", "expected"), [(1, (1, False)), (2, (1, True)), (196, (14, False)), (197, (14, True))])
def test_a_square_grid_is_told_by_its_number_of_positions(N, expected):
    assert square_grid(N) == expected


def test_a_table_that_is_no_grid_is_refused():
    with pytest.raises(UserError) as error:
        resize_positions(normal(1, 12, 3), (2, 2), class_token=None)
    assert str(error.value) == (
        "A table of 12 positions is no square grid, neither with a class token nor without (9 or 10 would be). "
        "Only a model's own config can tell the sides of another grid."
    )
    with pytest.raises(UserError, match=r"^A table of 12 positions is no grid of 5 by 2 patches, .* \(11 would be\) n"):
        resize_positions(normal(1, 12, 3), (2, 2), class_token=None, source_grid=(5, 2))
    with pytest.raises(UserError, match="A table of 0 positions is no square grid"):
        square_grid(0)
