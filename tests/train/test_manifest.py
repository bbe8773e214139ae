import contextlib
import errno
import json
import os
import sys

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jmoe.errors import UserError
from jmoe.train import manifest
from jmoe.train.manifest import UnreadableCheckpointError


@pytest.fixture
def folder(tmp_path):
    """A folder with two files and their manifest."""
    (tmp_path / "state").mkdir()
    (tmp_path / "state/a").write_bytes(b"12345")
    (tmp_path / "b").write_bytes(b"")
    manifest.write(tmp_path, {"step": 3, "metadata": {"seed": 0.1}, "leaves": {}})
    return tmp_path


def test_what_is_written_is_read(folder):
    content = manifest.read(folder)
    assert content["step"] == 3
    assert content["metadata"] == {"seed": 0.1}
    assert {name: file["bytes"] for name, file in content["files"].items()} == {"state/a": 5, "b": 0}
    manifest.check_files(folder, content)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda file: file.write_bytes(b"12344"), r"is not what was written \(its checksum differs\)"),
        (lambda file: file.write_bytes(b"1234"), "has 4 bytes instead of 5"),
        (lambda file: file.write_bytes(b"123456"), "has 6 bytes instead of 5"),
        (lambda file: file.unlink(), "is missing"),
    ],
)
def test_a_file_that_changed_is_named_with_what_is_wrong(folder, change, problem):
    change(folder / "state/a")
    with pytest.raises(UnreadableCheckpointError, match=f"Checkpoint .* is damaged: its file state/a {problem}"):
        manifest.check_files(folder, manifest.read(folder))


@pytest.mark.parametrize("at", range(0, 300, 7))
def test_a_bit_of_the_manifest_that_flips_is_found_out_or_does_not_matter(folder, at):
    before = manifest.read(folder)
    data = bytearray((folder / manifest.NAME).read_bytes())
    data[at] ^= 1
    (folder / manifest.NAME).write_bytes(data)
    with contextlib.suppress(UnreadableCheckpointError):
        assert manifest.read(folder) == before  # one blank instead of another


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"sha256": "0", "manifest": {}}', "[" * 100_000])
def test_anything_else_in_its_place_is_refused(folder, text):
    (folder / manifest.NAME).write_text(text)
    with pytest.raises(UnreadableCheckpointError, match=r"its jmoe_manifest\.json is not what was written"):
        manifest.read(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="it needs a file that gives an input/output error")
@pytest.mark.parametrize("name", [manifest.NAME, "b"])
def test_what_could_not_be_read_is_not_called_damaged(folder, name):
    content = manifest.read(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/proc/self/mem")  # of 0 bytes, as b is, and reading it fails
    with pytest.raises(UserError, match=rf"{name} of checkpoint .* could not be read here: Input/output") as error:
        manifest.check_files(folder, content if name == "b" else manifest.read(folder))
    assert not isinstance(error.value, UnreadableCheckpointError)


def test_a_newer_format_is_refused(folder, monkeypatch):
    monkeypatch.setattr(manifest, "FORMAT", 2)
    manifest.write(folder, {"step": 3})
    monkeypatch.undo()
    with pytest.raises(UserError, match="was written by a newer jmoe; update jmoe to read it") as error:
        manifest.read(folder)
    assert not isinstance(error.value, UnreadableCheckpointError)


def leaves(**arrays):
    return {name: manifest.describe(array) for name, array in arrays.items()}


def test_missing_and_unexpected_arrays_are_named(tmp_path):
    saved = leaves(**{f"router/w{i}": jnp.ones(1) for i in range(5)}, head=jnp.ones(2))
    with pytest.raises(UserError) as error:
        manifest.check_leaves(tmp_path, {"leaves": saved}, leaves(gate=jnp.ones(1), head=jnp.ones(2)))
    lacks = "the checkpoint lacks 'gate'; the model lacks 'router/w0', 'router/w1', 'router/w2' and 2 more."
    assert lacks in str(error.value)


def test_arrays_of_another_shape_or_dtype_are_named_with_both(tmp_path):
    saved = leaves(w=jnp.ones((16, 3)), b=jnp.ones(3), step=jnp.zeros((), jnp.int32))
    wanted = leaves(w=jnp.ones((8, 3)), b=jnp.ones(3, jnp.bfloat16), step=jnp.zeros((), jnp.int32))
    with pytest.raises(UserError) as error:
        manifest.check_leaves(tmp_path, {"leaves": saved}, wanted)
    assert (
        "the checkpoint and the model have float32 (3) and bfloat16 (3) at 'b', "
        "float32 (16, 3) and float32 (8, 3) at 'w'. Use the experiment" in str(error.value)
    )


def test_the_manifest_is_json_that_anyone_can_read(folder):
    document = json.loads((folder / "jmoe_manifest.json").read_text())
    assert set(document) == {"sha256", "manifest"}
    assert set(document["manifest"]) == {"format", "step", "metadata", "leaves", "files"}


def test_the_reason_is_what_the_operating_system_said_or_one_short_line():
    full = os.strerror(errno.ENOSPC)
    assert manifest.reason(OSError(errno.ENOSPC, full, "file")) == full
    assert manifest.reason(ValueError(f"RESOURCE_EXHAUSTED: Error writing: {full} [source locations='a.cc']")) == full
    assert manifest.reason(ValueError("something. \nmore")) == "something"
    assert manifest.reason(ValueError()) == "ValueError"


# Several processes


@given(sizes=st.dictionaries(st.text(max_size=3), st.integers(0, 1000), max_size=30), processes=st.integers(1, 7))
def test_each_file_has_one_reader_and_they_have_about_as_much_to_read(sizes, processes):
    shares = [manifest.share(sizes, process, processes) for process in range(processes)]
    assert sorted(name for names in shares for name in names) == sorted(sizes)
    loads = [sum(sizes[name] for name in names) for names in shares]
    assert max(loads) - min(loads) <= max(sizes.values(), default=0)


def test_a_damaged_file_is_found_by_its_reader_and_a_short_one_by_all(folder):
    for i in range(5):
        (folder / f"state/{i}").write_bytes(bytes(100 + i))
    (folder / manifest.NAME).unlink()
    manifest.write(folder, {"step": 3, "metadata": {}, "leaves": {}})
    content = manifest.read(folder)

    def finders():
        for process in range(3):
            try:
                manifest.check_files(folder, content, process=process, processes=3)
            except UnreadableCheckpointError as error:
                yield process, str(error).split(": ")[1]

    assert list(finders()) == []
    (folder / "state/4").write_bytes(bytes(103) + b"1")
    assert list(finders()) == [(0, "its file state/4 is not what was written (its checksum differs).")]
    (folder / "state/3").write_bytes(bytes(3))
    short = "its file state/3 has 3 bytes instead of 103."
    assert [found for _, found in finders()] == [short] * 3


def test_the_parts_of_several_processes_make_the_manifest_of_one(folder):
    alone = manifest.read(folder)
    manifest.write_part(folder, 0, manifest.checksums(folder, ["b"]))
    manifest.write_part(folder, 1, manifest.checksums(folder, ["state/a"]))
    known = manifest.take_parts(folder, range(2))
    (folder / manifest.NAME).unlink()
    assert manifest.files_below(folder) == ["b", "state/a"]  # the parts are gone
    manifest.write(folder, {"step": 3, "metadata": {"seed": 0.1}, "leaves": {}}, known)
    assert manifest.read(folder) == alone


def test_files_that_no_part_lists_are_added(folder):
    alone = manifest.read(folder)
    (folder / manifest.NAME).unlink()
    manifest.write(folder, {"step": 3, "metadata": {"seed": 0.1}, "leaves": {}}, manifest.checksums(folder, ["b"]))
    assert manifest.read(folder) == alone


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda folder: (folder / "jmoe_manifest.part-1.json").unlink(), "jmoe_manifest.part-1.json"),
        (lambda folder: os.truncate(folder / "jmoe_manifest.part-1.json", 50), "jmoe_manifest.part-1.json"),
        (lambda folder: (folder / "state/a").unlink(), "state/a"),
        (lambda folder: (folder / "state/a").write_bytes(b"1"), "state/a"),
    ],
)
def test_a_part_or_a_file_that_is_not_seen_yet_is_missing(folder, change, name):
    for process, file in enumerate(["b", "state/a"]):
        manifest.write_part(folder, process, manifest.checksums(folder, [file]))
    change(folder)
    with pytest.raises(FileNotFoundError, match=f"{name} is not what its process wrote"):
        manifest.take_parts(folder, range(2))
    assert (folder / "jmoe_manifest.part-0.json").exists()  # so that it can be tried again
