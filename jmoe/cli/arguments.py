"""Arguments that several commands share."""

import argparse
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jmoe.parallel.hosts import Hosts


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """Adds EXPERIMENT, --workdir and --set."""
    parser.add_argument("experiment", metavar="EXPERIMENT", help="a Python file with a function get_config()")
    parser.add_argument("--workdir", metavar="DIR", required=True, help="the folder of the run")
    add_set(
        parser,
        "A.B.C=VALUE",
        "changes an option of the experiment; may be repeated. A value is a number, text, true, false, none, "
        'a tuple, or a configuration such as "Switch(jitter=0.01)"',
    )


def add_set(parser: argparse.ArgumentParser, metavar: str, help: str) -> None:
    """Adds --set, whose values are collected as `overrides`."""
    parser.add_argument("--set", metavar=metavar, action="append", default=[], dest="overrides", help=help)


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Adds where the processes of a run on many hosts meet."""
    group = parser.add_argument_group(
        "many hosts",
        "The same command on every host of a TPU pod, SLURM step, Open MPI or indexed Kubernetes job finds the others "
        "by itself. Elsewhere, give all three addresses to each process; launch/ has recipes.",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is, as every host can reach it")
    group.add_argument("--processes", metavar="N", type=int, help="how many processes there are; 1 trains alone")
    group.add_argument("--process", metavar="I", type=int, help="the index of this one, from 0 to N-1")
    group.add_argument(
        "--local",
        action="store_true",
        help="all processes run on this machine, so that the coordinator may be a loopback address",
    )
    group.add_argument(
        "--startup-timeout",
        metavar="SECONDS",
        type=int,
        default=1800,
        help="how long to wait until all processes have come (default 1800)",
    )


@contextlib.contextmanager
def started(args: argparse.Namespace) -> Iterator["Hosts"]:
    """Connects this process with the others, if there are any, and ends together with them."""
    from jmoe.parallel.startup import Addresses, start

    addresses = Addresses(
        coordinator=args.coordinator, processes=args.processes, process=args.process, local=args.local
    )
    with start(addresses, timeout=args.startup_timeout) as hosts:
        yield hosts
