"""`jmoe bench`: the sparse layer and the ops that it is made of, timed beside the least that they could take."""

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # nothing heavy is imported before a command runs
    from jmoe.analysis.speed import LayerBounds, LayerMemory, LayerTimes
    from kernels_pallas.cases import Case
    from kernels_pallas.timing import OpTimes

SUMMARY = "Times the sparse layer, or the ops that it is made of, on this machine, as ratios to simpler programs."
EXAMPLE = "jmoe bench layer --case S/32 --runs 20"
LAYER = (
    "Times the sparse layer, forward and backward, as ratios to a dense MLP over as many rows as the experts have "
    "slots; and beside the experts alone, their rows given ('batched'). S/32, B/16 and B/16-384, if no case is named."
)
KERNELS = (
    "Times the implementations of each op, forward and with gradients, as ratios to a copy of as many bytes as it must "
    "move, or to a dense matrix multiply of as many FLOPs. S/32 and B/16, if no case is named."
)
DTYPES = ("float32", "bfloat16")
LAYER_CASES = ("S/32", "B/16", "B/16-384")  # if none is named; on a CPU the others take long
KERNEL_CASES = ("S/32", "B/16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `jmoe bench`."""
    what = parser.add_subparsers(dest="what", metavar="layer|kernels", required=True)
    layer = what.add_parser("layer", help=LAYER, description=LAYER, allow_abbrev=False)
    layer.add_argument(
        "--method",
        metavar="NAME",
        action="append",
        help="of dispatch (gather and einsum), or 'published': one-hot masks as google-research/vmoe makes them",
    )
    layer.add_argument(
        "--memory",
        action="store_true",
        help="run nothing: the temporary memory that the compiler wants for each, and its ratio to einsum's",
    )
    layer.add_argument(
        "--chip",
        metavar="NAME",
        help="run nothing: the least time on one chip of v4, v5e, v5p or v6e, as the compiler for TPUs counts it",
    )
    kernels = what.add_parser("kernels", help=KERNELS, description=KERNELS, allow_abbrev=False)
    kernels.add_argument("--op", metavar="NAME", action="append", help="such as gather_rows; all if left out")
    for one in (layer, kernels):
        one.add_argument("--case", metavar="NAME", action="append", help="a size, such as S/32; may be repeated")
        one.add_argument(
            "--implementation",
            metavar="NAME",
            action="append",
            help="of the ops, such as xla or pallas (layer: the default of this machine; kernels: all that can run)",
        )
        for flag, letter, type_, help_ in (
            ("--num-experts", "E", int, "instead of the case's; may be repeated, and so may the next three"),
            ("--k", "K", int, "experts per token"),
            ("--capacity-factor", "C", float, "slots over choices"),
            ("--images", "B", int, "routed in groups of 8"),
        ):
            one.add_argument(flag, metavar=letter, type=type_, action="append", help=help_)
        one.add_argument("--dtype", metavar="NAME", help="float32 (default on CPU) or bfloat16 (default elsewhere)")
        one.add_argument("--runs", metavar="N", type=int, help="timed runs of each, taken in turn (20)")
        one.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Times and prints one line for each case."""
    from jmoe.errors import UserError

    if args.runs is not None and args.runs < 1:
        raise UserError(f"--runs must be at least 1; it is {args.runs}.")
    _check("dtype", [args.dtype] if args.dtype else [], DTYPES)
    return run_layer(args) if args.what == "layer" else run_kernels(args)


def run_layer(args: argparse.Namespace) -> int:
    """Times layers, or compiles them for their memory."""
    from typing import cast, get_args

    from jmoe.analysis import speed
    from jmoe.dispatch import Implementation
    from jmoe.errors import UserError

    methods = cast("list[speed.Contender]", args.method or ["gather", "einsum"])
    _check("method", methods, get_args(speed.Contender))
    _check("implementation", args.implementation or [], get_args(Implementation))
    if args.implementation and set(methods) <= set(speed.BY_MASKS):
        raise UserError(f"--implementation is for gather and ragged; {' and '.join(methods)} has no other than xla.")
    if args.memory and args.runs is not None:
        raise UserError("--memory runs nothing, so that it takes no --runs.")
    if args.chip and (args.runs is not None or args.memory):
        raise UserError("--chip runs nothing and shows the memory as well: it takes neither --runs nor --memory.")
    cases = _cases(args, speed.CASES, LAYER_CASES)
    if args.chip:
        return _print_bounds(args, cases, methods)
    options = {"implementations": args.implementation or [None], "dtype": args.dtype}
    if args.memory:
        heading = "temporary memory in MiB, forward and backward, and its ratio to einsum's"
        results = (speed.layer_memory(case, methods, **options) for case in cases)
        return _print(args, results, memory_cells, heading)
    runs = args.runs or 20
    heading = f"medians of {runs} paired runs, forward and backward, as ratios to a dense MLP of as many rows"
    return _print(args, (speed.time_layer(case, methods, runs, **options) for case in cases), layer_cells, heading)


def run_kernels(args: argparse.Namespace) -> int:
    """Times the implementations of ops."""
    import kernels_pallas
    from jmoe.errors import UserError
    from kernels_pallas.cases import CASES
    from kernels_pallas.per_platform import NAMES

    here, obstacles = kernels_pallas.implementations(), kernels_pallas.obstacles()
    ops, runs = args.op or list(here), args.runs or 20
    _check("op", ops, here)
    _check("implementation", args.implementation or [], NAMES)
    for op in ops:
        if "pallas" in (args.implementation or []) and obstacles[op]:
            raise UserError(f"{op} cannot run as 'pallas' here: {obstacles[op]} Here it has {' and '.join(here[op])}.")
    times = (
        importlib.import_module(f"kernels_pallas.{op}.benchmark").benchmark(case, args.implementation, runs, args.dtype)
        for op in ops
        for case in _cases(args, CASES, KERNEL_CASES)
    )
    names = args.implementation or list(dict.fromkeys(n for op in ops for n in here[op] if n != "reference"))
    heading = f"medians of {runs} paired runs, forward and ('+') with gradients, as ratios to the bound"
    return _print(args, times, lambda result: kernel_cells(result, names), heading)


def _print_bounds(args: argparse.Namespace, cases: "Sequence[Case]", methods: "Sequence[Any]") -> int:
    from jmoe.analysis import speed
    from jmoe.analysis.bound import CHIPS
    from jmoe.parallel import compile_for_chip

    _check("chip", [args.chip], CHIPS)
    options = {"implementations": args.implementation or [None], "dtype": args.dtype or "bfloat16"}
    results = (
        speed.layer_bounds(case, methods, chip=args.chip, compile_for=compile_for_chip, **options) for case in cases
    )
    heading = (
        "compiled, not run: the compiler's least time, forward and backward, as ratios to a dense MLP of as many rows, "
        "and temporary memory"
    )
    return _print(args, results, bound_cells, heading)


def bound_cells(result: "LayerBounds") -> dict[str, str]:
    """One line of the table of bounds, by column."""
    ratios = {name: f"{value:.2f}" for name, value in {**result.ratios, **result.between}.items()}
    mib = {f"{name} MiB": f"{size / 2**20:.1f}" for name, size in result.temp_bytes.items()}
    seconds = {"dense us": f"{1e6 * result.bounds['dense'].seconds:.0f}"}
    return _case_cells(result.case) | {"rows": str(result.rows)} | seconds | ratios | mib


def layer_cells(result: "LayerTimes") -> dict[str, str]:
    """One line of the table of layers, by column."""
    ratios = {name: f"{value:.2f}" for name, value in {**result.ratios, **result.between}.items()}
    return _case_cells(result.case) | {"rows": str(result.rows), "dense ms": _ms(result.seconds["dense"])} | ratios


def memory_cells(result: "LayerMemory") -> dict[str, str]:
    """One line of the table of memory, by column."""
    mib = {f"{name} MiB": f"{size / 2**20:.1f}" for name, size in result.temp_bytes.items()}
    ratios = {f"{name}/einsum": f"{value:.2f}" for name, value in result.ratios.items()}
    return _case_cells(result.case) | {"rows": str(result.rows)} | mib | ratios


def kernel_cells(result: "OpTimes", names: Sequence[str]) -> dict[str, str]:
    """One line of the table of ops, by column."""
    cells = {"op": result.op, "bound": result.bound} | _case_cells(result.case)
    for part, mark in (("forward", ""), ("both", "+")):
        cells[f"ms{mark}"] = _ms(result.seconds[part][result.bound])
        for name in names:
            value = result.ratios[part].get(name)
            cells[f"{name}{mark}"] = "-" if value is None else f"{value:.2f}"
    return cells | {"default": result.default}


def machine() -> dict[str, Any]:
    """What was timed on."""
    import jax

    from jmoe._version import __version__

    return {
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "processors": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {"jmoe": __version__, "python": platform.python_version()}
        | {package: importlib.metadata.version(package) for package in ("jax", "jaxlib", "flax", "numpy")},
    }


def _cases(args: argparse.Namespace, known: Mapping[str, "Case"], default: Sequence[str]) -> list["Case"]:
    """Those that are named, with every combination of what is given instead of their own options."""
    from jmoe.errors import UserError

    names = args.case or default
    _check("case", names, known)
    cases = [known[name] for name in names]
    for field in ("images", "num_experts", "k", "capacity_factor"):
        if values := getattr(args, field):
            try:
                cases = [dataclasses.replace(case, **{field: value}) for case in cases for value in values]
            except ValueError as error:
                raise UserError(str(error)) from error
    return cases


def _check(kind: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises UserError for a name that is unknown."""
    from jmoe.errors import UserError

    for name in names:
        if name not in known:
            raise UserError(f"There is no {kind} {name!r} to time; use one of {', '.join(known)}.")


def _print(
    args: argparse.Namespace, results: Iterable[Any], cells: Callable[[Any], dict[str, str]], heading: str
) -> int:
    """Prints results as they come, a line each, or all as one JSON object."""
    from jmoe.errors import UserError
    from kernels_pallas.timing import STARTING

    done, notes = [], {}
    try:
        for result in results:
            if not args.json:
                line = cells(result)
                if not done:
                    print(f"{heading}; {result.dtype} on {getattr(args, 'chip', None) or machine()['device_kind']}")
                    print(_line({name: name for name in line}))
                print(_line(line), flush=True)
                notes |= dict.fromkeys(_notes(result, STARTING))
            done.append(dataclasses.asdict(result))
    except NotImplementedError as error:  # a named implementation cannot run here, or not with these sizes
        raise UserError(str(error)) from error
    if args.json:
        print(json.dumps({"machine": machine(), "results": done}, indent=2))
    for note in notes:
        print(note)
    return 0


def _notes(result: Any, starting: float) -> Iterator[str]:
    """What a reader of the table should know."""
    for name, reason in getattr(result, "left_out", {}).items():
        yield f"without {name}: {reason}"
    seconds = getattr(result, "seconds", {})
    times = [t for part in seconds.values() for t in (part.values() if isinstance(part, dict) else [part])]
    if times and min(times) < starting:
        yield f"Times below {1e3 * starting:.2f} ms are those of starting a program; more --images take longer."


def _line(cells: dict[str, str]) -> str:
    """Cells under their columns: words to the left, numbers to the right."""
    words = {"op": 15, "bound": 6, "case": 9}
    return "".join(
        text.ljust(words[name]) if name in words else " " + text.rjust(max(len(name) + 1, 5))
        for name, text in cells.items()
    )


def _case_cells(case: "Case") -> dict[str, str]:
    sizes = {"images": case.images, "E": case.num_experts, "K": case.k, "C": case.capacity_factor}
    return {"case": case.name} | {name: str(size) for name, size in sizes.items()}


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"
