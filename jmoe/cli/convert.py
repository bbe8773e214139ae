"""`jmoe convert`."""

import argparse
import pathlib
from collections.abc import Sequence

from jmoe.cli import arguments

SUMMARY = "Brings published checkpoints in and models out, with every name, shape and dtype; dense to sparse."
EXAMPLE = "jmoe convert --from vmoe checkpoints/vmoe_s32 --to runs/vmoe_s32"
_MORE = (
    "jmoe convert --from vit ViT-B_16.npz --to runs/vit_b16",
    "jmoe convert --from runs/digits_vmoe --to vmoe checkpoints/digits --shards 4",
    "jmoe convert --from jmoe runs/digits_vmoe --to safetensors digits.safetensors",
    "jmoe convert --from vmoe checkpoints/mine --to runs/mine --set model.moe.router.k=1",
    "jmoe convert --upcycle runs/digits_dense --to runs/sparse --experts 8 --router 'TopK(k=2, renormalize=true)'",
)
_FORMATS = """
formats of PATH:
  jmoe         the folder of a training run, or one that this command wrote; taken where no format is named
  vmoe         the PREFIX of PREFIX.index and PREFIX.data-nnnnn-of-NNNNN, of google-research/vmoe
  vit          the .npz file of a vision transformer of google-research/vision_transformer; only --from
  safetensors  one file with the names of jmoe"""

_ENDINGS = {".npz": "vit", ".safetensors": "safetensors", ".index": "vmoe"}
_UPCYCLING = ("experts", "layers", "router", "gate_std", "seed", "optimizer")  # options of --upcycle alone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `jmoe convert`."""
    parser.epilog = "\n".join([f"{parser.epilog}", *(f"  {example}" for example in _MORE), _FORMATS])
    place = {"nargs": "+", "metavar": ("[FORMAT]", "PATH")}
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--from", dest="source", **place, help="what to read")
    source.add_argument("--upcycle", metavar="DIR", help="make a sparse model of the dense one in this folder of jmoe")
    parser.add_argument("--to", required=True, **place, help="what to write")
    parser.add_argument("--step", metavar="N", type=int, help="of a run's checkpoints; the newest if left out")
    arguments.add_set(
        parser,
        "model.A.B=VALUE",
        "an option of the model that arrays do not tell, or tell wrongly, such as model.moe.router.k=1",
    )
    parser.add_argument(
        "--shards", metavar="N", type=int, default=1, help="files that --to vmoe spreads arrays over (1)"
    )
    parser.add_argument(
        "--unversioned",
        action="store_true",
        help="read an index of --from vmoe that has no version (before 2022-06-22) as one of now",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--all", action="store_true", help="a line for every array, with its name in the file")
    group = parser.add_argument_group("sparse upcycling (defaults are those published for vision)")
    group.add_argument("--experts", metavar="E", type=int, help="copies of each MLP (32)")
    group.add_argument("--layers", metavar="BLOCKS", help='the sparse blocks: "last-2", "every-2" or "5,7" (every-2)')
    group.add_argument(
        "--router",
        metavar="NAME(...)",
        help='such as "TopK(k=2, capacity_factor=2.0, renormalize=true)", the last to begin as the dense model '
        '("ExpertChoice(capacity_factor=2.0, renormalize=true)")',
    )
    group.add_argument("--gate-std", metavar="S", type=float, help="standard deviation of the new gates (0.02)")
    group.add_argument("--seed", metavar="N", type=int, help="of the new gates (0)")
    group.add_argument("--optimizer", action="store_true", default=None, help="take the optimizer's state along")


def run(args: argparse.Namespace) -> int:
    """Reads, prints what was read, and writes."""
    from jmoe.errors import UserError

    if args.unversioned and (args.source or [""])[0] != "vmoe":
        raise UserError("--unversioned is for --from vmoe PREFIX.")
    if args.upcycle is not None:
        return _upcycle(args)

    from jmoe import convert
    from jmoe.convert.report import brief, table
    from jmoe.train import imported

    for option in _UPCYCLING:
        if getattr(args, option) is not None:
            raise UserError(f"--{option.replace('_', '-')} is for --upcycle, which makes a dense model sparse.")
    source = _place(args.source, "--from", (imported.JMOE, *convert.READ))
    to, target = _place(args.to, "--to", (imported.JMOE, *convert.WRITE))
    if args.shards != 1 and to != "vmoe":
        raise UserError(f"--shards={args.shards} is for --to vmoe; {to} is written in one piece.")
    found = imported.read(*source, step=args.step, sets=args.overrides, unversioned=args.unversioned)
    print(table(found.parameters, everything=args.all))
    print(f"model    {brief(found.config)}")
    for option, value in found.assumed.items():
        print(f"assumed  model.{option}={value!r}, which arrays do not tell; --set changes it")
    imported.write(to, target, found.config, found.params, num_shards=args.shards, overwrite=args.overwrite)
    print(f"written  {target}")
    return 0


def _upcycle(args: argparse.Namespace) -> int:
    """Makes a sparse model of a dense one."""
    from jmoe.convert.report import brief
    from jmoe.errors import UserError
    from jmoe.train.upcycle import upcycle_folder

    _, target = _place(args.to, "--to", ("jmoe",))
    if args.shards != 1 or args.all:
        raise UserError("--shards and --all are for --from; --upcycle writes a folder of jmoe.")
    layers = args.layers
    if layers is not None and layers.replace(",", "").isdecimal():
        layers = f"({layers},)"
    chosen = {"num_experts": args.experts, "layers": layers, "router": args.router}
    sets = [f"model.moe.{option}={value}" for option, value in chosen.items() if value is not None]
    options = {"gate_std": args.gate_std, "seed": args.seed, "optimizer": args.optimizer}
    given = {option: value for option, value in options.items() if value is not None}
    made = upcycle_folder(
        args.upcycle, target, step=args.step, sets=[*sets, *args.overrides], overwrite=args.overwrite, **given
    )
    print(f"{made}\nmodel            {brief(made.model)}\nwritten          {target}")
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
    meant = _ENDINGS.get(pathlib.PurePath(path).suffix)
    if not named and meant in formats:
        raise UserError(
            f"Without a format {option} takes a folder of jmoe; by its name {path} is another: {option} {meant} {path}."
        )
    if named and named[0] not in formats:
        raise UserError(f"{option} knows no format {named[0]!r}; the formats are {known}.")
    return (named or ["jmoe"])[0], path
