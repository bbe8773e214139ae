"""Replays a folder of recorded cases: python -m tests.goldens FOLDER --out OUT.

Of each case only the config and the inputs are read. OUT/<case>.npz then holds the inputs and every result as jmoe
computes it, under the recorded names. A case that cannot be replayed is named, and makes the command fail.
"""

import argparse
import json
import pathlib
import sys
import traceback
from collections.abc import Sequence

import numpy as np

from tests.goldens.case import load, names


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.goldens", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=pathlib.Path, help="holds <case>.npz, and the files of checkpoints")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to write <case>.npz to")
    parser.add_argument("--only", default="", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument("--traceback", action="store_true", help="say where a case failed")
    args = parser.parse_args(argv)
    cases = [name for name in names(args.folder) if args.only in name]
    if not cases:
        parser.error(f"there are no cases in {args.folder}: it should hold .npz files with an entry 'config'")
    args.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in cases:
        try:
            case = load(args.folder, name)
            found = case.replay()
        except Exception as error:  # whatever is wrong with one case, the others are replayed
            failed.append(name)
            print(f"{name}: cannot be replayed: {type(error).__name__}: {error}", file=sys.stderr)
            if args.traceback:
                traceback.print_exc()
            continue
        write(args.out / f"{name}.npz", {"config": np.array(json.dumps(case.config))} | case.arrays | found)
        print(f"{name}: {len(found)} results", flush=True)
    print(f"{len(cases) - len(failed)} of {len(cases)} cases replayed")
    if failed:
        print(f"not replayed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def write(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes a file that is either there whole or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)
    temporary.replace(path)


if __name__ == "__main__":
    sys.exit(main())
