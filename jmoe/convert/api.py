"""Checkpoints of other programs as parameters of ours, and back."""

import dataclasses
import difflib
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jmoe.convert import vit_npz, vmoe_format
from jmoe.convert.infer import check, infer
from jmoe.convert.names import flatten, nest, to_ours, to_reference
from jmoe.errors import UserError
from jmoe.models.vit import ViTConfig

READ = ("vmoe", "vit", "safetensors")
WRITE = ("vmoe", "safetensors")
_WIDENED = ("bfloat16", "float16")  # exactly


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parameter:
    """One array, as the file has it.

    Attributes:
      name: ours.
      source: that of the file.
      shape: of the array.
      dtype: in the file; ours is float32.
    """

    name: str
    source: str
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrays:
    """The arrays of a checkpoint, of whatever model.

    Attributes:
      params: float32 arrays by our names, such as "blocks/5/moe/experts/w_in".
      parameters: what was read, in the same order.
      notes: what jmoe wrote beside the arrays, by name; empty for another program's files.
    """

    params: dict[str, np.ndarray]
    parameters: tuple[Parameter, ...]
    notes: Mapping[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by our names."""
        return {parameter.name: parameter.shape for parameter in self.parameters}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Imported(Arrays):
    """A checkpoint, with the model that its arrays are of.

    Attributes:
      config: the model.
      assumed: dotted options of config that arrays do not tell, such as "moe.router", with the published values taken.
    """

    config: ViTConfig
    assumed: dict[str, Any]


def load(format: str, path: str | os.PathLike[str], *, unversioned: bool = False) -> Imported:
    """Reads a checkpoint and finds out the model it is of.

    Args:
      format: "vmoe" for the files PREFIX.index and PREFIX.data-* of google-research/vmoe, "vit" for the original .npz
        files of vision transformers, "safetensors" for what `save` wrote.
      path: the PREFIX, or the file.
      unversioned: whether to read an index of before 2022-06-22 as it is to be read now; see `vmoe_format.read`.

    Raises:
      UserError: a file is missing or damaged, or its arrays are not those of a vision transformer of jmoe.
    """
    return with_inferred_model(read_arrays(format, path, unversioned=unversioned), path)


def with_inferred_model(arrays: Arrays, path: str | os.PathLike[str]) -> Imported:
    """Returns arrays with the model that they imply; raises UserError as `infer`."""
    inferred = infer(arrays.shapes, path)
    return Imported(config=inferred.config, assumed=inferred.assumed, **vars(arrays))


def read_arrays(format: str, path: str | os.PathLike[str], *, unversioned: bool = False) -> Arrays:
    """Reads the arrays of a checkpoint under our names, whatever model they are of; arguments and errors as `load`."""
    notes: Mapping[str, str] = {}
    if format == "vmoe":
        arrays = flatten(vmoe_format.read(path, unversioned=unversioned))
        notes = vmoe_format.read_notes(path)
        bare = {name.removeprefix("params/"): array for name, array in arrays.items()}  # of a training state
        if len(bare) < len(arrays):
            raise UserError(f"{path} has arrays under two names each, with and without 'params/'.")
        arrays = bare
    elif format == "vit":
        arrays = vit_npz.read(path)
    elif format == "safetensors":
        from jmoe.convert import safetensors_format  # only here, so that the others work where it is not installed

        arrays, notes = safetensors_format.read(path)
    else:
        raise _no_format(format, READ, "read")
    if not arrays:
        raise UserError(f"{path} has no arrays.")
    source = {name: name for name in arrays}
    if format != "safetensors":
        source = to_ours(source, path)
    params, parameters = {}, []
    for name, theirs in source.items():
        array = arrays.pop(theirs)  # so that one that is widened does not stay
        if not array.size:
            raise UserError(f"{path} has no elements in {theirs!r}, whose shape is {array.shape}.")
        parameters.append(Parameter(name=name, source=theirs, shape=array.shape, dtype=array.dtype.name))
        params[name] = _as_float32(array, theirs, path)
    return Arrays(params=params, parameters=tuple(parameters), notes=notes)


def save(
    format: str,
    path: str | os.PathLike[str],
    config: ViTConfig,
    params: Mapping[str, Any],
    *,
    num_shards: int = 1,
    notes: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes parameters as another program, or `load`, reads them; bit for bit, with checksums beside them.

    Args:
      format: "vmoe" for the published layout, "safetensors" for one file with our names.
      path: the PREFIX, or the file.
      config: the model.
      params: its parameters, flat or nested, by our names.
      num_shards: files that the published layout spreads them over.
      notes: text that is kept beside the checksums, by name.
      overwrite: whether to replace what is there.

    Raises:
      UserError: the parameters are not those of the model, have no place in the format, or cannot be written.
    """
    flat = {name: np.asarray(jax.device_get(array)) for name, array in flatten(params).items()}
    check({name: array.shape for name, array in flat.items()}, config, "What is to be written")
    if format == "vmoe":
        tree = nest(to_reference(flat))
        vmoe_format.write(path, tree, num_shards=num_shards, notes=notes, overwrite=overwrite)
    elif format == "safetensors":
        if num_shards != 1:
            raise UserError(f"A .safetensors file is one file; it cannot be spread over num_shards={num_shards}.")
        from jmoe.convert import safetensors_format

        safetensors_format.write(path, flat, notes=notes, overwrite=overwrite)
    else:
        raise _no_format(format, WRITE, "write")


def _as_float32(array: np.ndarray, name: str, path: object) -> np.ndarray:
    if array.dtype.name != "float32" and array.dtype.name not in _WIDENED:
        raise UserError(
            f"{path} has {array.dtype.name} at {name!r}; a parameter is float32, or {' or '.join(_WIDENED)} to be "
            "widened."
        )
    return array.astype(np.float32, copy=False)


def _no_format(format: str, known: tuple[str, ...], verb: str) -> UserError:
    near = difflib.get_close_matches(format, known, n=1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    return UserError(f"There is no format {format!r} to {verb}.{meant} The formats are: {', '.join(known)}.")
