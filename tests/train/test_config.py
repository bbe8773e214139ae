"""What a configuration says about its batches, and which of them devices can divide."""

import dataclasses

import pytest

from jmoe.parallel import Mesh, build, topology_devices
from jmoe.train.compiled import check_batch, images_per_unit
from tests.train.tiny import tiny_config


def config_of(*, batch_size=48, accumulate=1, **moe):
    """The tiny run, whose images have 5 tokens, with other groups."""
    tiny = tiny_config()
    model = dataclasses.replace(tiny.model, moe=dataclasses.replace(tiny.model.moe, num_experts=8, **moe))
    data = dataclasses.replace(tiny.data, batch_size=batch_size)
    return dataclasses.replace(tiny, model=model, data=data, accumulate=accumulate)


@pytest.mark.parametrize(
    ("moe", "images"),
    [
        ({"images_per_group": 8}, 8),
        ({"images_per_group": 8, "members": 2}, 4),  # 4 images, 2 copies of each
        ({"images_per_group": 2, "members": 4}, 1),  # the copies of an image stay on one device
        ({"images_per_group": 6, "members": 4}, 3),  # 12 copies, two groups
        ({"group_size": 6}, 6),  # 6 images have the 30 tokens of 5 groups
        ({"group_size": 6, "members": 2}, 3),
        ({"group_size": 10, "members": 2}, 1),
        ({"images_per_group": None, "members": 2}, 48),
    ],
)
def test_a_group_counts_the_copies_of_an_ensemble(moe, images):
    assert images_per_unit(config_of(**moe)) == images


def test_devices_divide_an_ensemble_by_its_copies():
    mesh = build(Mesh(), topology_devices("v5e:2x2"), 8)
    config = config_of(batch_size=16, images_per_group=8, members=2)
    check_batch(16, config, mesh)  # 32 copies, a group of 8 on each of 4 devices


def test_a_group_may_hold_as_many_copies_as_the_batch_has():
    config_of(batch_size=4, images_per_group=8, members=2)
    config_of(batch_size=4, group_size=40, members=2)
    with pytest.raises(
        ValueError,
        match="a group of 8 images is larger than the batch: 3 images of 5 tokens, 2 copies of each, are routed at "
        "once. Use groups of at most 6 images, 30 tokens, or",
    ):
        config_of(batch_size=3, images_per_group=8, members=2)
