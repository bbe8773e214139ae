"""Arguments that several commands share."""

import argparse


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
