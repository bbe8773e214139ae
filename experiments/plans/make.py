"""Makes the plans in this folder again, each by the command in it: all, or those named.

python experiments/plans/make.py [vmoe_s32_imagenet1k_v5e_16x16 ...]

One takes two to ten minutes and up to 9 GB of memory. A plan that does not fit any more is not written.
"""

import json
import pathlib
import shlex
import subprocess
import sys

FOLDER = pathlib.Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]


def make(path: pathlib.Path) -> None:
    """Runs the command of a plan and writes what it prints in its place."""
    words = shlex.split(json.loads(path.read_text())["command"])
    print(shlex.join(words), flush=True)
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    if not json.loads(done.stdout)["fits"]:
        raise SystemExit(f"{path.name} does not fit:\n{done.stdout}")
    path.write_text(done.stdout)


if __name__ == "__main__":
    for path in [FOLDER / f"{name}.json" for name in sys.argv[1:]] or sorted(FOLDER.glob("*.json")):
        make(path)
