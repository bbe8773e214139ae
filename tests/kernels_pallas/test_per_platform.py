"""Which implementation runs is decided when a program is lowered, for the platform that it is lowered for."""

import logging
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import combine_rows, gather_rows, implementations, obstacles, per_platform, target
from kernels_pallas.per_platform import PerPlatform
from tests.aot import compile_for

shape = jax.ShapeDtypeStruct


@pytest.fixture
def doubled():
    """A function with a kernel for each platform; every implementation multiplies by another number."""
    modules = {}
    for platform, factor in (("tpu", 3.0), ("gpu", 5.0)):
        name = f"kernel_of_a_test_{platform}"
        module = types.ModuleType(name)
        module.doubled = lambda x, interpret, factor=factor: (factor * x,)
        module.refusal = lambda x: None if x.ndim == 1 else f"It takes one axis, not {x.ndim}."
        sys.modules[name] = module
        modules[platform] = name
    yield PerPlatform("doubled", xla=lambda x: (2.0 * x,), kernels=modules, preferred=("tpu",))
    for name in modules.values():
        del sys.modules[name]


@pytest.fixture
def said(monkeypatch, caplog):
    """What was logged about choices; each is logged once."""
    monkeypatch.setattr(per_platform, "_said", set())
    caplog.set_level(logging.INFO, "kernels_pallas")
    return caplog


def lowered_for(platform, function, *shapes):
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(
    ("platform", "implementation", "factor"),
    [
        ("cpu", None, 2),
        ("tpu", None, 3),
        ("cuda", None, 2),  # not preferred there
        ("cuda", "pallas", 5),
        ("tpu", "pallas", 3),
        ("tpu", "xla", 2),
        ("rocm", None, 2),
    ],
)
def test_the_platform_that_is_compiled_for_decides(doubled, platform, implementation, factor):
    text = lowered_for(platform, lambda x: doubled(x, implementation=implementation), shape((3,), jnp.float32))
    assert f"dense<{factor}.0" in text


def test_what_was_chosen_is_logged_once(doubled, said):
    for _ in range(2):
        doubled(jnp.ones(3))
    lowered_for("tpu", doubled, shape((3,), jnp.float32))
    lowered_for("tpu", doubled, shape((3, 2), jnp.float32))
    assert said.messages == [
        "doubled runs as 'xla' here.",
        "doubled runs as 'pallas' on tpu.",
        "doubled runs as 'xla' on tpu: It takes one axis, not 2.",
    ]


def test_a_kernel_that_is_named_and_cannot_run_says_why(doubled):
    with pytest.raises(NotImplementedError) as error:
        doubled(jnp.ones(3), implementation="pallas")
    reason = "Pallas kernels are for TPU and CUDA devices."
    assert str(error.value) == f"doubled cannot run as 'pallas' here: {reason} Use 'xla', or None."
    with pytest.raises(NotImplementedError, match=r"doubled cannot run as 'pallas': It takes one axis, not 2\."):
        doubled(jnp.ones((3, 2)), implementation="pallas")


def test_a_kernel_that_cannot_be_imported_is_an_error_only_if_named(said):
    broken = {"tpu": "kernels_pallas.rows.no_such_module"}
    op = PerPlatform("broken", xla=lambda x: (2.0 * x,), kernels=broken, preferred=("tpu",))
    assert "dense<2.0" in lowered_for("tpu", op, shape((3,), jnp.float32))
    reason = "The kernel for tpu cannot be imported: No module named 'kernels_pallas.rows.no_such_module'."
    assert said.messages == [f"broken runs as 'xla' on tpu: {reason}"]
    with pytest.raises(NotImplementedError) as error:
        op(jnp.ones(3), implementation="pallas")
    assert str(error.value) == f"broken cannot run as 'pallas': {reason}"


def test_an_old_chip_is_refused(doubled, monkeypatch):
    monkeypatch.setattr(target, "device_kind", lambda platform: "TPU v3" if platform == "tpu" else None)
    assert doubled.unavailable("tpu") == "The kernels are for TPU v4 and newer, and this is a TPU v3."
    assert "dense<2.0" in lowered_for("tpu", doubled, shape((3,), jnp.float32))
    monkeypatch.setattr(target, "compute_capability", lambda: 7.5)
    assert doubled.unavailable("cuda") == "The kernels want a GPU of compute capability 8.0 or more; this one has 7.5."


def test_under_vmap_a_kernel_runs_for_one_after_the_other_and_xla_at_once(doubled):
    x = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(jax.vmap(lambda x: doubled(x)[0])(x), 2 * x)
    np.testing.assert_array_equal(jax.vmap(jax.vmap(lambda x: doubled(x)[0]))(x[None]), 2 * x[None])
    assert "stablehlo.while" not in lowered_for("cpu", jax.vmap(doubled), shape((2, 3), jnp.float32))
    mapped = lowered_for("tpu", jax.vmap(doubled), shape((2, 3), jnp.float32))
    assert "stablehlo.while" in mapped
    assert "dense<3.0" in mapped


def test_in_a_shard_map_it_varies_as_its_inputs_do(doubled):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    spec = jax.sharding.PartitionSpec("x")

    def body(x):
        (y,) = doubled(x)
        assert jax.typeof(y).manual_axis_type.varying == {"x"}
        return y

    run = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec)
    np.testing.assert_array_equal(run(jnp.ones(4)), 2 * jnp.ones(4))


def test_the_chip_that_is_compiled_for_is_known_by_its_mesh():
    seen = []

    def look(x):
        seen.append(target.chip())
        return x

    for chip in ("v4", "v5e"):
        compile_for(chip, look, shape((8, 128), jnp.float32))
    assert [(chip.cores, chip.vector_memory // 2**20) for chip in seen] == [(2, 16), (1, 128)]
    assert target.chip() == target.UNKNOWN  # of this machine, which has none


def test_what_exists_where_is_listed_default_first():
    assert implementations("cpu")["gather_rows"] == ("xla", "reference")
    assert implementations("tpu")["gather_rows"] == ("pallas", "xla", "reference")
    assert implementations("tpu")["combine_rows"] == ("pallas", "xla", "reference")
    assert set(obstacles("cpu").values()) == {"Pallas kernels are for TPU and CUDA devices."}
    assert obstacles("tpu")["gather_rows"] is None


def test_ops_named_pallas_on_a_processor_say_why_not():
    x, slots, choice = jnp.ones((2, 128)), jnp.zeros((2, 1), jnp.int32), jnp.zeros(1, jnp.int32)
    for call in (
        lambda: gather_rows(x, slots, choice, implementation="pallas"),
        lambda: combine_rows(x[:1], slots, jnp.ones((2, 1)), choice, implementation="pallas"),
    ):
        with pytest.raises(NotImplementedError, match=r"gather_sum .* cannot run as 'pallas' here: Pallas kernels are"):
            call()
