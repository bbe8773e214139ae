import io
import pathlib
import zipfile

import numpy as np
import pytest

from jmoe.convert.names import to_ours
from jmoe.convert.vit_npz import read
from jmoe.errors import UserError

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"


@pytest.fixture
def recorded(tmp_path):
    """A file of the original ViT, with the old names, and its arrays."""
    with np.load(GOLDENS / "init_upcycle_vit_to_vmoe.npz", allow_pickle=False) as golden:
        arrays = {name.removeprefix("source/"): golden[name] for name in golden.files if name.startswith("source/")}
    np.savez(tmp_path / "vit.npz", **arrays)
    return tmp_path / "vit.npz", arrays


def npy(array, **options):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, **options)
    return buffer.getvalue()


def zipped(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def sentence(path):
    with pytest.raises(UserError) as error:
        read(path)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{path.parent}/", "")


def test_the_old_names_are_those_of_the_reference(recorded):
    path, arrays = recorded
    found = read(path)
    old = "Transformer/encoderblock_1"
    for theirs, name in {
        f"{old}/LayerNorm_0/bias": "Encoder/encoderblock_1/LayerNorm_0/bias",
        f"{old}/LayerNorm_2/scale": "Encoder/encoderblock_1/LayerNorm_1/scale",
        f"{old}/MultiHeadDotProductAttention_1/out/kernel": "Encoder/encoderblock_1/SelfAttention/out/kernel",
        f"{old}/MlpBlock_3/Dense_1/kernel": "Encoder/encoderblock_1/Mlp/Dense_1/kernel",
        "Transformer/posembed_input/pos_embedding": "Encoder/posembed_input/pos_embedding",
        "Transformer/encoder_norm/scale": "Encoder/encoder_norm/scale",
        "embedding/kernel": "embedding/kernel",
        "cls": "cls",
    }.items():
        np.testing.assert_array_equal(found[name], arrays[theirs], err_msg=name)
    assert len(to_ours(found, path)) == len(arrays)


def test_the_newer_names_are_those_of_the_reference_too(recorded, tmp_path):
    path, arrays = recorded
    newer = {"LayerNorm_2": "LayerNorm_1", "MultiHeadDotProductAttention_1": "MultiHeadDotProductAttention_0"}
    newer["MlpBlock_3"] = "MlpBlock_0"
    renamed = {"/".join(newer.get(part, part) for part in name.split("/")): a for name, a in arrays.items()}
    np.savez_compressed(tmp_path / "newer.npz", **renamed)
    found, expected = read(tmp_path / "newer.npz"), read(path)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)


def test_other_names_are_kept(tmp_path):
    np.savez(tmp_path / "x.npz", **{"conv_root/kernel": np.ones(3), "Transformer/other/x": np.ones(2)})
    assert list(read(tmp_path / "x.npz")) == ["conv_root/kernel", "Transformer/other/x"]


def test_a_missing_block_is_named(recorded, tmp_path):
    arrays = {name.replace("encoderblock_1", "encoderblock_2"): a for name, a in recorded[1].items()}
    np.savez(tmp_path / "x.npz", **arrays)
    assert sentence(tmp_path / "x.npz") == (
        "x.npz lacks a block before 'Transformer/encoderblock_2': they are numbered from 0."
    )


def test_two_names_of_one_array_are_refused(recorded, tmp_path):
    arrays = recorded[1] | {"Encoder/encoder_norm/scale": np.ones(12, np.float32)}
    np.savez(tmp_path / "x.npz", **arrays)
    assert sentence(tmp_path / "x.npz") == "x.npz has arrays under two names each: it mixes the names of two programs."


def test_what_is_no_file_of_arrays_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "x.npz"
    assert sentence(path) == "There is no file x.npz."
    path.write_bytes(b"\x80\x04K\x01.")  # a pickle
    assert sentence(path) == "x.npz is damaged, or no .npz file of arrays: File is not a zip file."
    np.savez(path, **{"head/kernel": np.array([{"a": 1}], object)})
    assert (
        sentence(path) == "x.npz is damaged at 'head/kernel': it holds pickled Python objects, which jmoe never loads."
    )
    zipped(path, [("cls.npy", b"abc")])
    assert "x.npz is damaged at 'cls': " in sentence(path)
    with pytest.warns(UserWarning, match="Duplicate name"):
        zipped(path, [("cls.npy", npy(np.ones(3))), ("cls.npy", npy(np.ones(3)))])
    assert sentence(path) == "x.npz has 'cls' twice."
    zipped(path, [("cls.npy", npy(np.ones(3)).replace(b"(3,), }", b"(3,    "))])  # a bracket that is not closed
    assert "x.npz is damaged at 'cls': " in sentence(path)
    zipped(path, [("cls.npy", npy(np.ones(3), version=(3, 0)))])
    assert sentence(path) == "x.npz is damaged at 'cls': its version of the .npy format is (3, 0)."


def test_sizes_are_not_believed(tmp_path):
    path = tmp_path / "x.npz"
    huge = npy(np.ones(3)).replace(b"(3,), }", f"({10**13},), }}".encode())[: -3 * 8]
    zipped(path, [("cls.npy", huge)])
    assert "x.npz is damaged at 'cls': its " in sentence(path)
    assert sentence(path).endswith(f"bytes do not fit float64 ({10**13},).")
    content = bytearray(zipped(path, [("cls.npy", npy(np.ones(3)))]).read_bytes())
    directory = content.rindex(b"PK\x01\x02")
    content[directory + 24 : directory + 28] = (2**31).to_bytes(4, "little")  # the size without compression
    path.write_bytes(content)
    assert sentence(path) == "x.npz is damaged at 'cls': it claims 2,147,483,648 bytes in 152 compressed ones."


@pytest.mark.parametrize("compressed", [False, True])
def test_damage_is_found_or_harmless(recorded, tmp_path, compressed):
    _, arrays = recorded
    arrays = {name: arrays[name] for name in ("cls", "head/kernel", "embedding/bias")}
    path, rng = tmp_path / "x.npz", np.random.default_rng(3)
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    content, refused = path.read_bytes(), 0
    for _ in range(300):
        damaged, position = bytearray(content), int(rng.integers(len(content)))
        if rng.integers(4):
            damaged[position] ^= 1 << int(rng.integers(8))
        else:
            del damaged[position:]
        path.write_bytes(damaged)
        try:
            found = read(path)
        except UserError as error:
            assert str(path) in str(error)  # noqa: PT017  # that it is refused is not what is claimed
            refused += 1
            continue
        # A zip archive has a checksum of every array; of its own directory, only the names can be changed unseen.
        for name, array in found.items():
            assert name not in arrays or np.array_equal(array, arrays[name])
    assert refused > 200
