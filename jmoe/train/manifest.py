"""The manifest of a checkpoint: what was written, so that reading can tell whether it is still that.

{"sha256": of the manifest, "manifest": {
    "format": 1, "step": 300, "metadata": {...},
    "leaves": {"params/head/bias": {"shape": [10], "dtype": "float32"}, ...},
    "files": {"state/d/9df924": {"bytes": 330, "sha256": ...}, ...}}}
"""

import errno
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from jmoe.errors import UserError

NAME = "jmoe_manifest.json"
FORMAT = 1
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)


class UnreadableCheckpointError(UserError):
    """A checkpoint that is damaged or cannot be read, as opposed to a sound one of another model."""


def write(path: pathlib.Path, content: dict) -> None:
    """Writes `content` and the checksums of all files in a folder as its manifest; all are on disk afterwards."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        _flush_to_disk(file)
    checksums = {
        file.relative_to(path).as_posix(): {"bytes": file.stat().st_size, "sha256": _checksum(file)} for file in files
    }
    manifest = {"format": FORMAT, **content, "files": checksums}
    (path / NAME).write_text(
        json.dumps({"sha256": _digest(manifest), "manifest": manifest}, indent=1), encoding="utf-8"
    )
    _flush_to_disk(path / NAME)


def read(path: pathlib.Path) -> dict:
    """The manifest of the checkpoint in a folder.

    Raises:
      UnreadableCheckpointError: it is missing, or not what was written.
      UserError: it has a newer format.
    """
    try:
        document = json.loads((path / NAME).read_bytes())
        sound = document["sha256"] == _digest(document["manifest"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise UnreadableCheckpointError(f"Checkpoint {path} is damaged: its {NAME} is not what was written.")
    if document["manifest"]["format"] != FORMAT:
        raise UserError(f"Checkpoint {path} was written by a newer jmoe; update jmoe to read it.")
    return document["manifest"]


def check_files(path: pathlib.Path, manifest: dict) -> None:
    """Raises UnreadableCheckpointError, naming the file, unless every file is what was written."""
    for name, expected in manifest["files"].items():
        try:
            size = (path / name).stat().st_size
            problem = f"has {size} bytes instead of {expected['bytes']}" if size != expected["bytes"] else None
            if problem is None and _checksum(path / name) != expected["sha256"]:
                problem = "is not what was written (its checksum differs)"
        except FileNotFoundError:
            problem = "is missing"
        except OSError as error:
            problem = f"cannot be read ({reason(error)})"
        if problem:
            raise UnreadableCheckpointError(f"Checkpoint {path} is damaged: its file {name} {problem}.")


def describe(leaf: Any) -> dict:
    """Shape and dtype of an array, as the manifest has them."""
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def check_leaves(path: pathlib.Path, manifest: dict, wanted: Mapping[str, dict], *, partial: bool = False) -> None:
    """Raises UserError, naming the arrays that differ, unless names, shapes and dtypes are the wanted ones.

    With `partial`, arrays that are not wanted are no difference.
    """
    saved = manifest["leaves"]

    def text(leaf: dict) -> str:
        return f"{leaf['dtype']} ({', '.join(map(str, leaf['shape']))})"

    def listed(names: set[str], show: Callable[[str], str]) -> str:
        ordered = sorted(names, key=lambda name: (len(name), name))  # parameters before their optimizer state
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return ", ".join(show(name) for name in ordered[:3]) + more

    different = {name for name in saved.keys() & wanted.keys() if text(saved[name]) != text(wanted[name])}
    parts = []
    if different:
        parts.append(
            "the checkpoint and the model have "
            + listed(different, lambda name: f"{text(saved[name])} and {text(wanted[name])} at '{name}'")
        )
    if missing := wanted.keys() - saved.keys():
        parts.append("the checkpoint lacks " + listed(missing, repr))
    if not partial and (unexpected := saved.keys() - wanted.keys()):
        parts.append("the model lacks " + listed(unexpected, repr))
    if parts:
        raise UserError(
            f"Checkpoint {path} is of another model: {'; '.join(parts)}. "
            "Use the experiment and the options it was written with, or another folder."
        )


def reason(error: BaseException) -> str:
    """What the operating system said, if it is in the error, else the start of its first line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    for number in _DISK_ERRORS:
        if os.strerror(number) in text:
            return os.strerror(number)
    return (text.splitlines() or [type(error).__name__])[0][:200].rstrip(". ")


def _digest(manifest: dict) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _checksum(file: pathlib.Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _flush_to_disk(file: pathlib.Path) -> None:
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
