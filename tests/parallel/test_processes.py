import time

import pytest

from tests.parallel import processes


def print_sum():
    """Body of a process: the sum over the devices of all."""
    import jax
    from jax.experimental import multihost_utils

    total = multihost_utils.process_allgather(jax.numpy.float32(jax.process_index() + 1)).sum()
    print(f"{jax.process_index()}: {float(total):g} on {jax.device_count()}")


def test_processes_compute_together():
    outputs = processes.together("tests.parallel.test_processes:print_sum", 2, devices=2)
    assert outputs == ["0: 3 on 4\n", "1: 3 on 4\n"]


def test_a_process_can_be_watched_and_killed_and_none_is_left():
    sleeper = ["bash", "-c", "echo ready {process}; exec sleep 60"]
    with processes.start([sleeper, ["bash", "-c", "echo wrong >&2; exit 3"]]) as running:
        running.wait_for(0, "ready")
        with pytest.raises(AssertionError, match="process 1 did not print 'ready':\nwrong"):
            running.wait_for(1, "ready")
        with pytest.raises(AssertionError, match=r"still running after 0.1 s: only \[1\] ended"):
            running.wait(0.1)
        running.kill(0)
        killed, failed = running.wait(5)
        assert (killed.status, failed.status, failed.stderr) == (-9, 3, "wrong\n")
    began = time.monotonic()
    with processes.start([sleeper]) as running:
        running.wait_for(0, "ready")
    assert time.monotonic() - began < 10


def test_the_greetings_of_gloo_are_left_out_however_they_run_into_each_other():
    greeting = "[Gloo] Rank 0 is connected to 11 peer ranks. Expected number of connected peer ranks is : 11"
    for text in (
        f"{greeting}\n4: 3\n{greeting}\n",
        f"{greeting}{greeting}\n\n4: 3\n",
        f"4: 3{greeting}\n\n",
        f"[Gloo] Rank {greeting}\n0{greeting[13:]}\n4: 3\n",
        f"{greeting[:30]}{greeting[:30]}{greeting[30:]}\n{greeting[30:]}\n4: 3\n",
    ):
        assert processes.without_greetings(text) == "4: 3\n", text
