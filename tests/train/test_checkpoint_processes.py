"""Checkpoints of jobs of several processes: real ones, on this machine."""

import json
import random
import socket
import time

import pytest

from jmoe.errors import LOST
from tests.parallel import processes

BODIES = "tests.train.checkpoint_bodies"
HERE = socket.gethostname()
AGAIN = "Run the same command on all hosts to go on from the last checkpoint."


def test_two_processes_write_all_once_and_what_goes_wrong_in_one_is_the_same_error_in_both(tmp_path):
    outputs = processes.together(f"{BODIES}:troubles", 2, str(tmp_path))
    first, second = (json.loads(output) for output in outputs)
    shared, other = tmp_path / "shared", tmp_path / "other"
    assert 400_000 < first["bytes"] == second["bytes"] < 420_000  # 400,000 of noise, which both processes hold

    # A file that is damaged for process 1, and only there.
    assert first["damaged"] == second["damaged"]
    assert f"Checkpoint {other}/2 is damaged: its file state/" in first["damaged"]
    assert first["damaged"].endswith(" (process 1 of 2).")
    assert first["used instead"] == second["used instead"] == 1
    assert first["warnings"] == [f"{first['damaged']} The checkpoint before it is used instead."]
    assert second["warnings"] == []

    # Folders that are not shared.
    difference = "It has other checkpoints for process 0 than for process 1 of 2 ([1, 2] and [])."
    for said, folder in ((first, shared), (second, tmp_path / "none")):
        assert said["other list"] == (
            f"{folder} is not the same folder for all processes. {difference} Put it on storage that all hosts share."
        )
    for process, said in enumerate((first, second)):
        assert said["not shared"] == (
            f"The checkpoint of step 3 could not be saved in {tmp_path}/own {process}: the folder is not shared by all "
            "processes, as what process 0 has just written is not there (process 1 of 2); there is no earlier one. "
            "Free some space or choose another folder, and start again."
        )

    # A full disk, and afterwards.
    for said in (first, second):
        for slow in ("0.0", "0.5"):
            assert said[f"full {slow}"] == (
                f"The checkpoint of step 3 could not be saved in {shared}: File too large (process 1 of 2); that of "
                "step 2 is intact. Free some space or choose another folder, and start again."
            )
            assert first[f"after full {slow}"] == ["1", "2"]
        assert said["space again"] == [1, 2, 3]

    # A process that is elsewhere.
    elsewhere = "Process 0 of 2 came to the start of saving step 4 when process 1 came to the start of saving step 5"
    for said in (first, second):
        assert f"{elsewhere}; that of step 3 is intact." in said["another step"]
        assert said["late"] == (
            f"The checkpoint of step 4 could not be saved in {shared}; that of step 3 is intact. No word about the "
            f"start of saving step 4 from process 1 on {HERE} within 1 s. {AGAIN}"
        )
        assert said["steps"] == said["saved after that"] == [1, 2, 3]


@pytest.mark.slow
def test_a_job_goes_on_with_another_number_of_processes_on_another_mesh(tmp_path):
    meshes = [(1, (1, 8)), (2, (4, 2)), (4, (2, 4)), (2, (8, 1)), (1, (4, 2)), (4, (1, 8))]
    for step, (count, (data, expert)) in enumerate(meshes):
        found = processes.together(
            f"{BODIES}:goes_on", count, str(tmp_path), str(data), str(expert), devices=8 // count
        )
        last = step - 1 if step else None
        assert [json.loads(text) for text in found] == [[last, list(range(max(0, step - 2), step + 1))]] * count


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1, 3])
def test_a_process_killed_while_saving_leaves_a_sound_checkpoint_and_no_other_waits(tmp_path, victim):
    rng = random.Random(victim)
    for _ in range(2):
        with processes.start([processes.function(f"{BODIES}:saves_for_ever", str(tmp_path), "2", "2")] * 4) as running:
            running.wait_for(0, "saving", timeout=120)
            time.sleep(1 + rng.random())  # into the save of some step
            running.kill(victim)
            killed = time.monotonic()
            ended = running.wait(60)
            waited = time.monotonic() - killed
        assert ended[victim].status == -9
        assert waited < 20
        for process, end in enumerate(ended):
            if process != victim:
                assert end.status == LOST, end
                lost = end.stderr.splitlines()[-1]
                assert lost.startswith(f"jmoe: Lost process {victim} on {HERE}"), end
                assert lost.endswith(AGAIN), end
        began = int([line for line in ended[victim].stdout.splitlines() if line.startswith("saving")][-1].split()[1])
        restored = {json.loads(text) for text in processes.together(f"{BODIES}:restores", 2, str(tmp_path), "1", "2")}
        assert len(restored) == 1
        # What was complete when the one after the next began is there; that one may be, too.
        assert began - 1 <= restored.pop() <= began + 1
