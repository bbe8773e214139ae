"""Parameters as one .safetensors file, under our names; what jmoe writes carries the checksum of every array."""

import contextlib
import hashlib
import os
import pathlib
from collections.abc import Mapping

import numpy as np
import safetensors
import safetensors.numpy

from jmoe.convert.seal import Content, seal, unseal
from jmoe.errors import UserError

_KEY = "jmoe"  # of the metadata: sealed tables {"arrays": checksums by name, "notes": text by name}


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], Mapping[str, str]]:
    """Returns the arrays of a file by name, one copy of each, and the notes that jmoe wrote beside them.

    Checksums are compared where jmoe wrote them; without, a changed byte of an array goes unnoticed.

    Raises:
      UserError: the file is missing, damaged, or no .safetensors file; the message names it, and the array.
    """
    if not pathlib.Path(path).is_file():
        raise UserError(f"There is no file {path}.")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            sealed = _sealed(path, file.metadata() or {})
            arrays = {name: np.asarray(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118  # no mapping
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged, or no .safetensors file: {str(error).splitlines()[0]}.") from None
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} has an array of a dtype that NumPy does not have: {error}.") from None
    if sealed is None:
        return arrays, {}
    for name in sealed["arrays"].keys() | arrays.keys():
        if name not in arrays or sealed["arrays"].get(name) != _checksum(arrays[name]):
            raise UserError(f"{path} is damaged: {name!r} is not what was written (its checksum differs).")
    return arrays, sealed["notes"]


def write(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    *,
    notes: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes arrays to a file, under a temporary name that is replaced at the end.

    Raises:
      UserError: there is such a file already, or it cannot be written.
    """
    path = pathlib.Path(path)
    if path.exists() and not overwrite:
        raise UserError(f"There is a file {path} already. Choose another name, or say --overwrite.")
    arrays = {name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in arrays.items()}
    sealed = seal({"arrays": {name: _checksum(a) for name, a in arrays.items()}, "notes": dict(notes or {})})
    temporary = path.with_name(f".tmp.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.numpy.save_file(arrays, temporary, metadata={_KEY: sealed})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except (safetensors.SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"{path} cannot be written: {reason}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _sealed(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> Content | None:
    if _KEY not in metadata:
        return None
    try:
        return unseal(metadata[_KEY], {"arrays", "notes"})
    except ValueError as error:
        raise UserError(f"{path} {error}.") from None


def _checksum(array: np.ndarray) -> str:
    """Of dtype, shape and bytes: a header that says otherwise is damage, too."""
    digest = hashlib.sha256(f"{array.dtype.name} {array.shape} ".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()
