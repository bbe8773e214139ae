"""`jmoe convert`."""

import argparse
from collections.abc import Sequence

SUMMARY = "Brings published checkpoints in and models out, with every name, shape and dtype."
EXAMPLE = "jmoe convert --from vmoe checkpoints/vmoe_s32 --to runs/vmoe_s32"
_MORE = (
    "jmoe convert --from vit ViT-B_16.npz --to runs/vit_b16",
    "jmoe convert --from runs/digits_vmoe --to vmoe checkpoints/digits --shards 4",
    "jmoe convert --from jmoe runs/digits_vmoe --to safetensors digits.safetensors",
    "jmoe convert --from vmoe checkpoints/mine --to runs/mine --set model.moe.router.k=1",
)
_FORMATS = """
formats of PATH:
  jmoe         the folder of a training run, or one that this command wrote; taken where no format is named
  vmoe         the PREFIX of PREFIX.index and PREFIX.data-nnnnn-of-NNNNN, of google-research/vmoe
  vit          the .npz file of a vision transformer of google-research/vision_transformer; only --from
  safetensors  one file with the names of jmoe"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `jmoe convert`."""
    parser.epilog = "\n".join([f"{parser.epilog}", *(f"  {example}" for example in _MORE), _FORMATS])
    place = {"nargs": "+", "metavar": ("[FORMAT]", "PATH")}
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--from", dest="source", **place, help="what to read")
    parser.add_argument("--to", required=True, **place, help="what to write")
    parser.add_argument("--step", metavar="N", type=int, help="of a run's checkpoints; the newest if left out")
    parser.add_argument(
        "--set",
        metavar="model.A.B=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="an option of the model that arrays do not tell, or tell wrongly, such as model.moe.router.k=1",
    )
    parser.add_argument(
        "--shards", metavar="N", type=int, default=1, help="files that --to vmoe spreads arrays over (1)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--all", action="store_true", help="a line for every array, with its name in the file")


def run(args: argparse.Namespace) -> int:
    """Reads, prints what was read, and writes."""
    from jmoe import convert
    from jmoe.convert.report import brief, table
    from jmoe.errors import UserError
    from jmoe.train import imported

    source = _place(args.source, "--from", (imported.JMOE, *convert.READ))
    to, target = _place(args.to, "--to", (imported.JMOE, *convert.WRITE))
    if args.shards != 1 and to != "vmoe":
        raise UserError(f"--shards={args.shards} is for --to vmoe; {to} is written in one piece.")
    found = imported.read(*source, step=args.step, sets=args.overrides)
    print(table(found.parameters, everything=args.all))
    print(f"model    {brief(found.config)}")
    for option, value in found.assumed.items():
        print(f"assumed  model.{option}={value!r}, which arrays do not tell; --set changes it")
    imported.write(to, target, found.config, found.params, num_shards=args.shards, overwrite=args.overwrite)
    print(f"written  {target}")
    return 0


def _place(words: Sequence[str], option: str, formats: Sequence[str]) -> tuple[str, str]:
    """Returns format and path of [FORMAT] PATH."""
    from jmoe.errors import UserError

    *named, path = words
    known = ", ".join(formats)
    if len(named) > 1:
        raise UserError(f"{option} takes a path, or one of the formats {known} and a path, not {len(words)} words.")
    if not named and path in formats:
        raise UserError(f"{option} {path} names a format and no path. If a folder is called so, write ./{path}.")
    if named and named[0] not in formats:
        raise UserError(f"{option} knows no format {named[0]!r}; the formats are {known}.")
    return (named or ["jmoe"])[0], path
