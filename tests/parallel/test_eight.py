"""Starts the tests that need eight devices, a file at a time, in a process that has them."""

import os
import pathlib
import subprocess
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent / "eight"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))


def run(file: str, marks: str) -> None:
    """Runs the tests of a file; their own report is the message if one fails."""
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # most of their time is the compiler's
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-m", marks, str(FOLDER / file)]
    ended = subprocess.run(
        command, env=environment, cwd=FOLDER.parents[2], capture_output=True, text=True, timeout=1800
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " passed" in ended.stdout, ended.stdout


@pytest.mark.parametrize("file", FILES)
def test_on_eight_devices(file):
    run(file, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_on_eight_devices_at_length(file):
    run(file, "slow")
