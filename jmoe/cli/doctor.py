"""`jmoe doctor`: what this machine has, and what can and cannot be used here, and why."""

import argparse
import dataclasses
import importlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import re
import shutil
import sys
from collections.abc import Iterator

SUMMARY = "Prints versions, devices, and what can and cannot be used here and why. Status 0 if training can run here."
EXAMPLE = "jmoe doctor --json"

PACKAGES = ("jmoe", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets", "numpy")
EXTRAS = ("train", "test", "tpu", "cuda", "plan")
NEWEST_TESTED = {"python": "3.12", "jax": "0.12"}  # a newer one may work
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
      group: its heading.
      name: what was looked at.
      ok: whether it can be used; None if that is no question.
      detail: what was found, or why it cannot be used and what to do.
      needed: whether training cannot run unless this is ok.
    """

    group: str
    name: str
    ok: bool | None
    detail: str
    needed: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `jmoe doctor`."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Prints the report; returns 0 if training can run here, else 1."""
    findings = [*versions(), *extras(), *devices(), *images(), *data_folder(), *layers()]
    obstacles = [finding.name for finding in findings if finding.needed and not finding.ok]
    print(as_json(findings, obstacles) if args.json else as_text(findings, obstacles))
    return 1 if obstacles else 0


def as_text(findings: list[Finding], obstacles: list[str]) -> str:
    """Returns the report as aligned lines under headings."""
    width = max(len(finding.name) for finding in findings)
    lines = []
    for group, members in itertools.groupby(findings, key=lambda finding: finding.group):
        lines.append(group)
        for finding in members:
            mark = {True: "ok", False: "no", None: ""}[finding.ok]
            lines.append(f"  {mark:2}  {finding.name:<{width}}  {finding.detail}")
        lines.append("")
    verdict = f"Training cannot run here because of: {', '.join(obstacles)}." if obstacles else "Training can run here."
    return "\n".join([*lines, verdict])


def as_json(findings: list[Finding], obstacles: list[str]) -> str:
    """Returns the report as a JSON object: by heading and name, whether it is ok, and the detail."""
    report: dict = {"can_train": not obstacles}
    for finding in findings:
        report.setdefault(finding.group, {})[finding.name] = {"ok": finding.ok, "detail": finding.detail}
    return json.dumps(report, indent=2)


def versions() -> Iterator[Finding]:
    """Yields Python and the main packages, held against the oldest that is required and the newest that is tested."""
    python = ".".join(map(str, sys.version_info[:3]))
    yield _version("python", python, _lower_bound(_requires_python()), needed=True)
    required = {requirement.name: requirement for requirement in reversed(requirements("jmoe"))}  # the first wins
    for package in PACKAGES:
        needed = package in required and required[package].extra is None
        if package == "jmoe":
            from jmoe._version import __version__

            yield Finding("versions", package, True, __version__)
        elif found := _installed(package):
            yield _version(package, found, required[package].lower if package in required else None, needed)
        else:
            extra = required[package].extra if package in required else None
            yield Finding("versions", package, False, f"not installed: {_pip(extra)}", needed)


def _version(name: str, found: str, oldest: str | None, needed: bool) -> Finding:
    newest = NEWEST_TESTED.get(name)
    if oldest and _numbers(found) < _numbers(oldest):
        return Finding("versions", name, False, f"{found} is too old: {oldest} or newer is needed", needed)
    if newest and _numbers(found)[:2] > _numbers(newest):
        found += f" is newer than the newest tested, {newest}: it may work"
    return Finding("versions", name, True, found, needed)


def extras() -> Iterator[Finding]:
    """Yields each extra of the package: installed, or which packages are missing or too old."""
    declared = {requirement.extra for requirement in requirements("jmoe")}
    for extra in EXTRAS:
        missing = list(dict.fromkeys(_missing("jmoe", extra)))
        if extra not in declared:
            missing = ["the list of what it holds (jmoe is neither installed nor beside its pyproject.toml)"]
        detail = f"missing: {', '.join(missing)}. {_pip(extra)}" if missing else "installed"
        yield Finding("extras", extra, not missing, detail, needed=extra == "train")


def devices() -> Iterator[Finding]:
    """Yields the devices that JAX found, and the processors and memory of this machine."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("devices", "processors", None, str(processors))
    yield Finding("devices", "memory", None, f"{memory_bytes() / GIB:.1f} GiB")
    try:
        import jax

        found = jax.devices()
    except (ImportError, RuntimeError) as error:
        yield Finding("devices", "jax", False, " ".join(str(error).split()), needed=True)
        return
    backend = jax.default_backend()
    chosen = f" (JAX_PLATFORMS={os.environ['JAX_PLATFORMS']})" if os.environ.get("JAX_PLATFORMS") else ""
    yield Finding("devices", "jax backend", True, f"{backend}{chosen}", needed=True)
    for kind in dict.fromkeys(device.device_kind for device in found):
        same = [device for device in found if device.device_kind == kind]
        limit = (same[0].memory_stats() or {}).get("bytes_limit") if backend != "cpu" else None
        memory = f", {limit / GIB:.1f} GiB each" if limit else ""
        yield Finding("devices", kind, True, f"{len(same)}{memory}")
    for name, node, extra in (("gpu", "/dev/nvidia0", "cuda"), ("tpu", "/dev/accel0", "tpu")):
        if backend == "cpu" and os.path.exists(node):
            why = f"it is told to{chosen}" if chosen else f"its plugin is missing. {_pip(extra)}"
            yield Finding("devices", name, False, f"there is one ({node}), but JAX uses the processor: {why}")


def images() -> Iterator[Finding]:
    """Yields the libraries that decode and resize images."""
    for module, package, use in (
        ("simplejpeg", "simplejpeg", "decodes JPEG"),
        ("PIL", "pillow", "decodes PNG and other formats"),
        ("cv2", "opencv-python-headless", "resizes"),
    ):
        try:
            importlib.import_module(module)
        except ImportError as error:  # also of a system library that it links
            yield Finding("images", package, False, f"{use}, but cannot be imported: {error}. {_pip('train')}")
        else:
            yield Finding("images", package, True, use)


def data_folder() -> Iterator[Finding]:
    """Yields whether prepared datasets can be written, and the free space there."""
    chosen = os.environ.get("JMOE_DATA_DIR") or os.environ.get("TFDS_DATA_DIR") or "~/.cache/jmoe/datasets"
    if "://" in chosen:
        yield Finding("data", "folder", None, f"{chosen} is remote and was not looked at")
        return
    folder = pathlib.Path(chosen).expanduser().absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        detail = f"{folder} cannot be written; name another with JMOE_DATA_DIR"
        yield Finding("data", "folder", False, detail, needed=True)
        return
    free = shutil.disk_usage(there).free
    enough = free >= GIB / 10
    advice = "" if enough else ": free some, or name another with JMOE_DATA_DIR"
    yield Finding("data", "folder", enough, f"{folder}, {free / GIB:.1f} GiB free{advice}", needed=True)


def layers() -> Iterator[Finding]:
    """Yields how tokens are dispatched by default, and the implementations of each op that can run here."""
    try:
        import jax.numpy as jnp

        import kernels_pallas
        from jmoe.dispatch import auto_method
        from jmoe.routing import TopK
    except ImportError as error:
        yield Finding("layers", "jmoe", False, f"cannot be imported: {error}", needed=True)
        return
    gates = jnp.full((1, 64, 2), 0.5)  # [G, S, E]
    for name, router in (("with a capacity", TopK(k=1)), ("dropless", TopK(k=1, capacity_factor=None))):
        yield Finding("layers", f"dispatch {name}", True, auto_method(router(gates)))
    obstacles = kernels_pallas.obstacles()
    for op, (default, *others) in kernels_pallas.implementations().items():
        why_not = f"; no pallas: {obstacles[op]}" if obstacles[op] else ""
        yield Finding("layers", op, True, f"{default} (also: {', '.join(others)}){why_not}")


@dataclasses.dataclass(frozen=True)
class Requirement:
    """A line such as 'jax[tpu]>=0.10; extra == "tpu"'; extra is None where the package itself needs it."""

    name: str
    extras: tuple[str, ...]
    lower: str | None
    extra: str | None


def requirements(package: str) -> list[Requirement]:
    """Returns what an installed package requires; for jmoe, its pyproject.toml stands in where it is not installed."""
    try:
        lines = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        if package != "jmoe":
            return []
        project = _pyproject()
        lines = [*project.get("dependencies", [])]
        for extra, needs in project.get("optional-dependencies", {}).items():
            lines += [f'{line}; extra == "{extra}"' for line in needs]
    return [_requirement(line) for line in lines]


def _requirement(line: str) -> Requirement:
    needs, _, marker = line.partition(";")
    name = re.match(r"\s*([\w.-]+)\s*(?:\[([^]]*)\])?", needs)
    assert name, line
    extra = re.search(r"""extra\s*==\s*["']([\w-]+)""", marker)
    extras = tuple(re.findall(r"[\w-]+", name[2] or ""))
    return Requirement(name[1], extras, _lower_bound(needs), extra[1] if extra else None)


def _missing(package: str, extra: str) -> Iterator[str]:
    """What an extra of a package requires and is missing or too old, through extras that it names in turn."""
    for requirement in requirements(package):
        if requirement.extra != extra:
            continue
        found = _installed(requirement.name)
        if found is None:
            yield requirement.name
        elif requirement.lower and _numbers(found) < _numbers(requirement.lower):
            yield f"{requirement.name} {requirement.lower} (there is {found})"
        for inner in requirement.extras:
            yield from _missing(requirement.name, inner)


def _installed(package: str) -> str | None:
    if package == "jmoe":
        from jmoe._version import __version__

        return __version__
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requires_python() -> str:
    try:
        return importlib.metadata.metadata("jmoe")["Requires-Python"]
    except importlib.metadata.PackageNotFoundError:
        return _pyproject().get("requires-python", "")


def _pyproject() -> dict:
    import tomllib

    file = pathlib.Path(__file__).parents[2] / "pyproject.toml"
    return tomllib.loads(file.read_text())["project"] if file.exists() else {}


def _lower_bound(specifiers: str) -> str | None:
    bound = re.search(r">=\s*([\w.]+)", specifiers)
    return bound[1] if bound else None


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (0, 10, 2) of 0.10.2rc1, without zeros at the end."""
    start = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(part) for part in start[0].split(".")] if start else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _pip(extra: str | None) -> str:
    return f"pip install 'jmoe[{extra}]'" if extra else "pip install jmoe"


def memory_bytes() -> int:
    """Returns the memory of this machine, or of the container where one has a limit of its own."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = pathlib.Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdecimal() else total
