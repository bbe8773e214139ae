import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from benchmarks import gpu
from kernels_pallas.cases import Case
from tests.kernels_pallas.cuda import triton_kernels

ROOT = pathlib.Path(__file__).parents[1]


def started(*arguments):
    """The script as a user starts it, from elsewhere and not installed."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *map(str, arguments)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, cwd="/", env=environment)


def figures(result):
    """All numbers of a result but the time that it took."""
    for name, value in result.items():
        if isinstance(value, dict):
            yield from figures(value)
        elif isinstance(value, float) and name != "job_seconds":
            yield value


def check_rehearsed(out, printed):
    """A complete report without a failure, every job of it with figures and printed; returns its sections."""
    report = json.loads(out.read_text())
    assert report["rehearsed"]
    assert report["complete"]
    assert report["failed"] == report["skipped"] == []
    assert printed.startswith("A rehearsal: kernels are interpreted")
    assert report["sections"]
    for section in report["sections"].values():
        for name, job in section.items():
            found = list(figures(job))
            assert all(math.isfinite(figure) for figure in found)
            assert found or "no peer" in job
            assert f"  {name} (" in printed
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    return report["sections"]


def test_without_a_gpu_it_says_so_in_a_sentence(tmp_path):
    done = started("--out", tmp_path / "result.json")
    assert done.returncode == 2
    assert done.stderr == (
        "benchmarks/gpu.py wants an NVIDIA GPU: JAX finds none here, its default device is cpu. "
        "Use --rehearse to run it without one.\n"
    )
    assert not done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sections", [("ceilings", "rows"), ("products",), ("tiles",)], ids="-".join)
def test_a_rehearsal_does_every_job_and_writes_what_it_found(sections, tmp_path, capsys):
    out = tmp_path / "result.json"
    only = [option for name in sections for option in ("--only", name)]
    assert gpu.main(["--rehearse", "--seconds", "1500", "--out", str(out), *only]) == 0
    assert len(check_rehearsed(out, capsys.readouterr().out)) == len(sections)


@pytest.mark.slow
def test_a_rehearsal_runs_from_start_to_end(tmp_path):
    out = tmp_path / "result.json"
    done = started("--rehearse", "--seconds", 1500, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    sections = check_rehearsed(out, done.stdout)
    assert len(sections) == len(gpu.SECTIONS) - 2  # the sizes that are left belong to sections that were begun
    layers = sections["layer, forward and backward, bfloat16"]
    assert all({"dense", "gather, pallas", "ragged, pallas", "einsum"} <= set(job["us"]) for job in layers.values())


def test_the_whole_script_does_all_sections():
    assert {f"do_{name}" for name in gpu.SECTIONS} == {name for name in dir(gpu) if name.startswith("do_")}


def test_what_no_longer_fits_into_the_time_is_skipped_and_said(tmp_path, capsys):
    out = tmp_path / "result.json"
    assert gpu.main(["--rehearse", "--seconds", "1", "--only", "checks", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    jobs = report["sections"]["checks"]
    assert len(report["skipped"]) == len(jobs) > 10
    assert jobs["gather_rows tiny bfloat16"]["skipped"] == "10 s were wanted and 1 s were left of the time."
    assert f"{len(jobs)} jobs skipped for want of time" in capsys.readouterr().out


def test_a_job_that_fails_is_reported_and_the_rest_goes_on(tmp_path, capsys, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no\nsuch kernel")

    monkeypatch.setattr(gpu, "gather_rows", broken)
    out = tmp_path / "result.json"
    assert gpu.main(["--rehearse", "--seconds", "1500", "--only", "rows", "--only", "ceilings", "--out", str(out)]) == 1
    report = json.loads(out.read_text())
    assert report["failed"] == ["dispatch and combine, bfloat16: tiny E=4 K=2, 16 images"]
    [job] = report["sections"]["dispatch and combine, bfloat16"].values()
    assert job["failed"]["dispatch"] == dict.fromkeys(("pallas", "xla"), "RuntimeError: no such kernel")
    assert set(job["combine, us"]) == {"pallas", "xla"}
    assert "1 jobs wrong or failed" in capsys.readouterr().out


@pytest.mark.parametrize("error", [2e-5, float("nan")])
def test_a_wrong_result_is_a_failure(error):
    assert gpu.verdict({"value": 1e-6}, 1e-5) == {"errors": {"value": 1e-6}, "limit": 1e-5}
    with pytest.raises(gpu.WrongResultError):
        gpu.verdict({"value": 1e-6, "dx": error}, 1e-5)


def test_errors_are_relative_to_the_largest_value_and_a_nan_is_one():
    assert gpu.error_of(jnp.array([4.0, 1.5]), jnp.array([4.0, 1.0])) == pytest.approx(0.125)
    assert not gpu.error_of(jnp.array([4.0, jnp.nan]), jnp.array([4.0, 1.0])) <= 1


def test_a_folder_that_is_missing_is_said_before_anything_runs(tmp_path, capsys):
    assert gpu.main(["--rehearse", "--out", str(tmp_path / "missing" / "result.json")]) == 1
    assert capsys.readouterr().err == (
        f"--out wants a file in a folder that exists; {tmp_path / 'missing'} does not.\n"
    )


@pytest.mark.parametrize(
    ("method", "kernels"),
    [
        ("gather", {"jmoe_gather_sum": 3, "jmoe_gather_dot": 1}),
        ("ragged", {"jmoe_gather_sum": 3, "jmoe_gather_dot": 1, "jmoe_grouped_matmul": 4, "jmoe_grouped_outer": 2}),
    ],
)
def test_the_layers_that_are_timed_lower_for_cuda_with_kernels(method, kernels):
    case = Case(name="narrow", width=96, hidden_dim=128, tokens=7)
    step = gpu.layer_step(case, method, "pallas")
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), step.arguments)
    names = triton_kernels(step.function, *shapes)
    assert {name: names.count(name) for name in names} == kernels
