"""The original vision transformers: .npz files of google-research/vision_transformer, with flat names."""

import math
import os
import pathlib
import re
import tokenize
import zipfile
import zlib

import numpy as np

from jmoe.convert.transforms import renumber_modules
from jmoe.errors import UserError

# What Deflate can gain at most; a member that claims more is no array that anyone compressed.
_MAX_RATIO = 1100
# What zipfile and NumPy raise for damage; NumPy tokenizes a header that is no literal.
_UNREADABLE = (ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, tokenize.TokenError, MemoryError)
_RULES = (
    (r"Transformer/(encoderblock_\d+)/MultiHeadDotProductAttention_0/", r"Encoder/\1/SelfAttention/"),
    (r"Transformer/(encoderblock_\d+)/MlpBlock_0/", r"Encoder/\1/Mlp/"),
    (r"Transformer/(encoderblock_\d+)/(LayerNorm_[01])/", r"Encoder/\1/\2/"),
    (r"Transformer/(encoder_norm|posembed_input)/", r"Encoder/\1/"),
)


def read(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Returns the arrays of a file under the names of google-research/vmoe; those without such a name keep their own.

    Nothing is unpickled. Sizes are compared with those of the file before an array is allocated.

    Raises:
      UserError: the file is missing, damaged, or no .npz file; the message names it, and the array.
    """
    arrays = read_npz(path)
    renumbered = renumber_modules(arrays)
    found = {}
    for name, array in arrays.items():
        block = re.match(r"Transformer/encoderblock_\d+/", name)
        if block and not renumbered[name].startswith(block[0]):
            raise UserError(f"{path} lacks a block before {block[0][:-1]!r}: they are numbered from 0.")
        found[_reference_name(renumbered[name])] = array
    if len(found) < len(arrays):
        raise UserError(f"{path} has arrays under two names each: it mixes the names of two programs.")
    return found


def _reference_name(name: str) -> str:
    for pattern, replacement in _RULES:
        if re.match(pattern, name):
            return re.sub(f"^{pattern}", replacement, name)
    return name


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Returns the arrays of an .npz file by name, without unpickling and without trusting its sizes.

    Raises:
      UserError: as `read`.
    """
    if not pathlib.Path(path).is_file():
        raise UserError(f"There is no file {path}.")
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                if name in arrays:
                    raise UserError(f"{path} has {name!r} twice.")
                try:
                    arrays[name] = _read_member(archive, member)
                except _UNREADABLE as error:
                    raise UserError(f"{path} is damaged at {name!r}: {_first_line(error)}.") from None
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged, or no .npz file of arrays: {_first_line(error)}.") from None
    return arrays


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    """Reads one array; raises ValueError, in words, if it is none."""
    if member.file_size > _MAX_RATIO * (member.compress_size + 1):
        raise ValueError(f"it claims {member.file_size:,} bytes in {member.compress_size:,} compressed ones")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version > (2, 0):
            raise ValueError(f"its version of the .npy format is {version}")
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
        if dtype.hasobject:
            raise ValueError("it holds pickled Python objects, which jmoe never loads")
        if math.prod(shape) * dtype.itemsize != member.file_size - file.tell():
            raise ValueError(f"its {member.file_size:,} bytes do not fit {dtype} {shape}")
    with archive.open(member) as file:
        array = np.lib.format.read_array(file, allow_pickle=False)
        file.read(1)  # the end, where the archive's checksum is compared
    return array


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(". ")
