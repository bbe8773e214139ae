"""The command `jmoe`.

Nothing heavy is imported until a command runs, so that help and mistakes are answered at once.
"""

import argparse
import difflib
import logging
import os
import sys
import traceback
from collections.abc import Sequence

from jmoe.cli import bench, convert, doctor, evaluate, plan, train
from jmoe.errors import UserError

COMMANDS = {
    "train": train,
    "evaluate": evaluate,
    "plan": plan,
    "convert": convert,
    "bench": bench,
    "doctor": doctor,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status.

    The status is 0 only if the command did what was asked; jmoe/errors.py lists the others. A mistake of the user is
    printed as one sentence, and with JMOE_TRACEBACK=1 in the environment its traceback, too. Other exceptions are bugs
    and pass through.
    """
    try:
        args = _parse(sys.argv[1:] if argv is None else argv)
    except SystemExit as done:  # argparse has printed the help or the mistake
        return done.code if isinstance(done.code, int) else 2
    logging.basicConfig(format="%(message)s")
    for package in ("jmoe", "kernels_pallas"):
        logging.getLogger(package).setLevel(logging.INFO)
    try:
        status = COMMANDS[args.command].run(args)
        sys.stdout.flush()
        return status
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] in ("jmoe", "kernels_pallas"):
            raise  # a part of this package cannot be missing
        return _fail(
            f"'jmoe {args.command}' needs the module '{error.name}', which is not installed. "
            "This installs everything for training: pip install 'jmoe[train]'",
            UserError.exit_code,
        )
    except KeyboardInterrupt:
        return _fail("interrupted.", 130)
    except BrokenPipeError:
        # Python flushes stdout once more when it exits; that must not fail too.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="jmoe",
        description="Sparse mixture-of-experts layers for vision: training, evaluation and a look at this machine.",
        epilog=f"example:\n  {train.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        command_parser = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=command.SUMMARY,
            epilog=f"example:\n  {command.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,  # an example can be copied only if it is not wrapped
            allow_abbrev=False,
        )
        command.add_arguments(command_parser)
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        near = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        meant = f" Did you mean '{near[0]}'?" if near else ""
        parser.error(f"there is no command '{argv[0]}'.{meant} The commands are: {', '.join(COMMANDS)}.")
    return parser.parse_args(argv)


def _fail(sentence: str, status: int) -> int:
    if os.environ.get("JMOE_TRACEBACK") == "1":
        traceback.print_exc()
    print(f"jmoe: {sentence}", file=sys.stderr)
    return status
