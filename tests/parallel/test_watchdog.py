import io
import subprocess
import sys
import threading
import time

import pytest

from jmoe.errors import STUCK
from jmoe.parallel import watchdog
from jmoe.parallel.watchdog import Watchdog
from tests.parallel import processes


@pytest.fixture
def bark(monkeypatch, tmp_path):
    """Has a watchdog note why it would end the process, in place of ending it."""
    barked = threading.Event()
    sentences = []
    monkeypatch.setattr(
        watchdog, "end_all", lambda sentence, status: (sentences.append((sentence, status)), barked.set())
    )
    barked.sentences = sentences
    with (tmp_path / "stderr").open("w") as stream:
        monkeypatch.setattr(sys, "__stderr__", stream)
        yield barked


def test_a_run_that_makes_steps_is_left_alone(bark):
    with Watchdog(multiple=3, least_seconds=0.5, first_seconds=0.5) as dog:
        for step in range(30):
            time.sleep(0.02)
            dog.step_ended(step)
    assert not bark.is_set()


def test_a_step_that_does_not_end_is_noticed(bark):
    with Watchdog(multiple=2, least_seconds=0.1, first_seconds=10) as dog:
        for step in (6, 7, 8):
            time.sleep(0.01)
            dog.step_ended(step)
        assert bark.wait(5)
    ((sentence, status),) = bark.sentences
    assert status == STUCK
    assert sentence.startswith("No step has ended after step 8 for 0.1 s (2 times the median of 0.01")
    assert " s, at least 0.1 s). The stacks above say where each thread stands. Run the same command" in sentence


def test_where_a_notebook_takes_what_is_printed_the_stacks_go_where_the_process_began(bark, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stderr", io.StringIO())  # which has no file
    with Watchdog(first_seconds=0.01):
        assert bark.wait(5)
    assert "most recent call first" in (tmp_path / "stderr").read_text()


@pytest.mark.parametrize("stream", [None, io.StringIO()])
def test_without_a_file_for_the_stacks_the_run_ends_all_the_same(bark, monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(sys, "__stderr__", stream)
    with Watchdog(first_seconds=0.01):
        assert bark.wait(5)


def test_slow_steps_have_a_longer_limit(bark):
    with Watchdog(multiple=5, least_seconds=0.01, first_seconds=10) as dog:
        for step in range(4):
            time.sleep(0.1)
            dog.step_ended(step)
        assert dog.limit() >= 0.5
        time.sleep(0.2)
    assert not bark.is_set()


def test_the_first_step_has_a_limit_of_its_own(bark):
    with Watchdog(multiple=2, least_seconds=0.01, first_seconds=0.2):
        time.sleep(0.1)
        assert not bark.is_set()
        assert bark.wait(5)
    assert bark.sentences[0][0].startswith(
        "The first step has not ended for 0.2 s (the limit of the first, 0.2 s). The"
    )


def test_a_pause_without_end_is_noticed(bark):
    with Watchdog(pause_seconds=0.2, first_seconds=10) as dog:
        dog.step_ended(7)
        with dog.paused():
            assert bark.wait(10)
    assert bark.sentences[0][0].startswith(
        "No step has ended after step 7, nor what comes after it for 0.2 s (the limit of evaluating or saving). The"
    )


def test_pauses_are_not_counted(bark):
    with Watchdog(multiple=2, least_seconds=0.4, first_seconds=0.4) as dog:
        with dog.paused(), dog.paused():
            time.sleep(0.5)
        dog.step_ended(1)
        dog.step_ended(2)
        with dog.paused():
            time.sleep(0.5)
        time.sleep(0.05)
        assert not bark.is_set()
        dog.step_ended(3)
        assert dog.limit() == 0.4  # the pause is in no median either
        assert bark.wait(5)  # it watches again


def hang():
    """Body of a process that makes steps and then hangs."""
    with Watchdog(multiple=2, least_seconds=0.3) as dog:
        for step in range(3):
            dog.step_ended(step)
        threading.Event().wait()


def test_a_process_that_hangs_ends_with_its_stacks_and_a_status_of_its_own():
    command = [sys.executable, "-c", "from tests.parallel.test_watchdog import hang; hang()"]
    ended = subprocess.run(command, cwd=processes.ROOT, capture_output=True, text=True, timeout=20)
    assert ended.returncode == STUCK
    stacks, _, sentence = ended.stderr.rpartition("jmoe: ")
    assert sentence.startswith("No step has ended after step 2 for 0.3 s (2 times the median of ")
    assert "in hang\n" in stacks
    assert "most recent call first" in stacks


def hang_together(coordinator, count, process):
    """Body of one of two processes: the first hangs, the other waits for it on a device."""
    import jax
    from jax.experimental import multihost_utils

    from jmoe.parallel.startup import Addresses, start

    jax.config.update("jax_enable_compilation_cache", False)
    addresses = Addresses(coordinator=coordinator, processes=int(count), process=int(process), local=True)
    with start(addresses, timeout=60), Watchdog(multiple=2, least_seconds=0.5 if process == "0" else 60) as dog:
        for step in range(3):
            multihost_utils.sync_global_devices(f"step {step}")
            dog.step_ended(step)
        if process == "0":
            threading.Event().wait()
        multihost_utils.sync_global_devices("never")


@pytest.mark.slow
def test_a_host_that_hangs_has_all_hosts_end_with_their_stacks():
    with processes.start([processes.starter("tests.parallel.test_watchdog:hang_together")] * 2) as running:
        ended = running.wait(30)
    for process in ended:
        assert process.status == STUCK, process.stderr
        assert "most recent call first" in process.stderr
        assert "in hang_together\n" in process.stderr
    assert "jmoe: No step has ended after step 2 for 0.5 s" in ended[0].stderr
    assert "jmoe: Process 0 on " in ended[1].stderr.splitlines()[-1]
