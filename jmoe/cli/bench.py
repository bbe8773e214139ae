"""`jmoe bench`."""

import argparse
import json

SUMMARY = "Times the sparse layer on this machine, forward and backward, as ratios to a dense MLP of equal FLOPs."
EXAMPLE = "jmoe bench layer --case S/32 --runs 20"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `jmoe bench`."""
    parser.add_argument("what", choices=["layer"], help="what is timed")
    parser.add_argument("--case", metavar="NAME", action="append", help="a size, such as S/32; all if left out")
    parser.add_argument("--method", metavar="NAME", action="append", help="of dispatch; gather and einsum if left out")
    parser.add_argument("--runs", metavar="N", type=int, default=20, help="timed runs of each, taken in turn (20)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Times and prints one line for each case."""
    import dataclasses
    import typing

    from jmoe.analysis.speed import CASES, time_layer
    from jmoe.dispatch import Method
    from jmoe.errors import UserError

    cases, methods = args.case or list(CASES), tuple(args.method or ("gather", "einsum"))
    for kind, names, known in (("case", cases, list(CASES)), ("method", methods, list(typing.get_args(Method)))):
        for name in names:
            if name not in known:
                raise UserError(f"There is no {kind} {name!r} to time; use one of {', '.join(known)}.")
    if args.runs < 1:
        raise UserError(f"--runs must be at least 1; it is {args.runs}.")
    results = []
    if not args.json:
        print("medians of paired runs, forward and backward, as ratios to a dense MLP of equal FLOPs")
        print("case".ljust(12) + "dense ms".rjust(10) + "".join(method.rjust(10) for method in methods))
    for name in cases:
        times = time_layer(CASES[name], methods, args.runs)
        results.append(dataclasses.asdict(times))
        if not args.json:
            ratios = "".join(f"{times.ratios[method]:10.2f}" for method in methods)
            print(name.ljust(12) + f"{1e3 * times.dense_seconds:10.1f}" + ratios, flush=True)
    if args.json:
        print(json.dumps(results, indent=2))
    return 0
