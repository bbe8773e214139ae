import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jmoe.train.array_files import ArrayFiles, to_arrays, written_by

STATE = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "none": np.zeros((0, 5), np.int8)}


@pytest.fixture
def written(tmp_path):
    """A folder with the arrays of a state that has a random key, and the description of its leaves."""
    files = ArrayFiles()
    arrays, leaves = to_arrays(jax.tree.map(jnp.asarray, STATE) | {"key": jax.random.key(7)})
    files.start_writing(tmp_path, arrays)
    files.finish_writing()
    files.join(tmp_path)
    yield files, tmp_path, leaves
    files.close()


def test_keys_are_written_as_integers_and_empty_arrays_not_at_all():
    arrays, leaves = to_arrays({"key": jax.random.key(7), "none": jnp.zeros((0, 5)), "w": jnp.ones(2)})
    assert {name: str(array.dtype) for name, array in arrays.items()} == {"key": "uint32", "w": "float32"}
    assert leaves["key"] == {"shape": [], "dtype": "key<fry>", "key": "threefry2x32"}
    assert leaves["none"] == {"shape": [0, 5], "dtype": "float32"}


def test_what_was_written_is_read(written):
    files, path, leaves = written
    wanted = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, STATE) | {"key": jax.random.key(0)})
    read = files.read(path, wanted, {name: leaf.get("key") for name, leaf in leaves.items()})
    for name, expected in STATE.items():
        assert read[name].dtype == expected.dtype
        np.testing.assert_array_equal(read[name], expected)
    np.testing.assert_array_equal(jax.random.key_data(read["key"]), jax.random.key_data(jax.random.key(7)))


@pytest.mark.parametrize("other", [((2, 3), jnp.bfloat16), ((3, 2), jnp.float32)])
def test_another_shape_or_dtype_is_not_taken_for_what_was_written(written, other):
    files, path, _ = written
    with pytest.raises(ValueError, match="was read where"):
        files.read(path, {"w": jax.ShapeDtypeStruct(*other)}, {})


def test_each_process_knows_the_files_it_has_written():
    names = [
        "state/_METADATA",
        "state/ocdbt.process_1/d/5f",
        "state/ocdbt.process_11/d/5f",
        "state/array_metadatas/process_1",
    ]
    assert written_by(1, names) == [names[1], names[3]]
    assert written_by(11, names) == [names[2]]
