"""The mesh that an experiment asks for, and what the devices make of it."""

import functools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import topologies

from jmoe.errors import UserError
from jmoe.parallel.mesh import AXES, Mesh, batch_parts, build, of, possible, resolve
from jmoe.parallel.topology import topology_devices


@pytest.mark.parametrize(
    ("mesh", "devices", "experts", "expected"),
    [
        (Mesh(), 1, 8, Mesh(data=1, expert=1)),
        (Mesh(), 8, 8, Mesh(data=1, expert=8)),
        (Mesh(), 6, 8, Mesh(data=3, expert=2)),
        (Mesh(), 256, 32, Mesh(data=8, expert=32)),
        (Mesh(), 8, None, Mesh(data=8, expert=1)),
        (Mesh(data=4), 8, 8, Mesh(data=4, expert=2)),
        (Mesh(fsdp=4), 8, 8, Mesh(data=1, expert=2, fsdp=4)),
        (Mesh(fsdp=2, model=2), 8, 32, Mesh(data=1, expert=2, fsdp=2, model=2)),
        (Mesh(expert=2), 8, 8, Mesh(data=4, expert=2)),
        (Mesh(data=2, expert=2, model=2), 8, 8, Mesh(data=2, expert=2, model=2)),
    ],
)
def test_experts_take_as_many_devices_as_divide_them_and_images_the_rest(mesh, devices, experts, expected):
    assert resolve(mesh, devices, experts) == expected


@given(devices=st.integers(1, 64), experts=st.sampled_from([None, 1, 6, 8, 32]))
def test_every_number_of_devices_has_a_mesh(devices, experts):
    mesh = resolve(Mesh(), devices, experts)
    assert math.prod(getattr(mesh, name) for name in AXES) == devices
    assert (experts or 1) % mesh.expert == 0
    assert mesh in list(possible(devices, experts))


@pytest.mark.parametrize(
    ("mesh", "devices", "experts", "sentence"),
    [
        (
            Mesh(data=2, expert=3),
            8,
            8,
            r"Mesh\(data=2, expert=3\) divides the experts by 3, which num_experts=8 does not",
        ),
        (Mesh(expert=2), 8, None, r"which a model without experts does not allow: use Mesh\(data=8, expert=1\)"),
        (
            Mesh(data=2, expert=2),
            8,
            8,
            r"is for 4 devices; there are 8: use Mesh\(data=4, expert=2\), or leave data and",
        ),
        (
            Mesh(data=2),
            32,
            8,
            r"Mesh\(data=2\) leaves 16 of 32 devices to the experts, and num_experts=8 can be divided by 8 at most: "
            r"use Mesh\(data=4, expert=8\)",
        ),
        (
            Mesh(data=2),
            4,
            None,
            r"leaves 2 of 4 devices to the experts, and the model has no experts: use Mesh\(data=4,",
        ),
        (Mesh(data=16, expert=1), 1, 8, r"is for 16 devices; there is 1: use Mesh\(data=1, expert=1\)"),
        (Mesh(fsdp=3), 8, 8, r"Mesh\(fsdp=3\) is for a multiple of 3 devices; there are 8: use Mesh\(.*fsdp=4\)"),
        (Mesh(data=3, model=2), 8, 8, r"is for a multiple of 6 devices; there are 8: use Mesh\(data=.*model=2\)"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_the_nearest_that_does(mesh, devices, experts, sentence):
    with pytest.raises(UserError, match=sentence):
        resolve(mesh, devices, experts)


@functools.cache
def two_slices():
    """The 32 devices of two slices of v5e:4x4."""
    topology_devices("v5e:4x4")  # sets what libtpu needs
    described = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4", num_slices=2)
    assert {device.slice_index for device in described.devices} == {0, 1}
    return list(described.devices)


@pytest.mark.parametrize(
    ("mesh", "experts", "expected"),
    [
        (Mesh(), 32, Mesh(data=2, expert=16)),  # not 32, of which some would be in the other slice
        (Mesh(), None, Mesh(data=32, expert=1)),
        (Mesh(fsdp=2, model=2), 8, Mesh(data=2, expert=4, fsdp=2, model=2)),
        (Mesh(expert=2), 32, Mesh(data=16, expert=2)),
    ],
)
def test_only_data_goes_from_slice_to_slice(mesh, experts, expected):
    built = build(mesh, two_slices()[::-1], experts)
    assert of(built) == expected
    assert len({device.id for device in built.devices.flat}) == 32
    for number, part in enumerate(np.split(built.devices, 2)):
        assert {device.slice_index for device in part.flat} == {number}


@pytest.mark.parametrize(
    ("mesh", "sentence"),
    [
        (
            Mesh(expert=32),
            r"Mesh\(expert=32\) makes data=1 of 2 slices, and data must be a multiple of them, because only gradients "
            r"go from slice to slice: use Mesh\(data=2, expert=16\), or leave data and expert out",
        ),
        (Mesh(fsdp=32), r"Mesh\(fsdp=32\) makes data=1 of 2 slices.*: use Mesh\(data=2, expert=1, fsdp=16\)\.$"),
        (Mesh(data=3), r"Mesh\(data=3\) is for a multiple of 3 devices; there are 32: use Mesh\(data=4, expert=8\)"),
    ],
)
def test_a_mesh_that_slices_do_not_divide_is_refused_with_the_nearest_that_can_be(mesh, sentence):
    with pytest.raises(UserError, match=sentence):
        build(mesh, two_slices(), 32)


def test_slices_are_of_one_size():
    with pytest.raises(UserError, match="slices of one size; there are some of 14 and some of 16 chips"):
        build(Mesh(), two_slices()[2:], 32)


def test_what_the_experiment_cannot_take_is_not_recommended():
    with pytest.raises(UserError, match=r"there are 8: use Mesh\(data=1, expert=1, model=8\)\."):
        resolve(Mesh(model=7), 8, 8)
    with pytest.raises(UserError, match=r"there are 8: use Mesh\(data=2, expert=1, model=4\), or leave"):
        resolve(Mesh(data=1, expert=1, model=7), 8, 8, accepts=lambda mesh: 4 % mesh.model == 0)
    with pytest.raises(UserError, match=r"there are 8: use Mesh\(data=1, expert=1, model=8\)"):  # if all are refused
        resolve(Mesh(model=7), 8, 8, accepts=lambda mesh: False)


def test_a_mesh_counts_from_one():
    with pytest.raises(ValueError, match="Mesh wants fsdp of at least 1; it got 0"):
        Mesh(fsdp=0)


def test_devices_of_a_slice_are_laid_out_along_the_axes():
    mesh = build(Mesh(expert=4, model=2), topology_devices("v5e:4x4"), 32)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "expert": 4, "model": 2}
    assert batch_parts(mesh) == 8
    assert of(mesh) == Mesh(data=2, expert=4, model=2)
    assert len({device.id for device in mesh.devices.flat}) == 16
    for pair in mesh.devices.reshape(8, 2):  # model is innermost: neighbours on the torus
        (a, b) = (device.coords for device in pair)
        assert sum(abs(i - j) for i, j in zip(a, b, strict=True)) == 1


@pytest.mark.parametrize(
    ("topology", "experts", "block"),
    [
        ("v5e:16x16", 8, (2, 4, 1)),  # a row of 8 would take twice as long
        ("v5e:16x16", 32, (16, 2, 1)),  # as long as 8 by 4, for 16 go around
        ("v5p:8x8x8", 8, (2, 2, 2)),
        ("v5p:8x8x8", 32, (8, 4, 1)),  # as long as 4 by 4 by 2
        ("v6e:16x16", 16, (4, 4, 1)),
    ],
)
def test_devices_that_exchange_tokens_are_a_block_of_the_torus(topology, experts, block):
    mesh = build(Mesh(), topology_devices(topology), experts)
    assert len({device.id for device in mesh.devices.flat}) == mesh.size
    blocks = set()
    for exchanging in mesh.devices.reshape(-1, experts):
        places = np.array([device.coords for device in exchanging])
        sides = tuple(len(set(column)) for column in places.T)
        assert sides == tuple(places.max(axis=0) - places.min(axis=0) + 1)  # without gaps
        blocks.add(sides)
    assert blocks == {block}


@given(expert=st.sampled_from([1, 2, 4, 8]), fsdp=st.sampled_from([1, 2, 4]), model=st.sampled_from([1, 2]))
def test_every_layout_has_every_device_once(expert, fsdp, model):
    for topology in ("v5e:8x8", "v5p:4x4x4"):
        mesh = build(Mesh(expert=expert, fsdp=fsdp, model=model), topology_devices(topology), 8)
        assert len({device.id for device in mesh.devices.flat}) == 64
        assert of(mesh) == Mesh(data=64 // (expert * fsdp * model), expert=expert, fsdp=fsdp, model=model)
