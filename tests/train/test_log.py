import contextlib
import io
import json
import logging
import math
import os
import resource
import struct
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jmoe.errors import UserError
from jmoe.train.log import MetricWriter, Progress


def lines(workdir):
    """The records of metrics.jsonl, read by a parser that refuses what is not JSON, such as NaN."""

    def refuse(constant):
        raise AssertionError(constant)

    return [json.loads(line, parse_constant=refuse) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(workdir):
    """All events that TensorBoard would read, in the order of its files (records: length, crc, data, crc)."""
    found = []
    for file in sorted((workdir / "tensorboard").iterdir()):
        data = file.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    return found


def scalars(workdir):
    return {(event.step, v.tag): v.simple_value for event in events(workdir) for v in event.summary.value}


# metrics.jsonl


def test_each_write_is_one_line_with_step_and_time_at_once(tmp_path):
    with MetricWriter(tmp_path) as writer:
        before = time.time()
        writer.write(3, {"loss": jnp.float32(0.25), "load": np.array([1, 2]), "accuracy": 1})
        (record,) = lines(tmp_path)  # readable before the writer is closed
        assert before <= record.pop("time") <= time.time()
        assert record == {"step": 3, "loss": 0.25, "load": [1, 2], "accuracy": 1}
        writer.write(4, {})
    assert [record["step"] for record in lines(tmp_path)] == [3, 4]


def test_bfloat16_and_nested_arrays_are_written_as_numbers(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"half": jnp.bfloat16(1.5), "table": jnp.array([[1.0], [2.0]]), "none": jnp.zeros((0,))})
    (record,) = lines(tmp_path)
    assert (record["half"], record["table"], record["none"]) == (1.5, [[1.0], [2.0]], [])


def test_floats_that_are_not_finite_are_valid_json_and_come_back_as_floats(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": float("nan"), "norms": jnp.array([jnp.inf, -jnp.inf, 2.0])})
    (record,) = lines(tmp_path)
    assert math.isnan(float(record["loss"]))
    assert [float(norm) for norm in record["norms"]] == [math.inf, -math.inf, 2.0]


def test_resuming_drops_what_is_later_than_the_checkpoint_and_unfinished_lines(tmp_path, caplog):
    with MetricWriter(tmp_path) as writer:
        for step in (10, 20, 30):
            writer.write(step, {"loss": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "lo')
    with MetricWriter(tmp_path, resume_step=20) as writer:
        writer.write(30, {"loss": 31})
    assert [(record["step"], record["loss"]) for record in lines(tmp_path)] == [(10, 10), (20, 20), (30, 31)]


def test_resuming_drops_garbage_with_a_warning(tmp_path, caplog):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\xfe\n[]\n{"loss": 2}\n{"step": 2}\n')
    MetricWriter(tmp_path, resume_step=2).close()
    assert [record["step"] for record in lines(tmp_path)] == [1, 2]
    assert caplog.text.count("which is not one of ours") == 3


def test_a_fresh_run_starts_with_an_empty_file_and_makes_its_folder(tmp_path):
    for _ in range(2):
        with MetricWriter(tmp_path / "a b/ü") as writer:
            writer.write(1, {"loss": 1})
    assert len(lines(tmp_path / "a b/ü")) == 1


def test_resuming_without_an_earlier_file_is_fine(tmp_path):
    MetricWriter(tmp_path, resume_step=7).close()
    assert lines(tmp_path) == []


def test_a_metric_cannot_take_the_name_of_a_field(tmp_path):
    with MetricWriter(tmp_path) as writer, pytest.raises(ValueError, match="A metric cannot be called 'step'"):
        writer.write(1, {"step": 2})


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Metrics cannot be written to .*metrics\.jsonl: Not a directory\."):
        MetricWriter(tmp_path / "file/run")


@pytest.fixture
def full_disk():
    """Makes the operating system refuse to write more than 2,000 bytes to any file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_one_sentence(tmp_path, full_disk):
    with MetricWriter(tmp_path) as writer:
        full_disk()
        with pytest.raises(UserError, match=r"cannot be written to .*: File too large\. Free some space"):
            writer.write(1, {"many": jnp.zeros(1000)})


# TensorBoard


def test_tensorboard_gets_scalars_and_each_entry_of_an_array(tmp_path):
    with MetricWriter(tmp_path) as writer:
        writer.write(5, {"loss": 0.5, "load": jnp.array([1.0, 2.0])})
        expected = {(5, "loss"): 0.5, (5, "load/0"): 1.0, (5, "load/1"): 2.0}
        assert scalars(tmp_path) == expected  # readable while the run goes on
    assert events(tmp_path)[0].file_version == "brain.Event:2"


def test_resuming_hides_later_events_from_tensorboard(tmp_path):
    MetricWriter(tmp_path).close()
    MetricWriter(tmp_path, resume_step=20).close()  # within the same second: must not overwrite the other file
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    assert [event.step for event in events(tmp_path) if event.session_log.status == SessionLog.START] == [21]


def test_tensorboard_that_cannot_start_is_a_warning(tmp_path, caplog):
    (tmp_path / "tensorboard").write_text("in the way")
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1})
        writer.write(2, {"loss": 1})
    assert len(lines(tmp_path)) == 2
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_tensorboard_that_fails_later_is_one_warning(tmp_path, full_disk, caplog):
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"many": np.zeros(60)})  # in TensorBoard each entry has a name, which takes more space
        full_disk()
        for step in (2, 3, 4):
            writer.write(step, {"many": np.zeros(60, np.int32)})
    assert len(lines(tmp_path)) == 4
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "TensorBoard gets no more metrics, metrics.jsonl does: " in caplog.text


# Progress


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr("jmoe.train.log.time", types.SimpleNamespace(monotonic=lambda: self.now))


class Terminal:
    """A pseudo-terminal: `file` is what a program writes to, `seen()` what a person has been shown."""

    def __init__(self):
        self._master, slave = os.openpty()
        self.file = open(slave, "w")  # noqa: SIM115, closed by seen()

    def seen(self):
        self.file.close()
        shown = b""
        with contextlib.suppress(OSError):  # which is how Linux reports the end
            while piece := os.read(self._master, 1024):
                shown += piece
        os.close(self._master)
        return shown.decode()


def test_elsewhere_than_on_a_terminal_there_is_a_plain_line_per_loss(monkeypatch):
    clock, file = Clock(monkeypatch), io.StringIO()
    with Progress(total_steps=1100, batch_size=32, file=file) as progress:
        clock.now += 60  # compilation, which says nothing about the time left
        for step in range(1, 101):
            progress.update(step, loss=jnp.float32(0.5) if step in (1, 51) else None)
            clock.now += 0.1
        progress.print("test accuracy 97.5 % [all of it]")
    assert file.getvalue().splitlines() == [
        "step 1/1100  loss 0.5000  ? images/s  ? left",
        "step 51/1100  loss 0.5000  320 images/s  0:01:45 left",  # 1,049 steps of 0.1 s
        "test accuracy 97.5 % [all of it]",
    ]


def test_speed_is_of_the_latest_steps_and_the_time_left_of_all(monkeypatch):
    clock, file = Clock(monkeypatch), io.StringIO()
    with Progress(total_steps=2000, batch_size=10, start_step=500, file=file) as progress:
        for step in range(501, 1502):
            progress.update(step, loss=1.0 if step == 1501 else None)
            clock.now += 1 if step < 1001 else 0.1  # 500 slow steps, then 500 fast ones
    assert file.getvalue() == "step 1501/2000  loss 1.0000  100 images/s  0:04:34 left\n"  # 499 steps of 0.55 s


def test_the_time_left_never_gets_negative(monkeypatch):
    clock, file = Clock(monkeypatch), io.StringIO()
    progress = Progress(total_steps=2, batch_size=1, file=file)
    for step in (1, 2, 3):
        progress.update(step, loss=1.0)
        clock.now += 1
    assert "0:00:00 left" in file.getvalue().splitlines()[-1]


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    with Progress(total_steps=8, batch_size=4, file=terminal.file) as progress:
        progress.update(1)
        progress.print("saved [in] runs/digits")
        progress.update(8, loss=0.125)
    seen = terminal.seen()
    assert "saved [in] runs/digits\r\n" in seen
    assert "step 8/8" in seen
    assert "loss 0.1250" in seen


def test_the_terminal_is_given_back_when_training_fails(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    hide_cursor, show_cursor = "\x1b[?25l", "\x1b[?25h"
    terminal = Terminal()

    def train():
        with Progress(total_steps=8, batch_size=4, file=terminal.file) as progress:
            progress.update(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    seen = terminal.seen()
    assert seen.count(hide_cursor) == seen.count(show_cursor) == 1
    assert seen.index(hide_cursor) < seen.index(show_cursor)
