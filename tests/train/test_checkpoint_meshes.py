"""Checkpoints on one mesh and another, in a process with eight devices."""

import asyncio

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jmoe.train import manifest
from jmoe.train.checkpoint import Checkpointer
from tests.parallel import processes

BODIES = "tests.train.checkpoint_bodies"


def test_what_is_saved_on_one_mesh_is_restored_on_another_bit_for_bit(tmp_path):
    (output,) = processes.together(f"{BODIES}:from_mesh_to_mesh", 1, str(tmp_path), devices=8)
    assert output.splitlines() == [
        "0 (1, 1, 4, 1)",
        "1 (1, 1, 1, 1)",
        "2 (1, 1, 8, 1)",
        "3 (2, 1, 2, 2)",
        "4 (1, 8, 1, 1)",
    ]


def test_saving_works_where_an_event_loop_runs_already(tmp_path):
    async def notebook():
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(1, {"w": jnp.arange(3)}, {}, wait=True)
            return checkpointer.restore(1, {"w": jnp.arange(3)})[0]

    assert asyncio.run(notebook())["w"].tolist() == [0, 1, 2]


def test_a_checkpoint_that_orbaxs_own_checkpointer_wrote_is_read(tmp_path):
    # As ours did before it was written by several processes.
    arrays = {"w": jnp.arange(12.0).reshape(3, 4), "key": jax.random.key_data(jax.random.key(5))}
    with ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(tmp_path / "7/state", args=ocp.args.PyTreeSave(arrays))
    key = {"shape": [], "dtype": "key<fry>", "key": "threefry2x32"}
    leaves = {"w": manifest.describe(arrays["w"]), "key": key}
    manifest.write(tmp_path / "7", {"step": 7, "metadata": {"n": 1}, "leaves": leaves})
    with Checkpointer(tmp_path) as checkpointer:
        state, metadata, step = checkpointer.restore_latest({"w": jnp.zeros((3, 4)), "key": jax.random.key(0)})
    assert (step, metadata) == (7, {"n": 1})
    np.testing.assert_array_equal(state["w"], arrays["w"])
    assert state["key"] == jax.random.key(5)


def test_orbax_alone_reads_the_arrays(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(7, {"w": jnp.arange(12.0).reshape(3, 4)}, {}, wait=True)
    args = ocp.args.PyTreeRestore(restore_args={"w": ocp.RestoreArgs(restore_type=np.ndarray)})
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        arrays = checkpointer.restore(tmp_path / "7/state", args=args)
    np.testing.assert_array_equal(arrays["w"], np.arange(12.0).reshape(3, 4))
