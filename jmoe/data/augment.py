"""Random changes of a training image. Each is a frozen dataclass, called with an image and a generator.

An augmentation takes its randomness from the generator alone, so that an image of step k is the same in every run,
whatever the number of processes.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8

from jmoe.data.decode import resize_image
from jmoe.errors import UserError

Augmentation = Callable[[np.ndarray, np.random.Generator], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Shift:
    """Moves the image by a whole number of pixels in each direction, uniform in [-pixels, pixels].

    Attributes:
      pixels: the largest shift.
      fill: value of the pixels that come into view.
    """

    pixels: int = 1
    fill: int = 0

    def __post_init__(self):
        if self.pixels < 0 or not 0 <= self.fill <= 255:
            raise ValueError(
                f"Shift wants pixels of at least 0 and a fill from 0 to 255; it got {self.pixels} and {self.fill}."
            )

    def __call__(self, image: UInt8[np.ndarray, "H W C"], rng: np.random.Generator) -> UInt8[np.ndarray, "H W C"]:
        top = uniform_integer(rng, 2 * self.pixels + 1) - self.pixels
        left = uniform_integer(rng, 2 * self.pixels + 1) - self.pixels
        return _window(image, top, left, image.shape[0], image.shape[1], self.fill)


@dataclasses.dataclass(frozen=True)
class RandomFlip:
    """Mirrors the image left to right, half of the time."""

    def __call__(self, image: UInt8[np.ndarray, "H W C"], rng: np.random.Generator) -> UInt8[np.ndarray, "H W C"]:
        return image[:, ::-1] if rng.random() < 0.5 else image


@dataclasses.dataclass(frozen=True)
class RandomCrop:
    """Cuts a window of fixed size from a uniform place of the image, padded with black.

    Attributes:
      size: height and width of the window, in pixels; an int for a square.
      padding: black pixels added on each side first.
    """

    size: int | tuple[int, int]
    padding: int = 0

    def __call__(self, image: UInt8[np.ndarray, "H W C"], rng: np.random.Generator) -> UInt8[np.ndarray, "h w C"]:
        height, width = height_and_width(self.size)
        room = [image.shape[0] + 2 * self.padding - height, image.shape[1] + 2 * self.padding - width]
        if min(room) < 0:
            raise UserError(
                f"{self} cannot cut {height} x {width} pixels from an image of {image.shape[0]} x {image.shape[1]}: "
                "choose a smaller size or more padding."
            )
        top = uniform_integer(rng, room[0] + 1) - self.padding
        left = uniform_integer(rng, room[1] + 1) - self.padding
        return _window(image, top, left, height, width, fill=0)


@dataclasses.dataclass(frozen=True)
class InceptionCrop:
    """Cuts a window of random area and aspect ratio and resizes it (Szegedy et al. 2015, arXiv:1409.4842, section 6).

    The window is drawn as by TensorFlow's `sample_distorted_bounding_box`, with which the published models were
    trained: the aspect ratio is uniform in [3/4, 4/3], then the height uniform among those whose area is allowed.

    Attributes:
      size: height and width of the result, in pixels; an int for a square.
      area: smallest and largest share of the image's area that the window covers.
    """

    size: int | tuple[int, int]
    area: tuple[float, float] = (0.05, 1.0)

    def __post_init__(self):
        if not 0 < self.area[0] < self.area[1] <= 1:
            raise UserError(
                f"InceptionCrop takes area=(smallest, largest) where 0 < smallest < largest <= 1, not {self.area}."
            )

    def __call__(self, image: UInt8[np.ndarray, "H W C"], rng: np.random.Generator) -> UInt8[np.ndarray, "h w C"]:
        top, left, height, width = self._draw(image.shape[0], image.shape[1], rng)
        return resize_image(image[top : top + height, left : left + width], height_and_width(self.size))

    def _draw(self, image_height: int, image_width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """A window (top, left, height, width) inside the image; all of it if 100 attempts find none."""
        smallest, largest = (share * image_height * image_width for share in self.area)
        for _ in range(100):
            ratio = rng.uniform(3 / 4, 4 / 3)  # width / height
            low = max(1, round(math.sqrt(smallest / ratio)))
            high = min(round(math.sqrt(largest / ratio)), image_height, int((image_width + 0.499) / ratio))
            height = min(low, high) + uniform_integer(rng, max(high - low, 0) + 1)
            width = round(height * ratio)
            if 1 <= height <= image_height and 1 <= width <= image_width and smallest <= height * width <= largest:
                top = uniform_integer(rng, image_height - height + 1)
                left = uniform_integer(rng, image_width - width + 1)
                return top, left, height, width
        return 0, 0, image_height, image_width


def height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width), of a square where size is an int."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def uniform_integer(rng: np.random.Generator, count: int) -> int:
    """Uniform in [0, count), up to a bias of count / 2**53; several times faster than rng.integers for one number."""
    return int(rng.random() * count)


def _window(image: np.ndarray, top: int, left: int, height: int, width: int, fill: int) -> np.ndarray:
    """Pixels [top, top + height) x [left, left + width), with `fill` where that reaches outside the image."""
    H, W, C = image.shape
    window = np.full((height, width, C), fill, image.dtype)
    y0, y1 = max(top, 0), min(top + height, H)
    x0, x1 = max(left, 0), min(left + width, W)
    if y0 < y1 and x0 < x1:
        window[y0 - top : y1 - top, x0 - left : x1 - left] = image[y0:y1, x0:x1]
    return window
