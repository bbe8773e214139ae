import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jmoe.convert.safetensors_format import read, write
from jmoe.errors import UserError

ARRAYS = {
    "blocks/0/norm_1/scale": np.arange(5, dtype=np.float32),
    "head/kernel": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
    "gate/scale": np.array(2.5, np.float32),
    "half": np.asarray(jnp.arange(3, dtype=jnp.bfloat16)),
}
NOTES = {"model": '{"width": 8}'}


@pytest.fixture
def file(tmp_path):
    write(tmp_path / "x.safetensors", ARRAYS, notes=NOTES)
    return tmp_path / "x.safetensors"


def sentence(path):
    with pytest.raises(UserError) as error:
        read(path)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{path.parent}/", "")


def test_what_was_written_is_read(file):
    arrays, notes = read(file)
    assert arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        assert arrays[name].shape == array.shape
        assert arrays[name].tobytes() == array.tobytes()
    assert notes == NOTES


def test_other_programs_read_it(file):
    found = safetensors.numpy.load_file(file)
    np.testing.assert_array_equal(found["head/kernel"], ARRAYS["head/kernel"])


def test_what_another_program_wrote_is_read_without_notes(tmp_path):
    safetensors.numpy.save_file({"a": np.ones((2, 3), np.float16)}, tmp_path / "y", metadata={"format": "pt"})
    arrays, notes = read(tmp_path / "y")
    assert arrays["a"].dtype == np.float16
    assert notes == {}


def test_nothing_is_replaced_unless_asked_for(file):
    with pytest.raises(UserError, match="There is a file .*x.safetensors already"):
        write(file, ARRAYS)
    write(file, {"a": np.ones(2)}, overwrite=True)
    assert list(read(file)[0]) == ["a"]
    assert [path.name for path in file.parent.iterdir()] == ["x.safetensors"]


def test_what_cannot_be_written_says_why(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="x.safetensors cannot be written: "):
        write(tmp_path / "file" / "x.safetensors", ARRAYS)


def test_what_is_no_such_file_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "x"
    assert sentence(path) == "There is no file x."
    for content in (b"", b"\x80\x04K\x01.", b"\xff" * 30, b"\x02" + bytes(7) + b"{}" + b"more"):
        path.write_bytes(content)
        assert sentence(path).startswith("x is damaged, or no .safetensors file: ")


def test_another_value_of_an_array_is_found_by_name(file):
    content = bytearray(file.read_bytes())
    position = content.index(np.arange(5, dtype=np.float32).tobytes())
    content[position] ^= 1
    file.write_bytes(content)
    assert sentence(file) == (
        "x.safetensors is damaged: 'blocks/0/norm_1/scale' is not what was written (its checksum differs)."
    )


def test_another_header_is_found(file, tmp_path):
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["renamed"] = header.pop("half")
    text = json.dumps(header).encode()
    (tmp_path / "y").write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])
    assert "is not what was written" in sentence(tmp_path / "y")


def test_no_damage_goes_unnoticed(file):
    rng, content, refused = np.random.default_rng(4), file.read_bytes(), 0
    for _ in range(400):
        damaged, position = bytearray(content), int(rng.integers(len(content)))
        if rng.integers(4):
            damaged[position] ^= 1 << int(rng.integers(8))
        else:
            del damaged[position:]
        file.write_bytes(damaged)
        try:
            arrays, notes = read(file)
        except UserError as error:
            assert str(file) in str(error)  # noqa: PT017  # that it is refused is not what is claimed
            refused += 1
            continue
        # The key of the checksums itself may be hit: then it is a file of another program, with the same header.
        assert {name: array.tobytes() for name, array in arrays.items()} == {n: a.tobytes() for n, a in ARRAYS.items()}
        assert notes in (NOTES, {})
    assert refused > 350
