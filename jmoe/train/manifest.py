"""The manifest of a checkpoint: what was written, so that reading can tell whether it is still that.

{"sha256": of the manifest, "manifest": {
    "format": 1, "step": 300, "metadata": {...},
    "leaves": {"params/head/bias": {"shape": [10], "dtype": "float32"}, ...},
    "files": {"state/d/9df924": {"bytes": 330, "sha256": ...}, ...}}}

When several processes write a checkpoint, each leaves the checksums of its files beside them as a part of the manifest,
which is sealed in the same way; the manifest takes the parts' place. Its format does not depend on who wrote it.
"""

import errno
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from jmoe.errors import StorageError, UserError

NAME = "jmoe_manifest.json"
FORMAT = 1
_THREADS = 4  # that read files; more of them would take the training step's input pipeline its cores
_T = TypeVar("_T")
_PASSING = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.ENOTCONN,
    errno.EAGAIN,
)
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, *_PASSING)


class UnreadableCheckpointError(UserError):
    """A checkpoint that is damaged, as opposed to a sound one that is of another model or could not be read here."""


def unread(what: str, error: BaseException) -> UserError:
    """Says that something could not be read here, which is no sign that it is damaged: a later try may succeed."""
    kind = StorageError if passes(error) else UserError
    return kind(f"{what} could not be read here: {reason(error)}; mend that and run the same command again.")


def passes(error: BaseException) -> bool:
    """Whether an error is one of storage that may be gone the next time, as those of networks are."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _PASSING
    return isinstance(error, StorageError) or any(os.strerror(number) in str(error) for number in _PASSING)


def write(path: pathlib.Path, content: dict, known: Mapping[str, dict] | None = None) -> None:
    """Writes `content` and the checksums of all files in a folder as its manifest; all are on disk afterwards.

    Args:
      path: of the folder.
      content: of the manifest, but for the format and the files.
      known: what `checksums` returned for those of the files that need not be read again.
    """
    known = known or {}
    rest = checksums(path, (file for file in files_below(path) if file not in known))
    _seal(path / NAME, {"format": FORMAT, **content, "files": dict(sorted({**known, **rest}.items()))})


def write_part(path: pathlib.Path, process: int, files: Mapping[str, dict]) -> None:
    """Writes what `checksums` returned for the files of one process as its part of the manifest."""
    _seal(path / _part(process), {"format": FORMAT, "files": files})


def take_parts(path: pathlib.Path, processes: Iterable[int]) -> dict[str, dict]:
    """The files of several processes, all of which are there; their parts are deleted.

    Raises:
      FileNotFoundError: a part, or a file that a part lists, is not there or not of its size.
    """
    parts = [path / _part(process) for process in processes]
    files: dict[str, dict] = {}
    for part in parts:
        content = _unseal(part)
        if content is None:
            raise FileNotFoundError(errno.ENOENT, f"{part.name} is not what its process wrote", str(part))
        files |= content["files"]
    for name, expected in files.items():
        if not (path / name).is_file() or (path / name).stat().st_size != expected["bytes"]:
            raise FileNotFoundError(errno.ENOENT, f"{name} is not what its process wrote", str(path / name))
    for part in parts:
        part.unlink()
    return files


def files_below(path: pathlib.Path) -> list[str]:
    """The names of all files in a folder and the folders in it, relative to it."""
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


def checksums(path: pathlib.Path, names: Iterable[str]) -> dict[str, dict]:
    """Sizes and checksums of files, by name relative to `path`; they are on disk afterwards."""

    def checksum(name: str) -> dict:
        _flush_to_disk(path / name)
        return {"bytes": (path / name).stat().st_size, "sha256": _checksum(path / name)}

    return _for_each(checksum, names)


def read(path: pathlib.Path) -> dict:
    """The manifest of the checkpoint in a folder.

    Raises:
      UnreadableCheckpointError: it is missing, or not what was written.
      UserError: it has a newer format, or could not be read here.
    """
    try:
        manifest = _unseal(path / NAME)
    except OSError as error:
        raise unread(f"The {NAME} of checkpoint {path}", error) from error
    if manifest is None:
        raise UnreadableCheckpointError(f"Checkpoint {path} is damaged: its {NAME} is not what was written.")
    if manifest["format"] != FORMAT:
        raise UserError(f"Checkpoint {path} was written by a newer jmoe; update jmoe to read it.")
    return manifest


def check_files(path: pathlib.Path, manifest: dict, *, process: int = 0, processes: int = 1) -> None:
    """Raises UnreadableCheckpointError, naming the file, unless every file is what was written.

    A file that could not be read here is another UserError. When several processes check a checkpoint, each looks
    whether all files are there and as long as they should be, and reads the `share` of them that is its own.
    """
    files = manifest["files"]
    mine = share({name: file["bytes"] for name, file in files.items()}, process, processes)

    def problem(name: str) -> str | None:
        try:
            size, expected = (path / name).stat().st_size, files[name]
            if size != expected["bytes"]:
                return f"has {size} bytes instead of {expected['bytes']}"
            if name in mine and _checksum(path / name) != expected["sha256"]:
                return "is not what was written (its checksum differs)"
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            raise unread(f"File {name} of checkpoint {path}", error) from error
        return None

    for name, wrong in _for_each(problem, files).items():
        if wrong:
            raise UnreadableCheckpointError(f"Checkpoint {path} is damaged: its file {name} {wrong}.")


def share(sizes: Mapping[str, int], process: int, processes: int) -> set[str]:
    """Which files one of several processes reads: each file has one reader, and all have about as much to read."""
    loads = [0] * processes
    mine = set()
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):  # the largest first, to whoever has least so far
        reader = loads.index(min(loads))
        loads[reader] += sizes[name]
        if reader == process:
            mine.add(name)
    return mine


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


def digest(content: dict) -> str:
    """The checksum of a manifest."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _seal(file: pathlib.Path, content: dict) -> None:
    """Writes a manifest, or a part of one, with its own checksum; it is on disk afterwards."""
    file.write_text(json.dumps({"sha256": digest(content), "manifest": content}, indent=1), encoding="utf-8")
    _flush_to_disk(file)


def _unseal(file: pathlib.Path) -> dict | None:
    """What `_seal` wrote, or None if the file is missing or not that; raises OSError if it could not be read."""
    try:
        document = json.loads(file.read_bytes())
        return document["manifest"] if document["sha256"] == digest(document["manifest"]) else None
    except (FileNotFoundError, ValueError, LookupError, TypeError, RecursionError):
        return None


def _part(process: int) -> str:
    return f"jmoe_manifest.part-{process}.json"


def _for_each(function: Callable[[str], _T], names: Iterable[str]) -> dict[str, _T]:
    """Applies a function to names, on several threads: reading and hashing a file let go of Python's lock."""
    names = list(names)
    with ThreadPoolExecutor(max_workers=_THREADS) as pool:
        return dict(zip(names, pool.map(function, names), strict=True))


def _checksum(file: pathlib.Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _flush_to_disk(file: pathlib.Path) -> None:
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
