import importlib
import importlib.metadata
import json
import os
import pathlib
import sys
import tomllib

import pytest

from jmoe import _version
from jmoe.cli import doctor
from jmoe.cli.doctor import Finding
from jmoe.cli.main import main

PYPROJECT = pathlib.Path(doctor.__file__).parents[2] / "pyproject.toml"


@pytest.fixture(autouse=True)
def an_own_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JMOE_DATA_DIR", str(tmp_path / "data"))


@pytest.fixture
def installed(monkeypatch):
    """Sets what is installed: {name: version} and {name: its requirements}; jmoe is not, unless it is named."""

    def install(versions, requires=None):
        def version(name):
            if name not in versions:
                raise importlib.metadata.PackageNotFoundError(name)
            return versions[name]

        def requires_of(name):
            version(name)
            return (requires or {}).get(name)

        monkeypatch.setattr(importlib.metadata, "version", version)
        monkeypatch.setattr(importlib.metadata, "requires", requires_of)

    return install


def by_name(findings):
    return {finding.name: finding for finding in findings}


def test_this_machine_can_train(capsys, tmp_path):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith("\nTraining can run here.\n")
    python = ".".join(map(str, sys.version_info[:3]))
    for words in (
        f"python {python}",
        f"jmoe {_version.__version__}",
        "train installed",
        f"folder {tmp_path / 'data'},",
    ):
        assert f"ok {words}" in " ".join(shown.split())
    assert not (tmp_path / "data").exists()  # looking changes nothing


def test_the_report_as_json_says_the_same(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["can_train"] is True
    assert set(report) == {"can_train", "versions", "extras", "devices", "images", "data", "layers"}
    assert report["versions"]["jmoe"] == {"ok": True, "detail": _version.__version__}
    assert list(report["extras"]) == ["train", "test", "tpu", "cuda", "plan"]
    assert report["layers"]["dispatch with a capacity"] == {"ok": True, "detail": "gather"}
    assert report["layers"]["dispatch dropless"] == {"ok": True, "detail": "gather"}
    assert set(report["layers"]) > {"gather_rows", "combine_rows", "grouped_matmul"}


def test_an_obstacle_makes_the_status_1(capsys, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JMOE_DATA_DIR", str(tmp_path / "file" / "data"))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.endswith("\nTraining cannot run here because of: folder.\n")
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["can_train"] is False


def test_lines_are_aligned_under_headings():
    findings = [
        Finding("versions", "jax", True, "0.10.2"),
        Finding("versions", "orbax", False, "not installed"),
        Finding("devices", "memory", None, "8.0 GiB"),
    ]
    assert doctor.as_text(findings, ["orbax", "x"]) == (
        "versions\n"
        "  ok  jax     0.10.2\n"
        "  no  orbax   not installed\n"
        "\n"
        "devices\n"
        "      memory  8.0 GiB\n"
        "\n"
        "Training cannot run here because of: orbax, x."
    )


def test_python_and_jax_are_held_against_both_ends_of_their_range(installed, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 9, "final", 0))
    installed({"jax": "0.9.2"})
    found = by_name(doctor.versions())
    assert found["python"] == Finding("versions", "python", False, "3.10.9 is too old: 3.11 or newer is needed", True)
    assert found["jax"] == Finding("versions", "jax", False, "0.9.2 is too old: 0.10.0 or newer is needed", True)

    monkeypatch.setattr(sys, "version_info", (3, 99, 0, "final", 0))
    installed({"jax": "0.99.0rc1"})
    found = by_name(doctor.versions())
    assert found["python"].ok
    assert found["python"].detail == "3.99.0 is newer than the newest tested, 3.12: it may work"
    assert found["jax"].ok
    assert found["jax"].detail == "0.99.0rc1 is newer than the newest tested, 0.12: it may work"


def test_every_release_of_the_newest_tested_version_is_in_the_range(installed):
    installed({"jax": f"{doctor.NEWEST_TESTED['jax']}.7.1"})
    assert by_name(doctor.versions())["jax"].detail == f"{doctor.NEWEST_TESTED['jax']}.7.1"


def test_a_package_that_is_missing_says_what_installs_it(installed):
    installed({"optax": "0.1"})
    found = by_name(doctor.versions())
    assert found["jax"] == Finding("versions", "jax", False, "not installed: pip install jmoe", True)
    assert found["grain"] == Finding("versions", "grain", False, "not installed: pip install 'jmoe[train]'", False)
    assert found["optax"].detail == "0.1 is too old: 0.2.8 or newer is needed"


def test_an_extra_names_its_missing_packages_through_other_extras(installed):
    installed(
        {"jmoe": "0.1.0", "jax": "0.10.2", "optax": "0.2.7", "numpy": "2.1"},
        {
            "jmoe": [
                "numpy>=2.1",
                'optax>=0.2.8; extra == "train"',
                "grain>=0.2.16 ; extra == 'train'",
                'jmoe[train]; extra == "test"',
                'pytest; extra == "test"',
                'jax[tpu]; extra == "tpu"',
                'jax[cuda13]; extra == "cuda"',
                'numpy; extra == "plan"',
            ],
            "jax": ["numpy>=9", 'libtpu==0.0.42.*; extra == "tpu"', 'jax-cuda13-plugin<=1,>=0.1; extra == "cuda13"'],
        },
    )
    assert list(doctor.extras()) == [
        Finding(
            "extras",
            "train",
            False,
            "missing: optax 0.2.8 (there is 0.2.7), grain. pip install 'jmoe[train]'",
            needed=True,
        ),
        Finding(
            "extras",
            "test",
            False,
            "missing: optax 0.2.8 (there is 0.2.7), grain, pytest. pip install 'jmoe[test]'",
        ),
        Finding("extras", "tpu", False, "missing: libtpu. pip install 'jmoe[tpu]'"),
        Finding("extras", "cuda", False, "missing: jax-cuda13-plugin. pip install 'jmoe[cuda]'"),
        Finding("extras", "plan", True, "installed"),
    ]


def test_without_installation_the_requirements_are_those_of_pyproject(installed):
    installed({})
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    count = len(project["dependencies"]) + sum(map(len, project["optional-dependencies"].values()))
    found = doctor.requirements("jmoe")
    assert len(found) == count
    assert doctor.Requirement("jax", (), "0.10.0", None) in found
    assert doctor.Requirement("jmoe", ("train", "plan"), None, "test") in found
    assert doctor.requirements("jax") == []
    assert set(project["optional-dependencies"]) == set(doctor.EXTRAS)


def test_without_installation_or_pyproject_the_extras_are_unknown(installed, monkeypatch):
    installed({})
    monkeypatch.setattr(doctor, "_pyproject", dict)
    assert next(doctor.extras()).detail == (
        "missing: the list of what it holds (jmoe is neither installed nor beside its pyproject.toml). "
        "pip install 'jmoe[train]'"
    )


def test_jax_without_a_device_is_an_obstacle(monkeypatch):
    import jax

    def fail():
        raise RuntimeError("Unable to initialize backend 'tpu':\n  no device")

    monkeypatch.setattr(jax, "devices", fail)
    assert list(doctor.devices())[-1] == Finding(
        "devices", "jax", False, "Unable to initialize backend 'tpu': no device", needed=True
    )


@pytest.mark.parametrize(
    ("platforms", "why"),
    [
        ("cpu", "it is told to (JAX_PLATFORMS=cpu)"),
        ("", "its plugin is missing. pip install 'jmoe[cuda]'"),
    ],
)
def test_a_gpu_that_jax_does_not_use_is_named(monkeypatch, platforms, why):
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/nvidia0")
    if by_name(doctor.devices())["jax backend"].detail.startswith("cpu"):
        assert by_name(doctor.devices())["gpu"] == Finding(
            "devices", "gpu", False, f"there is one (/dev/nvidia0), but JAX uses the processor: {why}"
        )


def test_a_decoder_that_cannot_be_imported_says_why(monkeypatch):
    real = importlib.import_module

    def import_module(name):
        if name == "cv2":
            raise ImportError("libGL.so.1: cannot open shared object file")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    found = by_name(doctor.images())
    assert found["simplejpeg"] == Finding("images", "simplejpeg", True, "decodes JPEG")
    assert found["opencv-python-headless"].detail == (
        "resizes, but cannot be imported: libGL.so.1: cannot open shared object file. pip install 'jmoe[train]'"
    )


def test_a_data_folder_that_cannot_be_used_says_what_to_do(monkeypatch, tmp_path):
    assert next(doctor.data_folder()).ok
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(free=2**20))
    assert next(doctor.data_folder()) == Finding(
        "data",
        "folder",
        False,
        f"{tmp_path / 'data'}, 0.0 GiB free: free some, or name another with JMOE_DATA_DIR",
        needed=True,
    )
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert next(doctor.data_folder()).detail == (
        f"{tmp_path / 'data'} cannot be written; name another with JMOE_DATA_DIR"
    )
    monkeypatch.setenv("JMOE_DATA_DIR", "gs://bucket/data")
    assert next(doctor.data_folder()) == Finding(
        "data", "folder", None, "gs://bucket/data is remote and was not looked at"
    )


class Usage:
    def __init__(self, free):
        self.free = free


def test_the_memory_is_that_of_this_machine():
    assert 2**28 < doctor.memory_bytes() < 2**50
