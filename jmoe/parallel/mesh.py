"""The mesh of devices: what an experiment asks for, and what the devices at hand make of it."""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

from jmoe.errors import UserError

AXES = ("data", "fsdp", "expert", "model")
BATCH = ("data", "fsdp", "expert")  # the axes that split images and groups; the order is that of the images


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """How many devices work side by side along each axis; their product is the number of devices.

    Images are split over data, fsdp and expert together, so no device processes an image of another; with model the
    devices of one image share its matrix multiplies.

    Attributes:
      data: copies of all parameters but those of the axes below; None for all devices that these leave.
      expert: parts of the experts, a divisor of num_experts. Tokens travel to their experts along this axis. None for
        as many as divide num_experts and the devices that there are; of several slices, those of one.
      fsdp: parts in which parameters and the optimizer's state are kept; a layer's are brought together when it runs
        (fully sharded data parallel, ZeRO-3, arXiv:1910.02054).
      model: parts of each matrix multiply: the heads of attention, the hidden units of perceptrons, the classes
        (tensor parallel, arXiv:1909.08053).
    """

    data: int | None = None
    expert: int | None = None
    fsdp: int = 1
    model: int = 1

    def __post_init__(self):
        for name in ("data", "expert", "fsdp", "model"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Mesh wants {name} of at least 1; it got {value}.")

    def __str__(self) -> str:
        """As one writes it, such as Mesh(data=2, expert=4)."""
        named = {name: getattr(self, name) for name in ("data", "expert", "fsdp", "model")}
        shown = {n: v for n, v in named.items() if v not in (None, 1) or (n in ("data", "expert") and v is not None)}
        return f"Mesh({', '.join(f'{name}={value}' for name, value in shown.items())})"


def any_mesh(_: Mesh) -> bool:
    """What an experiment can take of which nothing is known."""
    return True


def resolve(
    mesh: Mesh,
    num_devices: int,
    num_experts: int | None = None,
    num_slices: int = 1,
    accepts: Callable[[Mesh], bool] = any_mesh,
) -> Mesh:
    """Returns the mesh with a number for every axis.

    Args:
      mesh: as asked for.
      num_devices: of all processes together.
      num_experts: E of the sparse layers; None for a dense model.
      num_slices: of TPUs, over which the devices are spread evenly. Only the data axis goes from slice to slice.
      accepts: whether the experiment could take another mesh that is about to be recommended.

    Raises:
      UserError: the axes do not multiply to the devices, expert does not divide num_experts, or the slices do not
        divide data; the message has the nearest mesh that can be.
    """
    E = num_experts or 1

    def advice() -> str:
        left_out = mesh.data is None and mesh.expert is None
        best = nearest(mesh, num_devices, E, num_slices, accepts)
        return f"use {best}{'' if left_out else ', or leave data and expert out to have them chosen'}."

    if mesh.expert is not None and E % mesh.expert:
        which = f"num_experts={E}" if num_experts else "a model without experts"
        raise UserError(f"{mesh} divides the experts by {mesh.expert}, which {which} does not allow: {advice()}")
    left, remainder = divmod(num_devices, mesh.fsdp * mesh.model * (mesh.expert or 1) * (mesh.data or 1))
    if remainder == 0:
        expert = mesh.expert or math.gcd(E, left if mesh.data else max(1, left // num_slices))
        left //= 1 if mesh.expert else expert
        data = mesh.data or left
        left //= 1 if mesh.data else data
        if left == 1 and data % num_slices:
            raise UserError(
                f"{mesh} makes data={data} of {num_slices} slices, and data must be a multiple of them, because only "
                f"gradients go from slice to slice: {advice()}"
            )
        if left == 1:
            return dataclasses.replace(mesh, data=data, expert=expert)
        if mesh.expert is None:
            most = f"num_experts={E} can be divided by {expert} at most" if num_experts else "the model has no experts"
            raise UserError(
                f"{mesh} leaves {left * expert} of {num_devices} devices to the experts, and {most}: {advice()}"
            )
    needed = math.prod(getattr(mesh, name) or 1 for name in AXES)
    count = f"{needed} devices" if None not in (mesh.data, mesh.expert) else f"a multiple of {needed} devices"
    raise UserError(f"{mesh} is for {count}; there {'is' if num_devices == 1 else 'are'} {num_devices}: {advice()}")


def build(
    mesh: Mesh,
    devices: Sequence[Any] | None = None,
    num_experts: int | None = None,
    accepts: Callable[[Mesh], bool] = any_mesh,
) -> jax.sharding.Mesh:
    """Lays the devices out along the axes AXES, those that talk most next to each other.

    Args:
      mesh: as asked for; see `resolve` for what None means.
      devices: all of the run, or of a topology to compile for; `jax.devices()` if None.
      num_experts: E of the sparse layers; None for a dense model.
      accepts: see `resolve`.

    Raises:
      UserError: as `resolve`, or slices of several sizes.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = slices_of(devices)
    resolved = resolve(mesh, len(devices), num_experts, len(slices), accepts)
    shape = tuple(getattr(resolved, name) for name in AXES)
    inner = (shape[0] // len(slices), *shape[1:])  # between slices the network is slow: only gradients go over it
    grid = np.concatenate([_laid_out(inner, members) for members in slices])
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def slices_of(devices: Sequence[Any]) -> list[list[Any]]:
    """Returns the devices of each TPU slice; others, such as GPUs of several hosts, count as one slice.

    Raises:
      UserError: the slices are not of one size.
    """
    by_slice: dict[int, list[Any]] = {}
    for device in devices:
        number = getattr(device, "slice_index", 0) if device.platform == "tpu" else 0
        by_slice.setdefault(number, []).append(device)
    slices = [by_slice[number] for number in sorted(by_slice)]
    sizes = sorted({len(members) for members in slices})
    if len(sizes) > 1:
        raise UserError(f"A mesh wants slices of one size; there are some of {sizes[0]} and some of {sizes[-1]} chips.")
    return slices


def _laid_out(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """The devices of one slice along the axes AXES."""
    from jax.experimental import mesh_utils

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX's own about layouts that are not the best it knows
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return _in_blocks(shape, devices, np.asarray(grid))


def _in_blocks(shape: tuple[int, ...], devices: Sequence[Any], grid: np.ndarray) -> np.ndarray:
    """Lays devices out so that those of an all-to-all along `expert` form a block of the torus, if that is faster.

    In an all-to-all of n chips, half of what they send crosses the middle of the block in each direction. For a side of
    f chips there are n / f lines to carry it, twice as many where the side goes around the torus: the time grows with
    the longest side, and a row of 8 chips takes twice as long as a block of 2 by 4.

    Args:
      shape: the size of each axis of AXES.
      devices: of one slice.
      grid: the layout to improve on.

    Returns:
      a layout [data, fsdp, expert, model]; `grid` if there is none in which expert is faster.
    """
    if not all(hasattr(device, "coords") for device in devices):
        return grid
    by_place = {tuple(device.coords): device for device in devices}
    sides = tuple(int(side) + 1 for side in np.max(list(by_place), axis=0))
    if len(by_place) != len(devices) or math.prod(sides) != len(devices):
        return grid  # several devices to a chip, or not a whole slice

    def time(block: Sequence[int]) -> float:
        return max(
            f / (2 if f == side and _wraps(side, sides) else 1) if f > 1 else 0.0
            for f, side in zip(block, sides, strict=True)
        )

    axis = AXES.index("expert")
    places = np.array([device.coords for device in np.moveaxis(grid, axis, -1).reshape(-1, shape[axis])[0]])
    now = tuple(len(set(column)) for column in places.T)
    best = min(_factors(shape[axis], sides), key=time, default=None)
    if best is None or (math.prod(now) == shape[axis] and time(best) >= time(now)):
        return grid
    # The other axes share what is left of each side, model in the shortest pieces.
    left = [side // f for side, f in zip(sides, best, strict=True)]
    blocks = {"expert": best}
    for name in ("model", "fsdp", "data"):
        block = min(_factors(shape[AXES.index(name)], left), key=max, default=None)
        if block is None:
            return grid
        blocks[name] = block
        left = [side // f for side, f in zip(left, block, strict=True)]
    # Each side, cut into (data, fsdp, expert, model), so that those of the last are neighbours.
    cut = [blocks[name][d] for d in range(len(sides)) for name in AXES]
    chips = np.empty(sides, object)
    for place, device in by_place.items():
        chips[place] = device
    order = [d * len(AXES) + a for a in range(len(AXES)) for d in range(len(sides))]
    return chips.reshape(cut).transpose(order).reshape(shape)


def _wraps(side: int, sides: Sequence[int]) -> bool:
    """Whether a side of a slice goes around: one of 16 chips in two dimensions, all in three if made of 4 by 4 by 4."""
    return all(s % 4 == 0 for s in sides) if min(sides) > 1 and len(sides) == 3 else side == 16


def _factors(number: int, sides: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Yields the ways to write a number as a product of divisors of the sides."""
    if not sides:
        if number == 1:
            yield ()
        return
    for f in _divisors(math.gcd(number, sides[0])):
        for rest in _factors(number // f, sides[1:]):
            yield (f, *rest)


def batch_parts(mesh: jax.sharding.Mesh) -> int:
    """In how many parts images and groups are split."""
    return math.prod(mesh.shape[name] for name in BATCH)


def of(mesh: jax.sharding.Mesh) -> Mesh:
    """The axes of a mesh of devices as an experiment has them."""
    return Mesh(**{name: mesh.shape[name] for name in AXES})


def possible(
    num_devices: int,
    num_experts: int | None = None,
    *,
    fsdp: int | None = None,
    model: int | None = None,
    num_slices: int = 1,
) -> Iterator[Mesh]:
    """Yields every Mesh of so many devices in slices; of those given, only such with that fsdp or model."""
    for expert, f, m in itertools.product(_divisors(num_devices), repeat=3):
        if (num_experts or 1) % expert or num_devices % (expert * f * m * num_slices):
            continue
        if (fsdp is None or f == fsdp) and (model is None or m == model):
            yield Mesh(data=num_devices // (expert * f * m), expert=expert, fsdp=f, model=m)


def nearest(
    mesh: Mesh,
    num_devices: int,
    num_experts: int | None = None,
    num_slices: int = 1,
    accepts: Callable[[Mesh], bool] = any_mesh,
) -> Mesh:
    """The mesh of so many devices that differs least from the one asked for, if possible one that is accepted."""

    def distance(other: Mesh) -> float:
        # fsdp and model before expert, and that before data: what parts a model for its memory comes first.
        weights = {"data": 1.0, "expert": 2.0, "fsdp": 4.0, "model": 4.0}
        pairs = [(w, getattr(mesh, name) or getattr(other, name), getattr(other, name)) for name, w in weights.items()]
        return sum(weight * abs(math.log(wanted / has)) for weight, wanted, has in pairs)

    allowed = possible(num_devices, num_experts, num_slices=num_slices)
    return min(allowed, key=lambda other: (not accepts(other), distance(other), -(other.expert or 1)))


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]
