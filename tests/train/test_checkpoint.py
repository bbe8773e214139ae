import dataclasses
import errno
import logging
import os
import pathlib
import random
import resource
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from jmoe.errors import StorageError, UserError
from jmoe.train import checkpoint
from jmoe.train.checkpoint import Checkpointer, latest, peek
from jmoe.train.manifest import UnreadableCheckpointError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    step: jax.Array
    params: nnx.State
    optimizer: optax.OptState
    extras: dict


def state(seed=0, experts=3):
    """One of everything that a training state may hold."""
    layer = nnx.Dict(
        w_in=nnx.Param(jax.random.normal(jax.random.key(seed), (experts, 5, 7))),
        norm=nnx.LayerNorm(7, rngs=nnx.Rngs(0)),
    )
    params = nnx.state(nnx.Dict(blocks=nnx.List([layer])), nnx.Param)
    bits = jax.random.bits(jax.random.key(seed + 1), (11,), jnp.uint16)
    return State(
        step=jnp.int32(seed),
        params=params,
        optimizer=optax.adamw(1e-3, mu_dtype=jnp.bfloat16).init(params),
        extras={
            "any bits": jax.lax.bitcast_convert_type(bits, jnp.bfloat16),  # NaNs with payloads among them
            "odd floats": jnp.array([jnp.nan, -jnp.nan, jnp.inf, -0.0, 1e-45], jnp.float32),
            "old key": jax.random.PRNGKey(seed),
            "key": jax.random.key(seed),
            "keys": jax.random.split(jax.random.key(seed, impl="rbg"), (2, 3)),
            "no keys": jax.random.split(jax.random.key(seed), 0),
            "empty": jnp.zeros((0, 3), jnp.bfloat16),
            "flag": jnp.array(True),
            "a/b": (jnp.arange(3, dtype=jnp.uint8), [jnp.float32(seed)]),
        },
    )


def abstract(tree):
    return jax.eval_shape(lambda: tree)


def assert_identical(actual, expected):
    """Same structure, shapes, dtypes and bits."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert isinstance(a, jax.Array)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def files_of(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


def flip(file, at, bit=0):
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(data)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with checkpoints of steps 10 and 20 of state(10) and state(20); copy it to change it."""
    directory = tmp_path_factory.mktemp("saved")
    with Checkpointer(directory) as checkpointer:
        for step in (10, 20):
            checkpointer.save(step, state(step), {"position": step})
    return directory


@pytest.fixture
def copy(saved, tmp_path):
    return pathlib.Path(shutil.copytree(saved, tmp_path / "copy"))


def largest_file(step_directory):
    return max(files_of(step_directory / "state"), key=lambda file: file.stat().st_size)


# What is saved comes back


def test_every_kind_of_array_comes_back_bit_for_bit(saved):
    with Checkpointer(saved) as checkpointer:
        restored, metadata = checkpointer.restore(10, abstract(state()))
    assert_identical(restored, state(10))
    assert metadata == {"position": 10}


def test_a_concrete_state_serves_as_the_abstract_one_and_is_left_alone(saved):
    target = state(5)
    with Checkpointer(saved) as checkpointer:
        restored, _, step = checkpointer.restore_latest(target)
    assert step == 20
    assert_identical(restored, state(20))
    assert_identical(target, state(5))


def test_restored_keys_draw_the_same_numbers(saved):
    with Checkpointer(saved) as checkpointer:
        restored, _ = checkpointer.restore(20, abstract(state()))
    np.testing.assert_array_equal(
        jax.random.normal(restored.extras["keys"][1, 2], (5,)), jax.random.normal(state(20).extras["keys"][1, 2], (5,))
    )


def test_restored_arrays_are_as_free_to_move_as_fresh_ones(saved):
    with Checkpointer(saved) as checkpointer:
        restored, _ = checkpointer.restore(20, abstract(state()))
    assert not restored.step.committed


def test_a_sharding_that_is_asked_for_is_given(saved):
    sharding = NamedSharding(jax.make_mesh((1,), ("data",)), PartitionSpec())
    placed = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state())
    with Checkpointer(saved) as checkpointer:
        restored, _ = checkpointer.restore(20, placed)
    assert_identical(restored, state(20))
    assert {leaf.sharding for leaf in jax.tree.leaves(restored.params)} == {sharding}


def test_metadata_is_as_it_was_when_save_was_called(tmp_path):
    metadata = {"data": {"seed": 3, "fingerprint": "Ziffern 😀"}, "accuracy": 0.1, "best": None}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": jnp.ones(3)}, metadata)
        metadata["data"]["seed"] = 4
        assert checkpointer.restore(1, {"w": jnp.ones(3)})[1]["data"] == {"seed": 3, "fingerprint": "Ziffern 😀"}


def test_donating_the_state_right_after_save_does_not_reach_the_checkpoint(tmp_path):
    add = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    tree = add({f"w{i}": jnp.zeros((300, 1000)) for i in range(5)})
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, tree, {})
        for _ in range(20):
            tree = add(tree)
        restored, _ = checkpointer.restore(1, abstract(tree))
    assert all(bool((leaf == 1).all()) for leaf in jax.tree.leaves(restored))


def test_peek_tells_step_metadata_and_arrays_without_reading_them(copy):
    largest_file(copy / "20").write_bytes(b"")
    manifest = peek(copy)
    assert (manifest["step"], manifest["metadata"]) == (20, {"position": 20})
    assert manifest["leaves"]["params/blocks/0/w_in"] == {"shape": [3, 5, 7], "dtype": "float32"}


def test_nothing_is_pickled(saved):
    for file in files_of(saved):
        assert not file.read_bytes().startswith(b"\x80")  # the first byte of every pickle since protocol 2


# Which checkpoints there are


def test_a_folder_that_does_not_exist_has_no_checkpoints_and_is_not_made(tmp_path):
    with Checkpointer(tmp_path / "a b/ü") as checkpointer:
        assert (checkpointer.steps(), checkpointer.latest()) == ([], None)
        with pytest.raises(UserError, match="It has no complete checkpoint"):
            checkpointer.restore_latest({"w": jnp.ones(1)})
    assert not (tmp_path / "a b").exists()
    with pytest.raises(UserError, match=r"There is no usable checkpoint in .*ü; train first"):
        peek(tmp_path / "a b/ü")


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"The checkpoints in .*file cannot be listed: Not a directory\."):
        Checkpointer(tmp_path / "file")


def test_a_step_that_was_not_saved_is_refused_with_those_that_were(saved):
    with (
        Checkpointer(saved) as checkpointer,
        pytest.raises(UserError, match=r"no checkpoint of step 15 in .*\[10, 20\]"),
    ):
        checkpointer.restore(15, abstract(state()))


def test_a_checkpoint_counts_only_when_it_is_complete(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": jnp.zeros((500, 1000))}, {})
        early = checkpointer.steps()  # usually [], but never a checkpoint that is not whole
        assert early in ([], [1])
        assert all((tmp_path / str(step) / "jmoe_manifest.json").exists() for step in early)
        checkpointer.wait()
        assert checkpointer.steps() == [1]
        checkpointer.save(2, {"w": jnp.zeros(2)}, {}, wait=True)
        assert checkpointer.latest() == 2


def test_the_last_ones_are_kept(tmp_path):
    with Checkpointer(tmp_path, keep=2) as checkpointer:
        for step in (1, 5, 10, 11):
            checkpointer.save(step, {"w": jnp.full(3, step)}, {}, wait=True)
            assert checkpointer.steps() == [s for s in (1, 5, 10, 11) if s <= step][-2:]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "11"]


def test_saving_a_step_again_replaces_it(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        for value in (1, 2):
            checkpointer.save(7, {"w": jnp.full(3, value)}, {"value": value})
        restored, metadata = checkpointer.restore(7, {"w": jnp.zeros(3, jnp.int32)})
    assert (restored["w"].tolist(), metadata) == ([2, 2, 2], {"value": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["7"]


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="keep=0 checkpoints would leave none; keep at least 1"):
        Checkpointer(tmp_path, keep=0)


# Half-written checkpoints


def leave_half_written(directory):
    """The leftovers of a process killed at each stage of a save: before Orbax is done, and before the manifest."""
    shutil.copytree(directory / "20/state", directory / "40.tmp/state.orbax-checkpoint-tmp")
    shutil.copytree(directory / "20", directory / "30")
    (directory / "30/jmoe_manifest.json").unlink()
    shutil.copytree(directory / "20", directory / "50.tmp")
    return ["30", "40.tmp", "50.tmp"]


def test_half_written_checkpoints_are_never_picked_up_and_named_in_a_warning(copy, caplog):
    names = leave_half_written(copy)
    with Checkpointer(copy) as checkpointer:
        assert [name for name in names if f"{copy / name} is ignored: its save was interrupted" in caplog.text] == names
        assert checkpointer.steps() == [10, 20]
        assert checkpointer.restore_latest(abstract(state()))[2] == 20
    assert peek(copy)["step"] == 20
    assert all((copy / name).exists() for name in names)  # reading deletes nothing: another process may be writing


def test_half_written_checkpoints_are_deleted_by_the_next_save(copy):
    leave_half_written(copy)
    (copy / "notes").mkdir()
    with Checkpointer(copy) as checkpointer:
        checkpointer.save(30, state(30), {})
    assert sorted(path.name for path in copy.iterdir()) == ["10", "20", "30", "notes"]
    assert peek(copy)["step"] == 30


def test_a_checkpoint_whose_replacement_was_interrupted_gets_its_name_back(copy):
    shutil.copytree(copy / "20", copy / "20.tmp")
    (copy / "20").rename(copy / "20.old.tmp")
    shutil.copytree(copy / "10", copy / "10.old.tmp")  # already replaced
    assert latest(copy) == 20
    assert (copy / "20.old.tmp").exists()
    with Checkpointer(copy) as checkpointer:
        restored, _, step = checkpointer.restore_latest(abstract(state()))
        assert step == 20
        assert_identical(restored, state(20))
        checkpointer.save(30, state(30), {})
    assert sorted(path.name for path in copy.iterdir()) == ["10", "20", "30"]


def test_a_replacement_that_cannot_be_put_in_place_leaves_the_earlier_one(copy, monkeypatch):
    rename = pathlib.Path.rename

    def fails(path, target):
        if path.name == "20.tmp":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(pathlib.Path, "rename", fails)
    with Checkpointer(copy) as checkpointer:
        with pytest.raises(UserError, match=r"step 20 could not be saved .*; that of step 20 is intact\."):
            checkpointer.save(20, state(5), {}, wait=True)
        assert_identical(checkpointer.restore_latest(abstract(state()))[0], state(20))


KILLED = """
import sys, itertools, jax, jax.numpy as jnp
from jmoe.train.checkpoint import Checkpointer
checkpointer = Checkpointer(sys.argv[1], keep=2)
for step in itertools.count((checkpointer.latest() or 0) + 1):
    checkpointer.save(step, {f"w{i}": jnp.full((100, 1000), step) for i in range(8)}, {"step": step})
    print(step, flush=True)
"""


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_a_process_killed_while_saving_leaves_a_sound_checkpoint(tmp_path, kills):
    rng = random.Random(kills)
    wanted = {f"w{i}": jax.ShapeDtypeStruct((100, 1000), jnp.int32) for i in range(8)}
    for _ in range(kills):
        with subprocess.Popen([sys.executable, "-c", KILLED, tmp_path], stdout=subprocess.PIPE) as process:
            for _ in range(4):
                assert process.stdout
                started = int(process.stdout.readline())
            time.sleep(0.1 * rng.random())  # into the save of that step or of a later one
            process.kill()
        with Checkpointer(tmp_path) as checkpointer:
            restored, metadata, step = checkpointer.restore_latest(wanted)
        assert step >= started - 1  # all but the save that was under way
        assert metadata == {"step": step}
        assert all(bool((leaf == step).all()) for leaf in restored.values())


# Damage


def test_a_flipped_bit_is_named_and_the_checkpoint_before_it_used(copy, caplog):
    file = largest_file(copy / "20")
    flip(file, at=file.stat().st_size // 2)
    with Checkpointer(copy) as checkpointer:
        with pytest.raises(
            UnreadableCheckpointError, match=rf"20 is damaged: its file state/.*{file.name} is not what was written"
        ):
            checkpointer.restore(20, abstract(state()))
        restored, metadata, step = checkpointer.restore_latest(abstract(state()))
    assert (step, metadata) == (10, {"position": 10})
    assert_identical(restored, state(10))
    assert (checkpointer.steps(), checkpointer.latest()) == ([10], 10)  # nobody is told that 20 is good
    assert "20 is damaged" in caplog.text
    assert "The checkpoint before it is used instead." in caplog.text


def test_a_truncated_file_is_named(copy):
    file = largest_file(copy / "20")
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with Checkpointer(copy) as checkpointer, pytest.raises(UserError, match=f"has {size - 1} bytes instead of {size}"):
        checkpointer.restore(20, abstract(state()))


@pytest.mark.parametrize("index", range(8))
def test_a_missing_file_is_named_whichever_it_is(copy, index):
    file = files_of(copy / "20/state")[index]
    file.unlink()
    with Checkpointer(copy) as checkpointer:
        with pytest.raises(UserError, match=f"its file {file.relative_to(copy / '20').as_posix()} is missing"):
            checkpointer.restore(20, abstract(state()))
        assert checkpointer.restore_latest(abstract(state()))[2] == 10


def test_a_changed_manifest_is_found_out(copy):
    manifest = copy / "20/jmoe_manifest.json"
    manifest.write_text(manifest.read_text().replace('"position": 20', '"position": 21'))
    with (
        Checkpointer(copy) as checkpointer,
        pytest.raises(UserError, match=r"jmoe_manifest\.json is not what was written"),
    ):
        checkpointer.restore(20, abstract(state()))
    assert peek(copy)["step"] == 10


def test_when_all_are_damaged_each_is_named(copy):
    for step in ("10", "20"):
        largest_file(copy / step).unlink()
    with Checkpointer(copy) as checkpointer, pytest.raises(UserError) as error:
        checkpointer.restore_latest(abstract(state()))
    assert "20 is damaged: its file" in str(error.value)
    assert "10 is damaged: its file" in str(error.value)
    assert "Train from the start in another folder" in str(error.value)


def test_a_damaged_checkpoint_never_pushes_out_a_good_one(copy):
    largest_file(copy / "20").unlink()
    with Checkpointer(copy, keep=1) as checkpointer:
        assert checkpointer.restore_latest(abstract(state()))[2] == 10
        checkpointer.save(15, state(15), {}, wait=True)
        assert checkpointer.steps() == [15]  # not 20, though that is the higher step
        assert checkpointer.restore_latest(abstract(state()))[2] == 15


def test_a_sound_checkpoint_that_cannot_be_read_here_stops_the_run_and_is_kept(copy, monkeypatch):
    def out_of_memory(*_):
        raise MemoryError("RESOURCE_EXHAUSTED: 5 bytes")

    with Checkpointer(copy) as checkpointer:
        monkeypatch.setattr(checkpointer._arrays, "read", out_of_memory)
        message = r"20 is sound, but could not be read here: RESOURCE_EXHAUSTED: 5 bytes; mend that and run the same"
        with pytest.raises(UserError, match=message):
            checkpointer.restore_latest(abstract(state()))
        monkeypatch.undo()
        checkpointer.save(30, state(30), {}, wait=True)
        assert checkpointer.steps() == [10, 20, 30]


def damage(file, rng):
    """Flips a bit, cuts the file, overwrites a piece or appends something."""
    data = bytearray(file.read_bytes())
    at = rng.randrange(len(data))
    match rng.randrange(4):
        case 0:
            data[at] ^= 1 << rng.randrange(8)
        case 1:
            del data[at:]
        case 2:
            data[at : at + 8] = rng.randbytes(len(data[at : at + 8]))
        case 3:
            data += rng.randbytes(1 + rng.randrange(9))
    file.write_bytes(data)


@pytest.mark.parametrize("times", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_random_damage_never_gives_wrong_arrays_or_another_exception(saved, tmp_path, times):
    rng = random.Random(times)
    expected, wanted = state(20), abstract(state())
    refusals = []
    (tmp_path / "copy").mkdir()
    with Checkpointer(tmp_path / "copy") as checkpointer:
        for _ in range(times):
            shutil.rmtree(tmp_path / "copy/20", ignore_errors=True)
            shutil.copytree(saved / "20", tmp_path / "copy/20")
            file = rng.choice(files_of(tmp_path / "copy/20"))
            damage(file, rng)
            try:
                restored, metadata = checkpointer.restore(20, wanted)
            except UserError as error:
                refusals.append((file.name, str(error)))
            else:
                assert_identical(restored, expected)  # the damage was in a blank of the manifest
                assert metadata == {"position": 20}
    assert [name for name, message in refusals if name not in message] == []
    assert len(refusals) > 0.9 * times


# Other models


def test_a_checkpoint_of_another_model_is_refused_with_the_arrays_that_differ(saved):
    message = (
        "is of another model: the checkpoint and the model have float32 (3, 5, 7) and float32 (4, 5, 7) at "
        "'params/blocks/0/w_in', bfloat16 (3, 5, 7) and bfloat16 (4, 5, 7) at 'optimizer/0/mu/blocks/0/w_in', "
        "float32 (3, 5, 7) and float32 (4, 5, 7) at 'optimizer/0/nu/blocks/0/w_in'. "
        "Use the experiment and the options it was written with, or another folder."
    )
    with Checkpointer(saved) as checkpointer:
        for restore in (lambda s: checkpointer.restore(20, s), checkpointer.restore_latest):
            with pytest.raises(UserError) as error:
                restore(abstract(state(experts=4)))
            assert message in str(error.value)
            assert not isinstance(error.value, UnreadableCheckpointError)  # so nothing older is tried


def test_another_dtype_is_refused_rather_than_cast(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": jnp.ones(2)}, {})
        with pytest.raises(UserError, match=r"float32 \(2\) and bfloat16 \(2\) at 'w'"):
            checkpointer.restore(1, {"w": jnp.ones(2, jnp.bfloat16)})


def test_a_key_of_another_kind_is_refused(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"key": jax.random.key(0)}, {})
        with pytest.raises(UserError, match=r"key<fry> \(\) and key<rbg> \(\) at 'key'"):
            checkpointer.restore(1, {"key": jax.random.key(0, impl="rbg")})


# Saves that fail


@pytest.fixture
def small_files():
    """Makes the operating system refuse files above 50 kB, from inside Orbax too, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("report", ["wait", "save", "close"])
def test_a_failed_save_is_one_sentence_at_the_next_call_and_leaves_the_earlier_one(
    tmp_path, small_files, report, caplog
):
    big = {"w": jax.random.normal(jax.random.key(0), (100_000,))}
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(1, big, {"n": 1}, wait=True)
    small_files()
    checkpointer.save(2, big, {"n": 2})
    message = (
        r"^The checkpoint of step 2 could not be saved in .*: File too large; that of step 1 is intact\. "
        r"Free some space or choose another folder, and start again\.$"
    )
    with pytest.raises(UserError, match=message):
        {"wait": checkpointer.wait, "save": lambda: checkpointer.save(3, big, {}), "close": checkpointer.close}[
            report
        ]()
    assert caplog.text == ""  # none of Orbax's tracebacks
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    with Checkpointer(tmp_path) as again:
        assert_identical(again.restore_latest(abstract(big))[0], big)


@pytest.mark.parametrize(("number", "kind", "status"), [(errno.EIO, StorageError, 75), (errno.ENOSPC, UserError, 2)])
def test_an_error_of_storage_that_may_pass_asks_for_the_same_command_again(tmp_path, monkeypatch, number, kind, status):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    with Checkpointer(tmp_path) as checkpointer:
        monkeypatch.setattr(checkpoint.manifest, "write", fail)
        with pytest.raises(UserError, match="step 1 could not be saved") as raised:
            checkpointer.save(1, {"w": jnp.ones(1)}, {}, wait=True)
    assert (type(raised.value), raised.value.exit_code) == (kind, status)
    assert str(raised.value).endswith("Run the same command to go on.") == (status == 75)


def test_saving_goes_on_once_there_is_space_again(tmp_path, small_files):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    big = {"w": jax.random.normal(jax.random.key(0), (100_000,))}
    with Checkpointer(tmp_path) as checkpointer:
        small_files()
        with pytest.raises(UserError, match="there is no earlier one"):
            checkpointer.save(1, big, {}, wait=True)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        checkpointer.save(2, big, {}, wait=True)
        assert_identical(checkpointer.restore_latest(abstract(big))[0], big)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    with Checkpointer(tmp_path / "folder") as checkpointer:
        (tmp_path / "folder").write_text("in the way")
        with pytest.raises(UserError, match=r"step 1 could not be saved in .*folder: File exists"):
            checkpointer.save(1, {"w": jnp.ones(1)}, {})


def test_an_error_that_is_on_its_way_is_not_hidden_by_a_failed_save(tmp_path, small_files, caplog):
    big = {"w": jax.random.normal(jax.random.key(0), (100_000,))}

    def train():
        with Checkpointer(tmp_path) as checkpointer:
            small_files()
            checkpointer.save(1, big, {})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "The checkpoint of step 1 could not be saved" in caplog.text


def test_metadata_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path):
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(ValueError, match="not JSON compliant"):
        checkpointer.save(1, {"w": jnp.ones(1)}, {"loss": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_part_of_a_checkpoint_can_be_read(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"params": jnp.arange(5.0), "optimizer": jnp.ones(3)}, {}, wait=True)
        state, _ = checkpointer.restore(1, {"params": jax.ShapeDtypeStruct((5,), jnp.float32)}, partial=True)
        with pytest.raises(UserError, match="the model lacks 'optimizer'"):
            checkpointer.restore(1, {"params": jax.ShapeDtypeStruct((5,), jnp.float32)})
    np.testing.assert_array_equal(state["params"], np.arange(5.0))
