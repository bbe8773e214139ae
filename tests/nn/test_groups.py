import logging

import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.nn import groups
from tests.drawn import normal

B, T, D = 3, 5, 2


@pytest.mark.parametrize(
    ("group_size", "images_per_group", "expected"),
    [
        (None, 2, 10),
        (None, 8, 15),  # no larger than the batch
        (None, None, 15),
        (4, 2, 4),  # takes precedence
        (100, None, 15),
    ],
)
def test_length_of_a_group(group_size, images_per_group, expected):
    assert groups.group_length(B, T, group_size=group_size, images_per_group=images_per_group) == expected


def test_groups_follow_image_after_image_and_come_back():
    x, mask = normal(B, T, D), jnp.arange(B * T).reshape(B, T) != 6
    tokens, kept = groups.to_groups(x, mask, 5)
    np.testing.assert_array_equal(tokens, jnp.where(mask[..., None], x, 0))
    np.testing.assert_array_equal(kept, mask)
    tokens, kept = groups.to_groups(x, None, 5)
    assert kept is None
    np.testing.assert_array_equal(groups.from_groups(tokens, B, T), x)


def test_what_is_left_over_is_filled_with_masked_zeros():
    x, mask = normal(B, T, D), jnp.arange(B * T).reshape(B, T) != 6
    for given in (mask, None):
        tokens, kept = groups.to_groups(x, given, 4)
        assert tokens.shape == (4, 4, D)
        assert not np.asarray(tokens[3, 3]).any()
        expected = np.append(np.ones(15, bool) if given is None else mask.reshape(-1), False)
        np.testing.assert_array_equal(kept.reshape(-1), expected)
        expected = x if given is None else jnp.where(given[..., None], x, 0)
        np.testing.assert_array_equal(groups.from_groups(tokens, B, T), expected)


def test_padding_and_small_batches_are_said_once(caplog):
    groups.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="jmoe"):
        for _ in range(2):
            groups.to_groups(normal(B, T, D), None, 4)
            groups.group_length(B, T, group_size=16, images_per_group=None)
    assert [record.message for record in caplog.records] == [
        "Groups of 4 tokens do not divide the 15 tokens of a batch (B=3 images of T=5): "
        "1 tokens of padding are processed for nothing.",
        "A group of 16 tokens is larger than the batch (B=3 images of T=5): it is one group.",
    ]
