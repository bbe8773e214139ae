import pathlib
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirement_lines(text):
    return [line for line in text.splitlines() if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Builds the wheel from a copy, so that nothing is left in the repository."""
    source, out = tmp_path_factory.mktemp("source") / "jmoe", tmp_path_factory.mktemp("wheel")
    source.mkdir()
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    wanted = ("jmoe/", "kernels_pallas/", "pyproject.toml", "README.md", "LICENSE")
    names = [name for name in tracked.stdout.split("\0") if name.startswith(wanted) and (ROOT / name).exists()]
    assert names, "this test builds what git tracks"
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), "."]
    built = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return next(out.glob("*.whl"))


def test_both_packages_are_in_the_wheel_and_work_elsewhere(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import jax.numpy as jnp, jmoe, kernels_pallas\n"
        "from flax import nnx\n"
        "assert jmoe.__file__.startswith(sys.argv[1]) and kernels_pallas.__file__.startswith(sys.argv[1])\n"
        "layer = jmoe.MoEMlp(jmoe.MoEConfig(num_experts=2), 8, rngs=nnx.Rngs(0))\n"
        "print(layer(jnp.ones((2, 3, 8))).y.shape, kernels_pallas.implementations())\n"
        "heavy = {'optax', 'orbax', 'grain', 'tensorflow_datasets', 'sklearn', 'cv2', 'tensorboardX'}\n"
        "used = {name.split('.')[0] for name in sys.modules if 'jmoe' in name}\n"
        "import_only = [name for name in ('jmoe.train.loop', 'jmoe.data.pipeline', 'grain', 'tensorflow_datasets')\n"
        "               if name in sys.modules]\n"
        "assert import_only == [], import_only\n"
    )
    run = [sys.executable, "-I", "-c", program, str(tmp_path / "installed")]
    result = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("(2, 3, 8)")


def test_the_wheel_declares_its_extras_and_its_types(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        text = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    metadata = Parser().parsestr(text)
    assert set(metadata.get_all("Provides-Extra")) == {"train", "test", "tpu", "cuda", "plan"}
    assert metadata["Requires-Python"] == ">=3.11"
    assert {"jmoe/py.typed", "kernels_pallas/py.typed"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "experiments"))]


def test_the_layers_need_little_more_than_jax_and_flax():
    names = [re.match(r"[\w-]+", requirement)[0] for requirement in PROJECT["dependencies"]]
    assert names == ["jax", "flax", "numpy", "jaxtyping"]


def test_requirements_are_all_that_a_trainer_needs():
    lines = requirement_lines((ROOT / "requirements.txt").read_text())
    names = [re.match(r"[\w-]+", line)[0] for line in lines]
    assert names[:6] == ["jax", "flax", "optax", "orbax-checkpoint", "tensorflow-datasets", "chex"]
    extra = [requirement for requirement in PROJECT["optional-dependencies"]["test"] if requirement.startswith("chex")]
    expected = {*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["train"], *extra}
    assert {line.replace(" ", "") for line in lines} == {line.replace(" ", "") for line in expected}
