"""Preprocessing of evaluation images as published: its operations, and the strings in which it is written.

Every operation is a frozen dataclass that is called with an array. They do the arithmetic of the TensorFlow operations
by which V-MoE was evaluated, in float32 and in the same order, oddities included: what the published numbers depend on
is reproduced, and named in the docstrings. Augmentations of training images are in `jmoe.data.augment`.
"""

import ast
import dataclasses
import difflib
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float32, Integer, Shaped, UInt8

from jmoe.data.augment import height_and_width
from jmoe.data.decode import decode_image
from jmoe.errors import UserError

Preprocess = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Resize:
    """Resizes bilinearly with half-pixel centres and no antialiasing, and casts back to the dtype that came.

    For uint8 that cast truncates, as published, so that the result is darker by half a level than a rounded one would
    be. `jmoe.data.decode.resize_image`, which training uses, rounds, and is many times as fast.

    Attributes:
      size: height and width of the result in pixels, whatever the aspect ratio was; an int for a square.
    """

    size: int | tuple[int, int]

    def __post_init__(self):
        _check_size("Resize", self.size)

    def __call__(self, image: Shaped[np.ndarray, "H W C"]) -> Shaped[np.ndarray, "h w C"]:
        size = height_and_width(self.size)
        if image.shape[:2] == size:
            return image
        above, below, y = _neighbours(image.shape[0], size[0])
        left, right, x = _neighbours(image.shape[1], size[1])

        def interpolate_rows(rows: np.ndarray) -> np.ndarray:
            pixels = image[rows].astype(np.float32)
            start = pixels[:, left]
            return start + (pixels[:, right] - start) * x[:, None]

        top = interpolate_rows(above)
        return (top + (interpolate_rows(below) - top) * y[:, None, None]).astype(image.dtype)


@dataclasses.dataclass(frozen=True)
class ResizeSmall:
    """Resizes the smaller side to a size and keeps the aspect ratio; each new pixel averages the area that it covers.

    Pixels that are covered in part count in part, also where the image is enlarged. The larger side is rounded half to
    even, and the result is float32 on the scale that came: it is not rounded back.

    Attributes:
      size: the smaller side of the result, in pixels.
    """

    size: int

    def __post_init__(self):
        _check_size("ResizeSmall", self.size)

    def __call__(self, image: Shaped[np.ndarray, "H W C"]) -> Float32[np.ndarray, "h w C"]:
        ratio = np.float32(self.size) / np.float32(min(image.shape[:2]))
        height, width = (int(np.rint(np.float32(side) * ratio)) for side in image.shape[:2])
        return _average_areas(_average_areas(image, 0, height), 1, width)


@dataclasses.dataclass(frozen=True)
class CentralCrop:
    """Cuts a window from the middle; where it cannot be in the middle, it is half a pixel nearer to the top left.

    Attributes:
      size: height and width of the window in pixels; an int for a square.
    """

    size: int | tuple[int, int]

    def __post_init__(self):
        _check_size("CentralCrop", self.size)

    def __call__(self, image: Shaped[np.ndarray, "H W C"]) -> Shaped[np.ndarray, "h w C"]:
        height, width = height_and_width(self.size)
        top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
        if min(top, left) < 0:
            raise UserError(
                f"{self} cannot cut {height} x {width} pixels from an image of {image.shape[0]} x {image.shape[1]}: "
                "choose a smaller size, or resize first."
            )
        return image[top : top + height, left : left + width]


@dataclasses.dataclass(frozen=True)
class ValueRange:
    """Maps in_min ... in_max linearly to vmin ... vmax, in float32.

    Attributes:
      vmin: what in_min becomes.
      vmax: what in_max becomes.
      in_min: one number, or one per channel.
      in_max: likewise.
      clip_values: whether what lies outside vmin ... vmax is clipped.
    """

    vmin: int | float
    vmax: int | float
    in_min: int | float | tuple[int | float, ...] = 0
    in_max: int | float | tuple[int | float, ...] = 255
    clip_values: bool = False

    def __call__(self, image: Shaped[np.ndarray, "H W C"]) -> Float32[np.ndarray, "H W C"]:
        low, high = np.asarray(self.in_min, np.float32), np.asarray(self.in_max, np.float32)
        vmin, vmax = np.float32(self.vmin), np.float32(self.vmax)
        scaled = vmin + (image.astype(np.float32) - low) / (high - low) * (vmax - vmin)
        return np.clip(scaled, vmin, vmax) if self.clip_values else scaled


@dataclasses.dataclass(frozen=True)
class OneHot:
    """Labels to vectors: `on` at the label, `off` elsewhere; a label outside [0, depth), such as -1, is nowhere.

    Attributes:
      depth: number of classes.
      multi: whether several labels make one vector, in which a repeated one counts once; else each makes its own.
      on: value at a label.
      off: value elsewhere.
    """

    depth: int
    multi: bool = True
    on: int | float = 1.0
    off: int | float = 0.0

    def __call__(
        self, label: Integer[np.ndarray, "*labels"] | np.integer | int
    ) -> Float32[np.ndarray, "*labels_unless_merged depth"]:
        labels = np.asarray(label)
        hot = labels[..., None] == np.arange(self.depth)
        if self.multi and labels.ndim:
            hot = hot.reshape(-1, self.depth).any(axis=0)
        return np.where(hot, np.float32(self.on), np.float32(self.off))


@dataclasses.dataclass(frozen=True)
class Decode:
    """Bytes of an image file to pixels, by `jmoe.data.decode.decode_image`.

    Attributes:
      channels: 3 for RGB, into which gray is repeated; 1 for gray.
    """

    channels: int = 3

    def __call__(self, data: bytes) -> UInt8[np.ndarray, "H W C"]:
        return decode_image(data, self.channels)


@dataclasses.dataclass(frozen=True)
class Step:
    """An operation in a pipeline: it reads one feature of an example and writes one.

    Attributes:
      operation: what is called with the feature.
      inkey: the feature read.
      outkey: the feature written.
    """

    operation: Callable[[Any], Any]
    inkey: str
    outkey: str

    def __call__(self, features: dict[str, Any]) -> dict[str, Any]:
        if self.inkey not in features:
            raise UserError(
                f"{self.operation} reads the feature {self.inkey!r}, and there are {', '.join(features) or 'none'}: "
                "name another by inkey, or make it by an operation before."
            )
        return {**features, self.outkey: self.operation(features[self.inkey])}


@dataclasses.dataclass(frozen=True)
class Keep:
    """The step that drops all features but some.

    Attributes:
      keys: the features kept.
    """

    keys: tuple[str, ...]

    def __call__(self, features: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in features.items() if key in self.keys}


OPERATIONS = {
    "decode": Decode,
    "resize": Resize,
    "resize_small": ResizeSmall,
    "central_crop": CentralCrop,
    "value_range": ValueRange,
    "onehot": OneHot,
}


def parse_pipeline(text: str) -> tuple[Step | Keep, ...]:
    """Reads a published pipeline, such as 'decode|resize_small(256)|central_crop(224)|value_range(-1,1)|keep("image")'.

    Operations read and write "image", `onehot` reads and writes "labels", unless told otherwise by `inkey` and
    `outkey`, or by `key` for both. Apply with `for step in parse_pipeline(text): features = step(features)`.
    Arguments are literals: nothing in the text is run.

    Raises:
      UserError: it is not a pipeline, names an operation that there is not, or one with arguments that do not fit.
    """
    try:
        node: ast.expr = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(
            f"{text!r} is not a pipeline, which is operations with their arguments between bars, such as "
            "'decode|resize(256)|central_crop(224)'."
        ) from error
    steps = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):  # a | b | c is (a | b) | c
        steps.append(node.right)
        node = node.left
    return tuple(_parse_step(step, text) for step in [node, *reversed(steps)])


def _parse_step(node: ast.expr, pipeline: str) -> Step | Keep:
    """One operation of a pipeline: a name, or a name with arguments."""
    source = ast.unparse(node)
    call = node if isinstance(node, ast.Call) else ast.Call(func=node, args=[], keywords=[])
    name = call.func.id if isinstance(call.func, ast.Name) else None
    if name not in OPERATIONS and name != "keep":
        known = [*OPERATIONS, "keep"]
        near = difflib.get_close_matches(name or "", known, n=1)
        meant = f" Did you mean '{near[0]}'?" if near else ""
        raise UserError(
            f"There is no operation {name or source!r} for evaluation (from the pipeline {pipeline!r}).{meant} "
            f"There are {', '.join(known)}; what changes training images is in jmoe.data.augment."
        )
    try:
        args = [_as_tuple(ast.literal_eval(arg)) for arg in call.args]
        options = {str(word.arg): _as_tuple(ast.literal_eval(word.value)) for word in call.keywords}
    except (ValueError, TypeError) as error:
        raise UserError(
            f"The arguments of {source!r} must be numbers, text, True, False or lists of them (from the pipeline "
            f"{pipeline!r})."
        ) from error
    if name == "keep":
        keys = tuple(key for arg in args for key in (arg if isinstance(arg, tuple) else (arg,)))
        if options or not keys or not all(isinstance(key, str) for key in keys):
            raise UserError(f'{source!r} must name the features to keep, as in \'keep("image", "labels")\'.')
        return Keep(keys)
    default = "labels" if name == "onehot" else "image"
    inkey, outkey, key = keys = [options.pop(option, None) for option in ("inkey", "outkey", "key")]
    if not all(isinstance(key, str | None) for key in keys):
        raise UserError(f'{source!r} must name features by text, as in inkey="label" (from {pipeline!r}).')
    try:
        inspect.signature(OPERATIONS[name]).bind(*args, **options)
    except TypeError as error:
        wanted = ", ".join(field.name for field in dataclasses.fields(OPERATIONS[name]))
        raise UserError(
            f"The arguments of {source!r} do not fit ({error}): {name} takes {wanted}, and inkey, outkey or key."
        ) from error
    return Step(OPERATIONS[name](*args, **options), key or inkey or default, key or outkey or default)


def _as_tuple(value: Any) -> Any:
    """Lists as tuples, which a frozen operation can hold."""
    return tuple(map(_as_tuple, value)) if isinstance(value, list | tuple) else value


def _check_size(name: str, size: Any) -> None:
    sides = size if isinstance(size, tuple) and len(size) == 2 and name != "ResizeSmall" else (size,)
    if not all(isinstance(side, int) and side >= 1 for side in sides):
        pair = "" if name == "ResizeSmall" else ", or (height, width)"
        raise UserError(f"{name} wants a size of at least 1 pixel{pair}; it got {size!r}.")


def _neighbours(n: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each of `size` new pixels: the two of n old ones between which it lies, and how near the second."""
    centre = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * (np.float32(n) / np.float32(size))
    centre -= np.float32(0.5)
    before = np.floor(centre)
    first = np.maximum(before.astype(np.int64), 0)
    second = np.minimum(np.ceil(centre).astype(np.int64), n - 1)
    return first, second, centre - before


def _average_areas(pixels: np.ndarray, axis: int, size: int) -> np.ndarray:
    """Averages along an axis over `size` equal stretches, in float32; their ends may lie within a pixel."""
    n = pixels.shape[axis]
    scale = np.float32(n) / np.float32(size)
    edges = np.arange(size + 1, dtype=np.float32) * scale
    start, end = edges[:-1], edges[1:]
    across = (1,) * axis + (size,) + (1,) * (pixels.ndim - axis - 1)
    total = np.zeros((*pixels.shape[:axis], size, *pixels.shape[axis + 1 :]), np.float32)
    for tap in range(math.ceil(scale) + 1):
        pixel = np.floor(start) + np.float32(tap)
        # The part of the stretch in this pixel; all of a stretch is `scale`, which end - start would be less exactly.
        until = np.where(pixel + 1 > end, end - pixel, 1)
        part = np.where(pixel < start, np.where(pixel + 1 > end, scale, pixel + 1 - start), np.maximum(until, 0))
        total += pixels.take(np.minimum(pixel, n - 1).astype(np.int64), axis) * part.reshape(across)
    return total / scale
