"""Checks and times everything that has a kernel for NVIDIA GPUs, in one command of at most eight minutes.

    python benchmarks/gpu.py --out benchmarks/results/NAME.json

It prints what it measures and writes it as JSON after every job, so that nothing is lost if it is stopped. A job that
fails or no longer fits into the time is reported, and the rest goes on. Exit status: 0 if every job that ran came out
right, 1 if one did not, 2 on a machine without such a GPU. README.md beside this file says what is measured.

    python benchmarks/gpu.py --rehearse

runs every job on any machine, at tiny sizes and with interpreted kernels. What it prints is no measurement.
"""

# ruff: noqa: E402 - the path and JAX's memory are set before anything is imported that reads them

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import math
import os
import pathlib
import statistics
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the checkout need not be installed
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch wants memory of the same GPU

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import combine_rows, gather_rows, grouped_matmul, rows
from kernels_pallas.cases import CASES, Case
from kernels_pallas.grouped_matmul import gpu as matmul_kernels
from kernels_pallas.rows import gpu as row_kernels
from kernels_pallas.timing import paired_times

SECONDS = 455.0
GRACE = 20.0  # what a job may take beyond them before the process is ended: with the start, eight minutes in all
BFLOAT16 = jnp.bfloat16
# Worst errors that are taken for right, relative to the largest value. float32 is multiplied exactly (precision
# "highest") but for the check of the default, TF32, which has bfloat16's exponent and ten bits.
LIMITS = {"float32": 2e-5, "bfloat16": 2.0**-6, "float16": 2.0**-9, "tf32": 5e-3}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What a run is of: the GPU at hand, or a rehearsal of every line of this file.

    Attributes:
      kernel: the implementation that is checked and timed.
      checked: cases of the checks.
      timed: cases of the benchmarks, in order of importance.
      experts: E of the benchmarks of rows.
      runs: how often everything is timed.
      most_calls: of a function that are queued at a time.
      copied: float32 numbers of the copy that measures the bandwidth.
      squared: size of the square matrices that measure the dense product.
      row_tiles: of the kernels for rows, tried one after the other.
      matmul_tiles: of the kernels for products.
    """

    kernel: str
    checked: tuple[Case, ...]
    timed: tuple[Case, ...]
    experts: tuple[int, ...]
    runs: int
    most_calls: int
    copied: int
    squared: int
    row_tiles: tuple[row_kernels.TileConfig, ...]
    matmul_tiles: tuple[matmul_kernels.TileConfig, ...]


# As many images as make arrays of the order of 100 MB, several times the L2 cache; groups are of 8 images.
IMAGES = {"B/16": 256, "H/14": 128, "S/32": 1024, "B/16-384": 128}
REAL = Setting(
    kernel="pallas",
    checked=(CASES["B/16"], CASES["S/32"], CASES["H/14"], CASES["B/16-384"]),
    timed=tuple(dataclasses.replace(CASES[name], images=images) for name, images in IMAGES.items()),
    experts=(8, 32),
    runs=20,
    most_calls=20,
    copied=2**28,
    squared=8192,
    row_tiles=tuple(
        row_kernels.TileConfig(rows=rows, columns=columns, num_warps=warps)
        for rows, columns, warps in (
            (8, 256, 4), (4, 256, 4), (16, 256, 4), (32, 256, 8), (4, 512, 4), (8, 512, 4), (2, 1024, 4), (4, 1024, 8)
        )
    ),
    matmul_tiles=tuple(
        matmul_kernels.TileConfig(rows=rows, columns=columns, depth=depth, num_warps=warps, num_stages=stages)
        for rows, columns, depth, warps, stages in (
            (128, 128, 128, 8, 3), (128, 128, 128, 8, 4), (128, 256, 128, 8, 3), (128, 256, 128, 8, 4),
            (64, 128, 128, 4, 4), (64, 256, 128, 4, 4), (128, 128, 64, 4, 4), (256, 128, 128, 8, 3),
        )
    ),
)  # fmt: skip
SMALL = Case(name="tiny", width=40, hidden_dim=48, tokens=3, num_experts=4)
REHEARSAL = Setting(
    kernel="interpret-gpu",
    checked=(SMALL,),
    timed=(dataclasses.replace(SMALL, images=16),),
    experts=(4,),
    runs=2,
    most_calls=1,
    copied=2**10,
    squared=32,
    row_tiles=(row_kernels.TileConfig(), row_kernels.TileConfig(rows=16, columns=32)),
    matmul_tiles=(matmul_kernels.TileConfig(), matmul_kernels.TileConfig(rows=32, columns=32, depth=64)),
)


SECTIONS = ("ceilings", "checks", "rows", "products", "layers", "peers", "tiles", "more_layers", "more_rows")


class WrongResultError(Exception):
    """A check that came out wrong; the first argument is what it found."""


class Run:
    """Jobs done one after the other, their results printed and kept in a file."""

    def __init__(self, setting: Setting, out: pathlib.Path | None, seconds: float):
        self.setting, self.out, self.seconds, self.started = setting, out, seconds, time.monotonic()
        self.report: dict[str, Any] = about(setting) | {"complete": False, "sections": {}}
        self.failed: list[str] = []
        self.skipped: list[str] = []

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.seconds - (time.monotonic() - self.started)

    def job(self, section: str, name: str, needs: float, function: Callable[[], Mapping[str, Any]]) -> None:
        """Does one job, unless it needs more seconds than are left, or has been done."""
        if name in self.report["sections"].get(section, ()):
            return
        result: dict[str, Any]
        started = time.monotonic()
        if self.left < needs:
            result = {"skipped": f"{needs:.0f} s were wanted and {max(self.left, 0):.0f} s were left of the time."}
            self.skipped.append(f"{section}: {name}")
        else:
            try:
                result = dict(function())
            except WrongResultError as wrong:
                result = {"failed": "wrong", **wrong.args[0]}
            except Exception as error:
                traceback.print_exc(limit=-4, file=sys.stderr)
                result = {"failed": brief(error)}
            if "failed" in result:
                self.failed.append(f"{section}: {name}")
        result["job_seconds"] = round(time.monotonic() - started, 1)
        if section not in self.report["sections"]:
            print(f"\n{section}", flush=True)
        self.report["sections"].setdefault(section, {})[name] = result
        show(name, result)
        self.save()

    def save(self, **more: Any) -> None:
        """Writes what there is; a reader never finds half a file."""
        used = round(time.monotonic() - self.started, 1)
        self.report |= {"failed": self.failed, "skipped": self.skipped, "seconds": used, **more}
        if self.out:
            part = self.out.with_suffix(".part")
            part.write_text(json.dumps(self.report, indent=1) + "\n")
            part.replace(self.out)

    def measure(
        self, functions: Mapping[str, Callable[[], Any]], most_calls: int | None = None
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Medians of paired runs in microseconds; and what could not run, with the reason."""
        working, broken, slowest = {}, {}, 0.0
        for name, function in functions.items():
            try:
                jax.block_until_ready(function())
                started = time.perf_counter()
                jax.block_until_ready(function())
                slowest = max(slowest, time.perf_counter() - started)
                working[name] = function
            except Exception as error:
                broken[name] = brief(error)
        calls = max(1, min(most_calls or self.setting.most_calls, math.ceil(5e-3 / max(slowest, 1e-6))))
        times = paired_times(working, runs=self.setting.runs, calls=calls)
        return {name: 1e6 * statistics.median(values) for name, values in times.items()}, broken


def main(arguments: Sequence[str] | None = None) -> int:
    """Does every job that fits into the time."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--out", type=pathlib.Path, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes and interpreted kernels, on any machine")
    parser.add_argument("--only", choices=SECTIONS, action="append", help="a section; may be repeated (all of them)")
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="N", help=f"for all jobs ({SECONDS:.0f})")
    options = parser.parse_args(arguments)
    if not options.rehearse and (reason := no_gpu()):
        print(f"benchmarks/gpu.py wants an NVIDIA GPU: {reason} Use --rehearse to run it without one.", file=sys.stderr)
        return 2
    if options.out and not options.out.parent.is_dir():
        print(f"--out wants a file in a folder that exists; {options.out.parent} does not.", file=sys.stderr)
        return 1
    run = Run(REHEARSAL if options.rehearse else REAL, options.out, options.seconds)
    watchdog = threading.Timer(run.left + GRACE, out_of_time, [run])  # for a job that hangs in the compiler
    watchdog.daemon = True
    watchdog.start()
    if options.rehearse:
        print("A rehearsal: kernels are interpreted, arrays are tiny, and no figure below is a measurement.")
    print(" | ".join(f"{name} {value}" for name, value in run.report.items() if isinstance(value, str)))
    print(" | ".join(f"{name} {version}" for name, version in run.report["versions"].items()))
    for name in SECTIONS:
        if name in (options.only or SECTIONS):
            globals()[f"do_{name}"](run)
    watchdog.cancel()
    run.save(complete=True)
    for what, names in (("wrong or failed", run.failed), ("skipped for want of time", run.skipped)):
        print(f"\n{len(names)} jobs {what}" + "".join(f"\n  {name}" for name in names))
    print(f"{run.report['seconds']:.0f} s" + (f", results in {options.out}" if options.out else ""))
    return 1 if run.failed else 0


def out_of_time(run: Run) -> None:
    """Ends the process where it stands; what was measured has been written."""
    print(f"\n{run.seconds + GRACE:.0f} s are over in the middle of a job; what came before it is written.", flush=True)
    os._exit(1)


def no_gpu() -> str | None:
    """Why nothing can be measured here, or None."""
    if jax.default_backend() != "gpu":
        return f"JAX finds none here, its default device is {jax.devices()[0].device_kind}."
    from kernels_pallas.per_platform import device_refusal

    return device_refusal("gpu")


def about(setting: Setting) -> dict[str, Any]:
    """The machine and the software."""
    device = jax.devices()[0]
    versions = {}
    for package in ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "torch", "triton", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "rehearsed": setting is REHEARSAL,
        "device": device.device_kind,
        "compute_capability": str(getattr(device, "compute_capability", "none")),
        "python": sys.version.split()[0],
        "versions": versions,
        "defaults": {
            "rows": dataclasses.asdict(row_kernels.TileConfig()),
            "products": dataclasses.asdict(matmul_kernels.TileConfig()),
        },
    }


def brief(error: Exception) -> str:
    """The kind of an error and the first lines of what it says."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def show(name: str, result: Mapping[str, Any]) -> None:
    """Prints a job: what it found, a paragraph for each group of figures."""
    print(f"  {name} ({result['job_seconds']} s)")
    for key, value in result.items():
        if isinstance(value, Mapping):
            value = " | ".join(f"{label} {shown(figure)}" for label, figure in value.items())
        if key != "job_seconds" and value != "":
            text = f"{key}: {shown(value)}"
            print(textwrap.fill(text, 118, initial_indent=" " * 4, subsequent_indent=" " * 8))
    sys.stdout.flush()


def shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------------------------------------------- ceilings


def do_ceilings(run: Run) -> None:
    """What the memory and the matrix units of this GPU do at most: a large copy, a large product."""
    setting = run.setting

    def copy():
        # Signs change, because the compiler would give back the array itself for a copy of it.
        array, negate = jnp.ones(setting.copied, jnp.float32), jax.jit(jnp.negative)
        times, _ = run.measure({"copy": lambda: negate(array)})
        run.report["bytes_per_us"] = 2 * array.nbytes / times["copy"]
        return {"microseconds": times, "GB/s read and written": run.report["bytes_per_us"] / 1e3}

    def product():
        n, multiply = setting.squared, jax.jit(jnp.matmul)
        a, b = (jax.random.normal(jax.random.key(i), (n, n), BFLOAT16) for i in range(2))
        times, _ = run.measure({"product": lambda: multiply(a, b)})
        return {"microseconds": times, "TFLOP/s": 2 * n**3 / times["product"] / 1e6}

    run.job("ceilings", "copy", 5, copy)
    run.job("ceilings", f"bfloat16 product of {setting.squared}", 5, product)


# ------------------------------------------------------------------------------------------------------------ checks


def do_checks(run: Run) -> None:
    """Every kernel against the reference of its op, values and gradients."""
    first, *others = run.setting.checked
    for case, dtype in ((first, "bfloat16"), (first, "float32"), *((case, "bfloat16") for case in others)):
        name = f"{case.name} {dtype}"
        run.job("checks", f"gather_rows {name}", 10, functools.partial(check_gather_rows, run, case, dtype))
        run.job("checks", f"combine_rows {name}", 10, functools.partial(check_combine_rows, run, case, dtype))
        check = functools.partial(check_grouped_matmul, run, case, dtype)
        run.job("checks", f"grouped_matmul {name}", 20, check)
        if case is first:
            run.job("checks", f"grouped_matmul, fused, {name}", 20, functools.partial(check, fused=True))
            run.job("checks", f"layer {name}", 30, functools.partial(check_layer, run, case, dtype))
    default = functools.partial(check_grouped_matmul, run, first, "float32", limit="tf32")
    run.job("checks", f"grouped_matmul {first.name} float32 at default precision", 20, default)
    run.job("checks", "rows of odd shapes", 30, functools.partial(check_odd_rows, run))
    run.job("checks", "rows under vmap", 10, functools.partial(check_vmap, run))


def verdict(errors: Mapping[str, float], limit: float) -> dict[str, Any]:
    """The errors, if all are within the limit.

    Raises:
      WrongResultError: one is not, or is no number.
    """
    found = {"errors": dict(errors), "limit": limit}
    if not all(error <= limit for error in errors.values()):
        raise WrongResultError(found)
    return found


def error_of(actual: jax.Array, expected: jax.Array) -> float:
    """The largest difference, relative to the largest value that was expected."""
    found, wanted = (np.asarray(a, np.float32) for a in (actual, expected))
    return float(np.max(np.abs(found - wanted)) / max(float(np.max(np.abs(wanted))), 1e-30))


def compare(
    function: Callable[..., Any],
    names: Sequence[str],
    primals: tuple,
    others: tuple,
    kernel: str,
    precision: str | None,
) -> dict[str, float]:
    """Errors of the result and of the gradients in primals, against the reference."""

    @functools.partial(jax.jit, static_argnums=0)
    def both(implementation, primals, others, dout):
        out, back = jax.vjp(lambda *primals: function(*primals, *others, implementation=implementation), *primals)
        return out, *back(dout.astype(out.dtype))

    like = jax.eval_shape(functools.partial(function, implementation="reference"), *primals, *others)
    dout = jax.random.normal(jax.random.key(9), like.shape, like.dtype)
    with jax.default_matmul_precision(precision) if precision else contextlib.nullcontext():
        actual, expected = (both(name, primals, others, dout) for name in (kernel, "reference"))
    return {name: error_of(a, e) for name, a, e in zip(("value", *names), actual, expected, strict=True)}


def check_gather_rows(run: Run, case: Case, dtype: str) -> dict[str, Any]:
    """Dispatch: slots, and the gradient of tokens."""
    slots, choice = index_pair(case)
    x = jax.random.normal(jax.random.key(0), (slots.shape[0], case.width), dtype)
    errors = compare(gather_rows, ["dx"], (x,), (slots, choice), run.setting.kernel, "highest")
    if errors["value"] != 0:  # rows are copied
        raise WrongResultError({"errors": errors, "limit": "0 for values"})
    return verdict(errors, LIMITS[dtype])


def check_combine_rows(run: Run, case: Case, dtype: str) -> dict[str, Any]:
    """Combine: tokens, and the gradients of slots and weights."""
    slots, choice = index_pair(case)
    y = jax.random.normal(jax.random.key(0), (choice.shape[0], case.width), dtype)
    weights = jax.random.uniform(jax.random.key(1), slots.shape)

    def call(y, weights, slots, choice, implementation):
        return combine_rows(y, slots, weights, choice, implementation=implementation)

    errors = compare(call, ["dy", "dweights"], (y, weights), (slots, choice), run.setting.kernel, "highest")
    return verdict(errors, LIMITS[dtype])


def check_grouped_matmul(
    run: Run, case: Case, dtype: str, *, fused: bool = False, limit: str | None = None
) -> dict[str, Any]:
    """The first layer of the experts, plain, or with gathered rows, bias and activation; some rows are of no group."""
    slots, choice = index_pair(case)
    E, D, F = case.num_experts, case.width, case.hidden_dim
    sizes = jnp.asarray(case.rows.group_sizes)
    # As large as in a trained layer, so that the activation is not flat.
    x = jax.random.normal(jax.random.key(0), (slots.shape[0] if fused else slots.size, D), dtype)
    w = (jax.random.normal(jax.random.key(1), (E, D, F)) / math.sqrt(D)).astype(dtype)
    bias = jax.random.normal(jax.random.key(2), (E, F), dtype)

    def plain(x, w, sizes, implementation):
        return grouped_matmul(x, w, sizes, implementation=implementation)

    def all_in_one(x, w, bias, sizes, slots, choice, implementation):
        options = {"rows": (slots, choice), "bias": bias, "activation": "gelu"}
        return grouped_matmul(x, w, sizes, implementation=implementation, **options)

    kernel, precision = run.setting.kernel, None if limit else "highest"
    if fused:
        errors = compare(all_in_one, ["dx", "dw", "dbias"], (x, w, bias), (sizes, slots, choice), kernel, precision)
    else:
        errors = compare(plain, ["dx", "dw"], (x, w), (sizes,), kernel, precision)
    return verdict(errors, LIMITS[limit or dtype])


def check_layer(run: Run, case: Case, dtype: str) -> dict[str, Any]:
    """The whole layer with kernels against the same without."""
    errors = {}
    with jax.default_matmul_precision("highest"):
        for method in ("gather", "ragged"):
            found = [layer_step(case, method, i, dtype).compiled()() for i in (run.setting.kernel, "xla")]
            leaves = [jax.tree.leaves(one) for one in found]
            names = ["value", *(f"gradient {i}" for i in range(len(leaves[0]) - 1))]
            errors |= {f"{method}, {name}": error_of(a, e) for name, a, e in zip(names, *leaves, strict=True)}
    return verdict(errors, max(LIMITS[dtype], 1e-4))  # a step sums over all tokens, twice in different order


def check_odd_rows(run: Run) -> dict[str, Any]:
    """Widths that are no multiple of anything, few and many rows per sum, indices that name nothing, float16."""
    errors, kernel = {}, run.setting.kernel
    n, m = (1009, 997) if kernel == "pallas" else (23, 19)
    for d, k, dtype in ((83, 2, "float32"), (1408, 1, "bfloat16"), (1408, 32, "bfloat16"), (5, 11, "float16")):
        keys = jax.random.split(jax.random.key(d + k), 5)
        index = jax.random.randint(keys[0], (m, k), -n // 2, n + n // 2)
        x, other = (jax.random.normal(key, (count, d), dtype) for key, count in zip(keys[1:3], (n, m), strict=True))
        weights = jax.random.normal(keys[3], (m, k))
        name = f"{d} wide, {k} per sum, {dtype}:"
        for weighted in (weights, None):
            a, e = (rows.gather_sum(x, index, weighted, implementation=i) for i in (kernel, "xla"))
            errors[f"{name} sum{'' if weighted is None else ' by weight'}"] = error_of(a, e) / LIMITS[dtype]
        a, e = (rows.gather_dot(x, index[:, 0], weights[:, 0], other, implementation=i) for i in (kernel, "xla"))
        errors[f"{name} scaled"] = error_of(a[0], e[0]) / LIMITS[dtype]
        errors[f"{name} products"] = error_of(a[1], e[1]) / LIMITS["float32"]
    return verdict(errors, 1.0)  # errors are relative to their limits


def check_vmap(run: Run) -> dict[str, Any]:
    """One kernel after the other."""
    x = jax.random.normal(jax.random.key(0), (3, 50, 64))
    index = jax.random.randint(jax.random.key(1), (3, 40, 2), 0, 60)
    a, e = (
        jax.jit(jax.vmap(lambda x, index, i=i: rows.gather_sum(x, index, implementation=i)))(x, index)
        for i in (run.setting.kernel, "xla")
    )
    return verdict({"value": error_of(a, e)}, LIMITS["float32"])


def index_pair(case: Case) -> tuple[jax.Array, jax.Array]:
    """The slots [n, k] and choice [m] of a case."""
    return jnp.asarray(case.rows.slots), jnp.asarray(case.rows.choice)


# ------------------------------------------------------------------------------------------------------------- times


def do_rows(run: Run) -> None:
    """Dispatch and combine, forward and backward, as shares of the bandwidth of the copy."""
    for case in run.setting.timed:
        time_rows_of(run, case, run.setting.experts[0], 2)


def do_more_rows(run: Run) -> None:
    """Other numbers of experts, and one expert per token."""
    others = [(E, k) for E in run.setting.experts for k in (2, 1)][1:]
    for case in run.setting.timed:
        for E, k in others:
            time_rows_of(run, case, E, k)


def time_rows_of(run: Run, case: Case, E: int, k: int) -> None:
    one = dataclasses.replace(case, num_experts=E, k=k)
    name = f"{case.name} E={E} K={k}, {case.images} images"
    run.job("dispatch and combine, bfloat16", name, 15, functools.partial(time_rows, run, one))


def time_rows(run: Run, case: Case) -> dict[str, Any]:
    """Microseconds and shares of all four passes, with the kernel and with XLA."""
    decision, (slots, choice) = case.rows, index_pair(case)
    (n, k), m, D = slots.shape, choice.shape[0], case.width
    x, dy = (jax.random.normal(jax.random.key(i), (n, D), BFLOAT16) for i in range(2))
    y, dx = (jax.random.normal(jax.random.key(i), (m, D), BFLOAT16) for i in range(2, 4))
    weights = jax.random.uniform(jax.random.key(5), (n, k))
    # What must move: a row that is read is read once, whoever names it again; indices and weights are small.
    moved = {
        "dispatch": decision.served + m,
        "dispatch, backward": decision.filled + n,
        "combine": decision.filled + n,
        "combine, backward": decision.served + decision.filled + m,
    }

    def passes(i):
        def dispatch(x):
            return gather_rows(x, slots, choice, implementation=i)

        def combine(y, weights):
            return combine_rows(y, slots, weights, choice, implementation=i)

        return {
            "dispatch": (dispatch, (x,)),
            "dispatch, backward": (lambda x, dx: jax.vjp(dispatch, x)[1](dx), (x, dx)),
            "combine": (combine, (y, weights)),
            "combine, backward": (lambda y, weights, dy: jax.vjp(combine, y, weights)[1](dy), (y, weights, dy)),
        }

    result: dict[str, Any] = {}
    contenders = {name: passes(i) for name, i in (("pallas", run.setting.kernel), ("xla", "xla"))}
    for part, count in moved.items():
        works = {name: parts[part] for name, parts in contenders.items()}
        times, broken = run.measure({name: functools.partial(jax.jit(f), *a) for name, (f, a) in works.items()})
        result[f"{part}, us"] = times
        if copied := run.report.get("bytes_per_us"):
            result[f"{part}, share"] = {name: count * D * 2 / us / copied for name, us in times.items()}
        if broken:
            result.setdefault("failed", {})[part] = broken
    return result


def do_products(run: Run) -> None:
    """The grouped matrix multiply beside a dense one of as many FLOPs."""
    B16, H14 = (run.setting.timed * 2)[:2]
    for case, E in ((B16, run.setting.experts[0]), (H14, run.setting.experts[-1]), (B16, run.setting.experts[-1])):
        one = dataclasses.replace(case, num_experts=E)
        name = f"{case.name} E={E} K={case.k}, {case.images} images"
        run.job("grouped matmul, bfloat16", name, 45, functools.partial(time_products, run, one))


def time_products(run: Run, case: Case) -> dict[str, Any]:
    """The first layer of the experts: the kernel, XLA's ragged product, a padded batched product, JAX's own kernel."""
    decision = case.rows
    E, D, F = case.num_experts, case.width, case.hidden_dim
    m, filled, slots = decision.slots.size, decision.filled, len(decision.choice)
    sizes = jnp.asarray(decision.group_sizes)
    x = jax.random.normal(jax.random.key(0), (m, D), BFLOAT16)
    w = jax.random.normal(jax.random.key(1), (E, D, F), BFLOAT16)
    padded = jax.random.normal(jax.random.key(2), (E, slots // E, D), BFLOAT16)

    def ours(i):
        return lambda x, w: grouped_matmul(x, w, sizes, implementation=i)

    forms: dict[str, tuple[Callable[..., jax.Array], tuple[jax.Array, jax.Array]]] = {
        "dense": (jnp.matmul, (x[:filled], w[0])),
        "pallas": (ours(run.setting.kernel), (x, w)),
        "xla": (ours("xla"), (x, w)),
        "padded": (lambda x, w: jnp.einsum("END,EDF->ENF", x, w), (padded, w)),
    }

    def both(function):
        def call(x, w):
            out, back = jax.vjp(function, x, w)
            return out, back(out)

        return call

    forward = {name: functools.partial(jax.jit(f), *a) for name, (f, a) in forms.items()}
    broken = {}
    try:
        forward["JAX's Mosaic kernel"] = functools.partial(jax.jit(mosaic(x, w, sizes)), x, w)
    except Exception as error:
        broken["JAX's Mosaic kernel"] = brief(error)
    times, unable = run.measure(forward)
    both_times, unable_both = run.measure(
        {name: functools.partial(jax.jit(both(f)), *a) for name, (f, a) in forms.items()}
    )
    result: dict[str, Any] = {}
    for part, found, products in (("forward", times, 1), ("forward and backward", both_times, 3)):
        result[f"{part}, us"] = found
        result[f"{part}, TFLOP/s"] = {name: products * 2 * filled * D * F / us / 1e6 for name, us in found.items()}
        if "dense" in found:
            result[f"{part}, share"] = {name: found["dense"] / us for name, us in found.items() if name != "dense"}
    result |= {"padding": slots / filled, "not run": broken | unable}
    if wrong := {name: why for name, why in (unable | unable_both).items() if name in ("pallas", "xla")}:
        result["failed"] = wrong
    return result


def mosaic(x: jax.Array, w: jax.Array, sizes: jax.Array) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """JAX's own ragged product for Hopper, forward alone, in the first of a few tilings that works.

    Raises:
      Exception: whatever it says about the last of them.
    """
    module = importlib.import_module("jax.experimental.pallas.ops.gpu.ragged_dot_mgpu")
    reason: Exception = RuntimeError("no tiling")
    for block_m, block_n, stages in ((128, 128, 4), (64, 128, 4), (64, 64, 2)):
        tiling = {"block_m": block_m, "block_n": block_n, "block_k": 64, "max_concurrent_steps": stages}
        call = functools.partial(module.ragged_dot, group_sizes=sizes, grid_block_n=1, **tiling)
        try:
            jax.block_until_ready(jax.jit(call)(x, w))
            return call
        except Exception as error:
            reason = error
    raise reason


# ------------------------------------------------------------------------------------------------------------ layers


@dataclasses.dataclass(frozen=True)
class Step:
    """Value and gradient of a mean of squares, as a function of parameters and tokens."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]

    def compiled(self) -> Callable[[], Any]:
        """A function without arguments that does it."""
        return functools.partial(jax.jit(self.function), *self.arguments)


def layer_of(case: Case, method: str, implementation: str | None, dtype: Any) -> Any:
    """The layer of jmoe; method "dense" is one MLP."""
    from flax import nnx

    from jmoe import MoEConfig, MoEMlp, TopK
    from jmoe.nn.mlp import Mlp

    if method == "dense":
        return Mlp(case.width, case.hidden_dim, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))
    config = MoEConfig(
        num_experts=case.num_experts,
        hidden_dim=case.hidden_dim,
        router=TopK(k=case.k, capacity_factor=case.capacity_factor),
        method="ragged" if method == "ragged" else "einsum" if method == "einsum" else "gather",
        expert_init="independent",
    )
    # MoEConfig refuses the interpreter, which is for tests; a rehearsal is one.
    object.__setattr__(config, "implementation", implementation)
    return MoEMlp(config, case.width, dtype=jnp.dtype(dtype), rngs=nnx.Rngs(0))


@functools.lru_cache(maxsize=4)  # those of all methods are the same arrays
def parameters_of(case: Case, dense: bool) -> list[jax.Array]:
    """Parameters in float32, drawn by one program."""
    from flax import nnx

    draw = jax.jit(lambda: jax.tree.leaves(nnx.state(layer_of(case, "dense" if dense else "gather", None, BFLOAT16))))
    return draw()


def layer_step(case: Case, method: str, implementation: str | None, dtype: Any = BFLOAT16) -> Step:
    """Value and gradient of jmoe's layer; method "dense" is one MLP over as many rows as there are slots."""
    from flax import nnx

    from jmoe.analysis.speed import published_einsum

    shape = (len(case.rows.choice),) if method == "dense" else (case.images, case.tokens)
    x = jax.random.normal(jax.random.key(0), (*shape, case.width), dtype)
    graph, state = nnx.split(nnx.eval_shape(lambda: layer_of(case, method, implementation, dtype)))
    structure = jax.tree.structure(state)

    def function(leaves, x):
        def loss(leaves, x):
            module = nnx.merge(graph, jax.tree.unflatten(structure, leaves))
            output: Any = published_einsum(module, x) if method == "published" else module(x)
            y = output if method in ("dense", "published") else output.y
            return jnp.mean(jnp.square(y.astype(jnp.float32)))

        return jax.value_and_grad(loss, argnums=(0, 1))(leaves, x)

    return Step(function, (parameters_of(case, method == "dense"), x))


def do_layers(run: Run) -> None:
    """The whole layer at the size that matters most."""
    time_layer_of(run, run.setting.timed[0], run.setting.experts[0])


def do_more_layers(run: Run) -> None:
    """The other sizes, as far as there is time."""
    for case in run.setting.timed[1:]:
        time_layer_of(run, case, run.setting.experts[0])
    time_layer_of(run, run.setting.timed[0], run.setting.experts[-1])


def time_layer_of(run: Run, case: Case, E: int) -> None:
    images = max(8, case.images // 4)  # activations of every contender's gradient fit side by side
    one = dataclasses.replace(case, num_experts=E, images=images)
    name = f"{case.name} E={E} K={case.k}, {images} images"
    run.job("layer, forward and backward, bfloat16", name, 60, functools.partial(time_layer, run, one))


def time_layer(run: Run, case: Case) -> dict[str, Any]:
    """Every method of dispatch, with the kernels and without, beside the dense MLP."""
    kernel = run.setting.kernel
    steps = {
        "dense": ("dense", None),
        "gather, pallas": ("gather", kernel),
        "gather, xla": ("gather", "xla"),
        "ragged, pallas": ("ragged", kernel),
        "ragged, xla": ("ragged", "xla"),
        "einsum": ("einsum", None),
        "published einsum": ("published", None),
    }
    functions, broken = {}, {}
    for name, (method, implementation) in steps.items():
        try:
            functions[name] = layer_step(case, method, implementation).compiled()
        except Exception as error:
            broken[name] = brief(error)
    times, unable = run.measure(functions)
    broken |= unable
    result: dict[str, Any] = {"us": times}
    if "dense" in times:
        result["over dense"] = {name: us / times["dense"] for name, us in times.items() if name != "dense"}
    if "gather, pallas" in times and "einsum" in times:
        result["einsum over gather"] = times["einsum"] / times["gather, pallas"]
    return result | ({"failed": broken} if broken else {})


# ------------------------------------------------------------------------------------------------------------- peers


def do_peers(run: Run) -> None:
    """A dropless layer against one in PyTorch, in the same run."""
    case = run.setting.timed[0]
    one = dataclasses.replace(case, num_experts=run.setting.experts[0], images=max(8, case.images // 4))
    name = f"{case.name} E={one.num_experts} K={case.k}, {one.images} images"
    run.job("dropless layer beside PyTorch, bfloat16", name, 45, functools.partial(time_peers, run, one))


def time_peers(run: Run, case: Case) -> dict[str, Any]:
    """Forward and backward; the layers have the same parameters, and their results are compared."""
    try:
        import torch  # pyright: ignore[reportMissingImports]

        from benchmarks import torch_moe
    except ImportError as error:
        return {"no peer": f"PyTorch cannot be imported: {error}."}
    device = "cpu" if run.setting is REHEARSAL else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        return {"no peer": "PyTorch finds no GPU."}
    from flax import nnx

    dropless = dataclasses.replace(case, capacity_factor=case.num_experts / case.k)  # room for a whole group
    functions = {
        name: layer_step(dropless, "ragged", implementation).compiled()
        for name, implementation in (("jmoe ragged, pallas", run.setting.kernel), ("jmoe ragged, xla", "xla"))
    }
    functions["jmoe gather, pallas, with capacity"] = layer_step(case, "gather", run.setting.kernel).compiled()

    graph, state = nnx.split(nnx.eval_shape(lambda: layer_of(dropless, "ragged", "xla", BFLOAT16)))
    leaves, structure = parameters_of(dropless, False), jax.tree.structure(state)
    layer = nnx.merge(graph, jax.tree.unflatten(structure, leaves))
    x = layer_step(dropless, "ragged", "xla").arguments[1]
    arrays = {name: np.asarray(getattr(layer.experts, name)[...]) for name in torch_moe.NAMES[1:]}
    [gate] = jax.tree.leaves(nnx.state(layer.gate))
    arrays["gate"] = np.asarray(gate).reshape(case.width, case.num_experts)
    parameters = torch_moe.parameters(arrays, device)
    tokens = np.asarray(x.astype(jnp.float32)).reshape(-1, case.width)
    make = functools.partial(torch_moe.gradient_step, p=parameters, device=device)
    torch_steps = {
        name: make(torch_moe.layer, tokens, k=case.k, product=product) for name, product in torch_moe.PRODUCTS.items()
    }
    rows_in = np.tile(tokens, (case.k, 1))  # as many rows as the experts of a dropless layer have
    torch_steps["torch dense"] = make(torch_moe.dense, rows_in)
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def waited(one: Callable[[], Any]) -> Callable[[], None]:
        def call() -> None:
            one()
            synchronize()

        return call

    errors, broken = {}, {}

    def result_of(leaves, x):
        return nnx.merge(graph, jax.tree.unflatten(structure, leaves))(x).y

    expected = np.asarray(jax.jit(result_of)(leaves, x), np.float32).reshape(-1, case.width)
    for name in torch_moe.PRODUCTS:
        try:
            found = torch_steps[name]().float().cpu().numpy()
            # In bfloat16 two experts can gate a token alike in one framework and not in the other: most tokens count.
            row_errors = np.max(np.abs(found - expected), axis=1) / np.max(np.abs(expected))
            errors[name] = float(np.quantile(row_errors, 0.99))
        except Exception as error:
            broken[name] = brief(error)
            del torch_steps[name]
    # PyTorch's calls are awaited one by one, so jmoe's are, too.
    calls = {name: waited(one) for name, one in torch_steps.items()}
    for name, function in functions.items():
        calls[name] = functools.partial(lambda f: jax.block_until_ready(f()), function)
    times, unable = run.measure(calls, most_calls=1)
    result = {"us": times, "99% of tokens differ from jmoe's by at most": errors, "not run": broken | unable}
    torch_times = [us for name, us in times.items() if name in torch_moe.PRODUCTS]
    if torch_times and "jmoe ragged, pallas" in times:
        result["fastest of PyTorch over jmoe ragged, pallas"] = min(torch_times) / times["jmoe ragged, pallas"]
    return result


# ------------------------------------------------------------------------------------------------------------- tiles


def do_tiles(run: Run) -> None:
    """A few tilings of every kernel, so that the defaults can be chosen."""
    case = dataclasses.replace(run.setting.timed[0], num_experts=run.setting.experts[0])
    section = f"tilings, {case.name} E={case.num_experts} K={case.k}, bfloat16"
    for name in ("gather_sum, K=1", f"gather_sum, K={case.k}, by weight", "gather_dot"):
        run.job(section, name, 20, functools.partial(time_tiles, run, case, name, run.setting.row_tiles))
    for name in ("grouped_matmul", "grouped_matmul, transposed", "grouped_outer"):
        run.job(section, name, 40, functools.partial(time_tiles, run, case, name, run.setting.matmul_tiles))


def tiled(case: Case, name: str) -> tuple[Callable[..., Any], tuple[jax.Array, ...]]:
    """A kernel and its arguments."""
    slots, choice = index_pair(case)
    (n, k), m = slots.shape, choice.shape[0]
    D, F, E = case.width, case.hidden_dim, case.num_experts

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(len(shape)), shape, BFLOAT16)

    match name.split(",")[0]:
        case "gather_dot":
            return row_kernels.gather_dot, (normal(n, D), choice // k, jnp.ones(m), normal(m, D))
        case "gather_sum" if name.endswith("K=1"):
            return row_kernels.gather_sum, (normal(n, D), (choice // k)[:, None])
        case "gather_sum":
            return row_kernels.gather_sum, (normal(m, D), slots, jnp.ones((n, k)))
    rows_in, rows_out, sizes = normal(n * k, D), normal(n * k, F), jnp.asarray(case.rows.group_sizes)
    match name:
        case "grouped_outer":
            return matmul_kernels.grouped_outer, (rows_in, rows_out, sizes)
        case "grouped_matmul":
            return matmul_kernels.grouped_matmul, (rows_in, normal(E, D, F), sizes)
    transposed = functools.partial(matmul_kernels.grouped_matmul, transposed=True)
    return transposed, (rows_out, normal(E, D, F), sizes)


def time_tiles(run: Run, case: Case, name: str, configs: Sequence[Any]) -> dict[str, Any]:
    """Microseconds of each tiling and which was fastest; one that does not compile is no failure."""
    kernel, arguments = tiled(case, name)
    interpret, functions = run.setting is REHEARSAL, {}
    for config in configs:
        label = " ".join(f"{option}={value}" for option, value in dataclasses.asdict(config).items())
        functions[label] = functools.partial(
            jax.jit(functools.partial(kernel, config=config, interpret=interpret)), *arguments
        )
    times, broken = run.measure(functions)
    if not times:
        raise WrongResultError({"not run": broken})
    fastest = min(times, key=lambda label: times[label])
    first = next(iter(functions))
    gain = {"default over fastest": times[first] / times[fastest]} if first in times else {}
    return {"us": times, "fastest": fastest, **gain, "not run": broken}


if __name__ == "__main__":
    sys.exit(main())
