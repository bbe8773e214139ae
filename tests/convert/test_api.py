import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from jmoe import convert
from jmoe.convert import vmoe_format
from jmoe.convert.names import flatten, nest, to_reference
from jmoe.errors import UserError

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"
SHARDED = GOLDENS / "checkpoint_params_sharded"


@pytest.fixture(scope="module")
def imported():
    return convert.load("vmoe", SHARDED)


def sentence(format, path):
    with pytest.raises(UserError) as error:
        convert.load(format, path)
    return str(error.value).replace(f"{pathlib.Path(path).parent}/", "")


def test_a_published_checkpoint_comes_with_its_model_and_what_was_read(imported):
    config = imported.config
    assert (config.patch_size, config.width, config.depth, config.hidden_dim, config.num_heads) == (4, 16, 4, 32, 4)
    assert (config.num_classes, config.image_size, config.pool) == (10, (16, 16), "token")
    assert (config.moe.num_experts, config.moe.layers, config.moe.router.k) == (8, (1, 3), 2)
    row = next(row for row in imported.parameters if row.name == "blocks/1/moe/experts/w_in")
    assert row.source == "Encoder/encoderblock_1/Moe/Mlp/Dense_0/kernel"
    assert (row.shape, row.dtype) == ((8, 16, 32), "float32")
    assert [row.name for row in imported.parameters] == list(imported.params)


def test_it_goes_out_and_comes_in_bit_for_bit(imported, tmp_path):
    convert.save("vmoe", tmp_path / "x", imported.config, imported.params, num_shards=3)
    for path in GOLDENS.glob("checkpoint_params_3shards.*-*"):  # the same arrays, as the reference wrote them
        assert (tmp_path / path.name.replace("checkpoint_params_3shards", "x")).read_bytes() == path.read_bytes()
    convert.save("safetensors", tmp_path / "y", imported.config, nest(imported.params), notes={"a": "b"})
    for format, path in (("vmoe", tmp_path / "x"), ("safetensors", tmp_path / "y")):
        again = convert.load(format, path)
        assert again.config == imported.config
        assert again.params.keys() == imported.params.keys()
        assert all(again.params[name].tobytes() == imported.params[name].tobytes() for name in again.params)
    assert again.notes == {"a": "b"}


def test_a_tree_below_params_is_the_same_checkpoint(imported, tmp_path):
    vmoe_format.write(tmp_path / "x", {"params": vmoe_format.read(SHARDED)})
    assert convert.load("vmoe", tmp_path / "x").config == imported.config
    vmoe_format.write(tmp_path / "y", {"params": vmoe_format.read(SHARDED), "step": np.int32(7)})
    assert sentence("vmoe", tmp_path / "y").endswith("no parameters of a vision transformer of jmoe: 'step'.")
    vmoe_format.write(tmp_path / "z", {"params": {"cls": np.ones(2, np.float32)}, "cls": np.zeros(2, np.float32)})
    assert sentence("vmoe", tmp_path / "z").endswith("z has arrays under two names each, with and without 'params/'.")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_widened_exactly(imported, tmp_path, dtype):
    halved = {name: jnp.asarray(array, dtype) for name, array in to_reference(imported.params).items()}
    vmoe_format.write(tmp_path / "x", nest(halved))
    found = convert.load("vmoe", tmp_path / "x")
    assert {row.dtype for row in found.parameters} == {dtype}
    for row in found.parameters:
        assert found.params[row.name].dtype == np.float32
        np.testing.assert_array_equal(found.params[row.name], np.asarray(halved[row.source], np.float32))


@pytest.mark.parametrize(
    ("name", "array", "expected"),
    [
        (
            "head/bias",
            np.zeros(10, np.int32),
            "has int32 at 'head/bias'; a parameter is float32, or bfloat16 or float16 to",
        ),
        ("head/bias", np.zeros(10), "has float64 at 'head/bias'; a parameter is float32"),
        (
            "head/bias",
            np.zeros(9, np.float32),
            "does not fit the model: 'head/bias' is (9,) there and (10,) in the model.",
        ),
        ("opt/step", np.zeros(1), "has arrays that are no parameters of a vision transformer of jmoe: 'opt/step'."),
        ("cls", None, "has 17 positions, which are no square grid with pool='mean'."),
        ("Encoder/encoder_norm/bias", None, "does not fit the model: it lacks 'norm/bias'."),
    ],
)
def test_an_array_that_is_wrong_is_named(tmp_path, name, array, expected):
    arrays = flatten(vmoe_format.read(SHARDED)) | {name: array}
    vmoe_format.write(tmp_path / "x", nest({n: a for n, a in arrays.items() if a is not None}))
    assert expected in sentence("vmoe", tmp_path / "x")


def test_an_array_without_elements_is_named(tmp_path):
    np.savez(tmp_path / "x.npz", cls=np.zeros((1, 1, 0), np.float32))
    assert sentence("vit", tmp_path / "x.npz") == "x.npz has no elements in 'cls', whose shape is (1, 1, 0)."
    np.savez(tmp_path / "x.npz")
    assert sentence("vit", tmp_path / "x.npz").endswith("x.npz has no arrays.")


def test_an_original_vit_is_read(tmp_path):
    with np.load(GOLDENS / "init_upcycle_vit_to_vmoe.npz", allow_pickle=False) as golden:
        arrays = {name.removeprefix("source/"): golden[name] for name in golden.files if name.startswith("source/")}
    np.savez(tmp_path / "vit.npz", **arrays)
    found = convert.load("vit", tmp_path / "vit.npz")
    assert found.config.moe is None
    assert (found.config.depth, found.config.hidden_dim, found.config.num_heads, found.config.num_classes) == (
        2,
        24,
        2,
        6,
    )
    assert found.assumed == {}
    name = "Transformer/encoderblock_1/MlpBlock_3/Dense_0/kernel"
    np.testing.assert_array_equal(found.params["blocks/1/mlp/w_in"], arrays[name])


def test_a_format_that_is_not_known_is_refused(imported, tmp_path):
    assert sentence("vmo", "x") == (
        "There is no format 'vmo' to read. Did you mean 'vmoe'? The formats are: vmoe, vit, safetensors."
    )
    with pytest.raises(UserError, match="There is no format 'vit' to write. The formats are: vmoe, safetensors."):
        convert.save("vit", tmp_path / "x", imported.config, imported.params)


def test_only_the_parameters_of_the_model_are_written(imported, tmp_path):
    other = dataclasses.replace(imported.config, moe=dataclasses.replace(imported.config.moe, num_experts=4))
    for format in ("vmoe", "safetensors"):
        with pytest.raises(UserError, match="^What is to be written has 8 experts at .*; the model has num_experts=4"):
            convert.save(format, tmp_path / "x", other, imported.params)
    with pytest.raises(UserError, match="cannot be spread over num_shards=2"):
        convert.save("safetensors", tmp_path / "x", imported.config, imported.params, num_shards=2)
    assert list(tmp_path.iterdir()) == []
