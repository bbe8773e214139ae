import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest

from jmoe.errors import UserError
from jmoe.parallel import compile_for_chip, topology_devices
from jmoe.parallel.topology import GENERATIONS, ONE_CHIP, _offered, nearest_topology


@pytest.mark.parametrize(("topology", "chips"), [("v5e:4x4", 16), ("v5p:2x2x2", 8), ("v4:2x2x1", 4), ("v6e:1x1", 1)])
def test_a_topology_has_its_chips(topology, chips):
    devices = topology_devices(topology)
    assert len(devices) == chips
    assert {device.platform for device in devices} == {"tpu"}


@pytest.mark.parametrize(
    ("topology", "sentence"),
    [
        ("v5e", r"There is no TPU topology 'v5e': slices of v5e are 1x1, .*\. The nearest is v5e:1x1\."),
        ("V5E:4X4", r"There is no TPU topology 'V5E:4X4': .* The nearest is v5e:4x4\."),
        ("v5litepod-16", r"The nearest is v5e:4x4\."),
        ("v5e:4", r"The nearest is v5e:2x2\."),
        ("v5p-128", r"The nearest is v5p:4x4x8\."),
        (f"v5e:{'9' * 5000}", "There is no TPU topology 'v5e:9+'; use one of"),
        ("h100:8", "There is no TPU topology 'h100:8'; use one of"),
        (
            "v5e:3x3",
            "There is no TPU topology 'v5e:3x3': slices of v5e are 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16. "
            r"The nearest is v5e:4x4\.",
        ),
        (
            "v5p:6x6x2",
            "There is no TPU topology 'v5p:6x6x2': slices of v5p are 2x2x1, 2x2x2, 2x2x4, 2x4x4, or multiples of 4 "
            r"chips in three directions, the shortest first, up to 16x20x28\. The nearest is v5p:2x4x4\.",
        ),
        ("v5e:6x6", r"The nearest is v5e:8x8\."),
        ("v5e:3x5", r"The nearest is v5e:4x4\."),
        ("v6e:4x2", r"The nearest is v6e:2x4\."),
        ("v5e:32x8", r"The nearest is v5e:8x16\."),
        ("v5e:2x2x2", r"The nearest is v5e:2x4\."),
        ("v6e:1x2", r"The nearest is v6e:2x2\."),
        ("v5p:3x2x0", r"The nearest is v5p:2x2x1\."),
        ("v5p:8x8", r"The nearest is v5p:2x4x4\."),
        ("v5p:1x1x1", r"The nearest is v5p:2x2x1\."),
        ("v4:8x4x4", r"The nearest is v4:4x4x8\."),
        ("v5p:64x16x16", r"The nearest is v5p:16x16x28\."),
    ],
)
def test_one_that_does_not_exist_is_refused(topology, sentence):
    with pytest.raises(UserError, match=sentence):
        topology_devices(topology)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_slice_that_is_offered_is_its_own_nearest(generation):
    offered = _offered(generation)
    for sizes in offered:
        name = f"{generation}:{'x'.join(map(str, sizes))}"
        assert nearest_topology(name) == name
    assert len(offered) == {"v4": 4 + 20, "v5p": 4 + 25 + 18 + 12 + 7, "v5e": 8, "v6e": 8}[generation]


@pytest.mark.parametrize("topology", ["v5e:8x16", "v6e:16x16", "v4:2x4x4", "v5p:4x8x12"])
def test_the_compiler_knows_what_is_offered(topology):
    chips = [int(size) for size in topology.partition(":")[2].split("x")]
    assert len(topology_devices(topology)) == math.prod(chips)


def test_without_libtpu_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs its compiler, libtpu: pip install 'jmoe\[plan\]'\."):
        topology_devices.__wrapped__("v5e:2x2")


@pytest.mark.parametrize("generation", ONE_CHIP)
def test_a_program_compiles_for_one_chip(generation):
    x = jax.ShapeDtypeStruct((128, 256), jnp.bfloat16)
    compiled = compile_for_chip(generation, lambda x: x @ x.T, x)
    assert compiled.cost_analysis()["flops"] == 2 * 128 * 128 * 256


def test_an_unknown_generation_is_refused():
    with pytest.raises(
        UserError, match=r"There is no TPU generation 'v3' to compile for; use one of v4, v5e, v5p, v6e"
    ):
        compile_for_chip("v3", lambda x: x, jax.ShapeDtypeStruct((8, 128), jnp.float32))
