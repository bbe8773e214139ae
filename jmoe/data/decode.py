"""Bytes of an image file to pixels, and pixels to another size."""

import io

import numpy as np
from jaxtyping import UInt8

# 8192 x 8192: about ten times a large photograph, and below the size at which Pillow itself begins to warn.
MAX_PIXELS = 2**26


class DecodeError(ValueError):
    """The bytes are not a whole image that we can read; the message says why."""


def decode_image(data: bytes, channels: int = 3) -> UInt8[np.ndarray, "H W C"]:
    """Decodes an image of any common format, recognised by its content and not by its file name.

    JPEG, gray and CMYK included, goes through libjpeg-turbo; whatever that refuses goes through Pillow. Its inverse
    cosine transform is the fast integer one, as in the decoder that fed the published models: our pixels are
    TensorFlow's, while those of the accurate transform differ by up to 5 levels. As is usual for ImageNet, the EXIF
    orientation is ignored and an alpha channel dropped. Of an animation, the first frame counts.

    Args:
      data: the whole file.
      channels: 3 for RGB, 1 for gray.

    Raises:
      DecodeError: the bytes are empty, truncated, not an image, or an image of more than `MAX_PIXELS` pixels.
    """
    if channels not in (1, 3):
        raise ValueError(f"decode_image makes 3 channels (RGB) or 1 (gray), not {channels=}.")
    if not data:
        raise DecodeError("the file is empty")
    if data.startswith(b"\xff\xd8"):
        image = _decode_jpeg(data, channels)
        if image is not None:
            return image
    return _decode_with_pillow(data, channels)


def resize_image(image: UInt8[np.ndarray, "H W C"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w C"]:
    """Resizes to (height, width), bilinearly with half-pixel centres and no antialiasing: for training.

    As published models were fed, but rounded to uint8, which their pipeline truncates; half a level is little beside
    the augmentations. Evaluation takes `jmoe.data.preprocess.Resize`, which is exact and slower.
    """
    import cv2

    if image.shape[:2] == size:
        return image
    height, width = size
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(resized).reshape(height, width, image.shape[-1])  # OpenCV drops an axis of one channel


def _decode_jpeg(data: bytes, channels: int) -> np.ndarray | None:
    """The pixels of a JPEG, or None where libjpeg-turbo refuses."""
    import simplejpeg

    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        _check_size(int(height), int(width))
        return simplejpeg.decode_jpeg(data, colorspace="RGB" if channels == 3 else "GRAY", fastdct=True)
    except DecodeError:
        raise
    except ValueError:
        return None  # Pillow reads a few that libjpeg-turbo does not, and words the error for the others


def _decode_with_pillow(data: bytes, channels: int) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:  # reads the header only
            _check_size(image.height, image.width)
            if image.mode.startswith("I"):  # 16 bits per pixel; convert() would clip them instead of scaling
                gray = (np.asarray(image) // 256).astype(np.uint8)
                return np.repeat(gray[:, :, None], channels, axis=2)
            if image.mode in ("P", "PA") and "transparency" in image.info:
                image = image.convert("RGBA")  # a palette with alpha cannot become RGB in one step
            pixels = np.asarray(image.convert("RGB" if channels == 3 else "L"))
    except DecodeError:
        raise
    except Exception as error:  # Pillow's readers raise whatever they meet: SyntaxError, struct.error, EOFError, ...
        reason = "not an image of a known format" if type(error).__name__ == "UnidentifiedImageError" else str(error)
        raise DecodeError(reason or type(error).__name__) from error
    return pixels.reshape(*pixels.shape[:2], channels)


def _check_size(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise DecodeError(f"the image has {height} x {width} pixels, more than the limit of {MAX_PIXELS}")
