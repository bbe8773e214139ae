import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import jmoe
from jmoe.data import Digits


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """The digits, prepared once for the session in a folder of their own."""
    return Digits(data_dir=os.fspath(tmp_path_factory.mktemp("datasets")))


@pytest.fixture
def image_folder(tmp_path):
    """Makes a folder of images: counts[split][class] files of random pixels. Returns its path."""

    def make(counts, size=(5, 7), suffix=".png", root=tmp_path / "images"):
        rng = np.random.default_rng(0)
        for split, classes in counts.items():
            for name, count in classes.items():
                (root / split / name).mkdir(parents=True, exist_ok=True)
                for index in range(count):
                    pixels = rng.integers(0, 256, (*size, 3), np.uint8)
                    Image.fromarray(pixels).save(root / split / name / f"{index:03}{suffix}")
        return root

    return make


@pytest.fixture
def run_python():
    """Runs a program that can import jmoe, and returns the finished process."""

    def run(program, *arguments, **environment):
        paths = [os.fspath(pathlib.Path(jmoe.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        return subprocess.run(
            [sys.executable, "-c", program, *map(os.fspath, arguments)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run
