"""`jmoe plan`."""

import argparse
import dataclasses
import json
import re
import shlex
import sys
from typing import TYPE_CHECKING, Any

from jmoe.cli import arguments

if TYPE_CHECKING:  # nothing heavy is imported before a command runs
    from jmoe.parallel import Mesh
    from jmoe.plan import Plan, Sweep

SUMMARY = "Compiles the training step for a TPU slice, without TPUs: memory, FLOPs, traffic, time and cost at least."
SIDE_BY_SIDE = "compiled, not run; amounts per chip and step; temporary has activations, gradients and workspace"
EXAMPLE = "jmoe plan experiments/vmoe_h14_imagenet21k.py --topology v5p:8x8x8"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `jmoe plan`."""
    parser.add_argument("experiment", metavar="EXPERIMENT", help="a Python file with a function get_config()")
    parser.add_argument("--topology", metavar="T", required=True, help="the slice, such as v5e:16x16 or v5p:8x8x8")
    parser.add_argument("--mesh", metavar="AXES", help="such as data=8,expert=32, instead of the experiment's")
    more = parser.add_mutually_exclusive_group()
    more.add_argument(
        "--compare",
        metavar="X",
        nargs="+",
        default=[],
        help="other topologies, meshes, or both as v5e:8x8/data=8,expert=8, to show side by side with the first",
    )
    more.add_argument("--sweep", action="store_true", help="try the meshes that make sense, and rank those that fit")
    parser.add_argument(
        "--tries", metavar="N", type=int, help="how many meshes a sweep compiles (6), and more until one fits"
    )
    arguments.add_set(parser, "A.B.C=VALUE", "changes an option of the experiment; may be repeated")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Compiles, and prints what a chip needs."""
    from jmoe.errors import UserError
    from jmoe.train.experiment import load_experiment

    if args.tries is not None and (args.tries < 1 or not args.sweep):
        raise UserError(f"--tries is for --sweep, and at least 1; it is {args.tries}.")
    if args.sweep and args.mesh:
        raise UserError(f"--sweep tries meshes by itself; leave out --mesh {args.mesh}.")
    if args.mesh and any(override.startswith("mesh") for override in args.overrides):
        raise UserError("--mesh and --set mesh=... are two meshes; give one of them.")
    config = load_experiment(args.experiment, args.overrides)
    choices = [(args.topology, args.mesh), *(_choice(args, text) for text in args.compare)]
    meshes = [None if text is None else parse_mesh(text) for _, text in choices]

    from jmoe.plan import check, plan, sweep

    head = {"experiment": args.experiment, "command": _command(args)}
    if args.sweep:
        found = sweep(config, args.topology, tries=args.tries or 6, progress=_say)
        print(json.dumps(head | found.to_json(), indent=2) if args.json else _ranking(found))
        return 0
    asked = [(topology, mesh) for (topology, _), mesh in zip(choices, meshes, strict=True)]
    for topology, mesh in asked:  # all, before the first is compiled for minutes
        check(config, topology, mesh)
    plans = [plan(config, topology, mesh, progress=_say) for topology, mesh in asked]
    if args.json:
        found = plans[0].to_json() if len(plans) == 1 else {"plans": [one.to_json() for one in plans]}
        print(json.dumps(head | found, indent=2))
    else:
        print(one_plan(args.experiment, plans[0]) if len(plans) == 1 else side_by_side(plans))
    return 0


def parse_mesh(text: str) -> "Mesh":
    """The mesh of "data=8,expert=32", or of "Mesh(data=8, expert=32)" as messages have it.

    Raises:
      UserError: it is not written so, or names another axis.
    """
    from jmoe.errors import UserError
    from jmoe.parallel import Mesh

    known = [field.name for field in dataclasses.fields(Mesh)]
    axes: dict[str, int] = {}
    for part in text.strip().removeprefix("Mesh(").removesuffix(")").split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        wrong = None
        if name not in known:
            wrong = f"there is no axis {name!r}"
        elif name in axes:
            wrong = f"{name} is there twice"
        elif not re.fullmatch(r"[1-9]\d{0,8}", size):
            wrong = f"{name} has no number of at least 1"
        if wrong:
            raise UserError(
                f"A mesh is written as data=8,expert=32, of {', '.join(known)} with a number each; in {text!r} {wrong}."
            )
        axes[name] = int(size)
    return Mesh(**axes)


def one_plan(experiment: str, plan: "Plan") -> str:
    """A plan as text."""
    from jmoe.plan.result import mesh_text

    memory, chip, bound = plan.memory, plan.chip, plan.bound
    lines = [
        f"{experiment} compiled for {plan.topology}, not run: {plan.chips} chips, {mesh_text(plan.mesh)}",
        "with " + ", ".join(f"{name} {version}" for name, version in plan.versions.items()),
        "",
        "memory of a chip, GiB",
    ]
    parts = {
        "parameters": memory.parameters,
        "optimizer": memory.optimizer,
        "other state": memory.other_state,
        "batch": memory.batch,
        "activations": memory.activations,
        "temporary": memory.temporary,
    }
    said = {
        "activations": ": from the forward to the backward pass, a part of temporary",
        "temporary": ": activations, gradients and workspace",
    }
    lines += [f"  {name:<14}{_gib(size):>10}{said.get(name, '')}" for name, size in parts.items()]
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines.append(f"  {'peak':<14}{_gib(memory.peak):>10} of {_gib(memory.available)}: {verdict}")
    if bound is not None:
        roofline = plan.roofline
        sent = sum(row.sent for row in bound.traffic)
        lines += ["", f"work of a chip in a step of {plan.batch_size} images"]
        for name, amount, unit, seconds, rate in (
            ("FLOPs", plan.flops, "TFLOP", roofline["flops"], f"{chip.flops / 1e12:.0f} TFLOP/s"),
            (
                "memory",
                plan.bytes,
                "GB",
                roofline["bytes"],
                f"{chip.bandwidth / 1e9:.0f} GB/s, if none stayed on the chip",
            ),
            ("sent", sent, "GB", roofline["collectives"], f"{chip.ici / 1e9:.0f} GB/s, all links"),
        ):
            scale = 1e12 if unit == "TFLOP" else 1e9
            lines.append(f"  {name:<10}{(amount or 0) / scale:>9.3f} {unit:<6}{1e3 * seconds:>9.2f} ms at {rate}")
        for row in bound.traffic:
            along = "+".join(row.axes) or "?"
            lines.append(
                f"    {row.kind} along {along}: {row.count} x, {row.sent / 1e9:.3f} GB, "
                f"{1e3 * row.seconds:.2f} ms at least, {1e3 * row.exposed:.2f} ms of them waiting"
            )
        assert plan.step_seconds is not None
        lines += [
            "",
            f"a step takes at least {1e3 * plan.step_seconds:.2f} ms: {1e3 * bound.compiler:.2f} by the compiler, "
            f"{1e3 * bound.kernels:.2f} of kernels, {1e3 * bound.others:.2f} of gathers, scatters and sorts, "
            f"{1e3 * bound.collectives:.2f} waiting for other chips",
            f"at most {plan.images_per_second:,.0f} images/s",
        ]
        if plan.days is not None:
            lines.append(
                f"{plan.steps:,} steps take at least {_number(plan.days)} days and "
                f"{_number(plan.chip_hours, digits=0)} chip-hours"
            )
    return "\n".join([*lines, *([""] if plan.notes else []), *plan.notes])


def side_by_side(plans: "list[Plan]") -> str:
    """Plans as columns of a table."""
    from jmoe.plan.result import mesh_text

    columns = [
        {
            "topology": plan.topology,
            "mesh": mesh_text(plan.mesh),
            "chips": str(plan.chips),
            "parameters GiB": _gib(plan.memory.parameters),
            "optimizer GiB": _gib(plan.memory.optimizer),
            "activations GiB": _gib(plan.memory.activations),
            "temporary GiB": _gib(plan.memory.temporary),
            "peak GiB": _gib(plan.memory.peak),
            "available GiB": _gib(plan.memory.available),
            "fits": "yes" if plan.fits else "NO",
            "TFLOP": _number(plan.flops, 1e-12),
            "sent GB": _number(None if plan.bound is None else sum(row.sent for row in plan.bound.traffic), 1e-9),
            "waiting ms": _number(None if plan.bound is None else plan.bound.collectives, 1e3),
            "step ms, at least": _number(plan.step_seconds, 1e3),
            "images/s, at most": _number(plan.images_per_second, digits=0),
            "days, at least": _number(plan.days),
            "chip-hours, at least": _number(plan.chip_hours, digits=0),
        }
        for plan in plans
    ]
    widths = [max(map(len, column.values())) for column in columns]
    lines = []
    for name in columns[0]:
        cells = (column[name].rjust(width) for column, width in zip(columns, widths, strict=True))
        lines.append(f"{name:<22}" + "  ".join(cells))
    notes = dict.fromkeys(note for plan in plans for note in plan.notes)
    return "\n".join([SIDE_BY_SIDE, *lines, *notes])


def _ranking(sweep: "Sweep") -> str:
    lines = [side_by_side(list(sweep.plans))]
    if sweep.skipped:
        lines += ["", "not compiled:", *(f"  {name}: {reason}" for name, reason in sweep.skipped.items())]
    return "\n".join(lines)


def _choice(args: argparse.Namespace, text: str) -> tuple[str, str | None]:
    """Topology and mesh of an argument of --compare; what it does not name is that of the first plan."""
    topology, _, mesh = text.partition("/")
    if "=" in topology:
        return args.topology, topology
    return topology, mesh or None


def _command(args: argparse.Namespace) -> str:
    """The command line that makes the same plan again."""
    words = ["jmoe", "plan", args.experiment, "--topology", args.topology]
    words += ["--mesh", args.mesh] if args.mesh else []
    words += [word for override in args.overrides for word in ("--set", override)]
    words += ["--compare", *args.compare] if args.compare else []
    words += ["--sweep"] if args.sweep else []
    words += ["--tries", str(args.tries)] if args.tries else []
    return shlex.join([*words, *(["--json"] if args.json else [])])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.3f}"


def _number(value: Any, scale: float = 1.0, digits: int = 2) -> str:
    """A number with so many decimals, or two digits that say something if it is small."""
    if value is None:
        return "-"
    value *= scale
    return f"{value:.2g}" if 0 < value < 0.1 else f"{value:,.{digits}f}"
