"""What a configuration says about its batches, and which of them devices can divide."""

import dataclasses
import re

import pytest

from jmoe.errors import UserError
from jmoe.parallel import Mesh, build, topology_devices
from jmoe.train.compiled import check_batch, images_per_unit
from jmoe.train.overrides import apply_overrides
from tests.train.tiny import tiny_config


def config_of(*, batch_size=48, accumulate=1, **moe):
    """The tiny run, whose images have 5 tokens, with other groups."""
    tiny = tiny_config()
    assert tiny.model.moe is not None
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


@pytest.mark.parametrize(
    ("changes", "mesh", "sentence"),
    [
        (
            {"batch_size": 36, "images_per_group": 2},
            Mesh(),
            "36 images in groups of 2 cannot be divided among 8 devices of 2 processes (Mesh(data=1, expert=8)): use "
            "[data.batch_size=32].",  # 2 devices could, with a model=4 that 2 heads do not allow
        ),
        (
            {"batch_size": 24, "images_per_group": 2},
            Mesh(expert=2),
            "24 images in groups of 2 cannot be divided among 8 devices of 2 processes (Mesh(data=4, expert=2)): use "
            '[data.batch_size=32], or --set "[mesh=Mesh(data=1, expert=4, model=2)]".',
        ),
        (
            {"batch_size": 72, "accumulate": 3, "images_per_group": 2},
            Mesh(fsdp=2),
            "24 images (a part of accumulate=3) in groups of 2 cannot be divided among 8 devices of 2 processes "
            "(Mesh(data=1, expert=4, fsdp=2)): use [data.batch_size=96], or --set "
            '"[mesh=Mesh(data=1, expert=2, fsdp=2, model=2)]".',
        ),
        (
            {"images_per_group": None, "members": 2},
            Mesh(),
            "48 images in groups of 48 cannot be divided among 8 devices of 2 processes (Mesh(data=1, expert=8)): use "
            "[data.batch_size=48 with model.moe.images_per_group=12].",
        ),
        (
            {},
            Mesh(model=8),
            "model=8 does not divide the 2 heads of attention (Mesh(data=1, expert=1, model=8)): use "
            "Mesh(data=4, expert=1, model=2).",
        ),
        (
            {"batch_size": 128, "accumulate": 8},
            Mesh(),
            "16 images (a part of accumulate=8) in groups of 4 cannot be divided among 8 devices of 2 processes "
            '(Mesh(data=1, expert=8)): use [accumulate=4], or --set "[mesh=Mesh(data=1, expert=4, model=2)]".',
        ),
    ],
)
def test_what_cannot_be_divided_is_refused_with_what_can(changes, mesh, sentence):
    devices, config = topology_devices("v5e:2x4"), dataclasses.replace(config_of(**changes), mesh=mesh)

    def check(config):
        check_batch(config.data.batch_size // config.accumulate, config, build(config.mesh, devices, 8))

    with pytest.raises(UserError) as error:
        check(config)
    assert str(error.value) == re.sub(r"[\[\]]", "", sentence)
    advised = re.findall(r"\[(.*?)\]", sentence) or [f"mesh={sentence.split(': use ')[1].rstrip('.')}"]
    for advice in advised:
        check(apply_overrides(config, advice.split(" with ")))
