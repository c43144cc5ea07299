"""Pictures as the networks trained on ImageNet expect them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def preprocess_imagenet(
    image: UInt8[np.ndarray, "H W"] | UInt8[np.ndarray, "H W C"] | Image,
    *,
    size: int = 224,
    resize: int = 256,
) -> Float[np.ndarray, "size size 3"]:
    """The usual way of an ImageNet picture into a network, as torchvision's weights were tested.

    The shorter side becomes `resize` pixels (bilinear, smoothed where it shrinks), the middle
    `size` × `size` is cut out, [0, 255] becomes [0, 1], and each channel (x − mean) / std with
    ImageNet's mean (0.485, 0.456, 0.406) and deviation (0.229, 0.224, 0.225), in RGB.

        x = np.stack([preprocess_imagenet(image) for image in images])     # B H W C, for Flax
        torch.from_numpy(x).permute(0, 3, 1, 2)                            # B C H W, for torch

    Args:
        image: a PIL picture of any mode, or uint8 of one to four channels (grey, with or
            without alpha, RGB, RGBA), last.
        size: of the result, a side.
        resize: the shorter side before the cut.

    Returns:
        float32.

    Raises:
        ValueError: `size` above `resize`; an array of other channels or of another dtype.
    """
    return normalized(cut_square(image, size=size, resize=resize), MEAN, STD)


def cut_square(
    image: UInt8[np.ndarray, "H W"] | UInt8[np.ndarray, "H W C"] | Image,
    *,
    size: int,
    resize: int,
    channels: int = 3,
) -> UInt8[np.ndarray, "size size channels"]:
    """The middle `size` × `size` pixels of `image` after its shorter side became `resize`.

    Args:
        channels: of the result, 3 for RGB, 1 for grey.

    Raises:
        ValueError: as `preprocess_imagenet`.
    """
    from PIL import Image

    if size > resize:
        raise ValueError(f"size {size} cannot be cut out of a side of {resize}")
    picture = image if isinstance(image, Image.Image) else Image.fromarray(_checked(image))
    picture = picture.convert("RGB" if channels == 3 else "L")
    scale = resize / min(picture.size)
    sides = [resize if side == min(picture.size) else int(side * scale) for side in picture.size]
    picture = picture.resize((sides[0], sides[1]), Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in sides)
    pixels = np.asarray(picture.crop((left, top, left + size, top + size)))
    return pixels.reshape(size, size, channels)


def normalized(
    pixels: UInt8[np.ndarray, "*B H W C"], mean: Sequence[float], std: Sequence[float]
) -> Float[np.ndarray, "*B H W C"]:
    """(pixels / 255 − mean) / std in float32, channel by channel."""
    scaled = pixels.astype(np.float32) / 255
    return (scaled - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)


def usual_side(model: Any) -> int:
    """Pixels of the side of the pictures that a network is mostly given: 640 for a detector, 32
    with the "cifar" stem, else 224."""
    if hasattr(model, "decode"):
        return 640
    return 32 if getattr(model, "stem", None) == "cifar" else 224


def _checked(array: np.ndarray) -> np.ndarray:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or not 1 <= channels <= 4:
        raise ValueError(
            "expected uint8 of (height, width) or (height, width, 1 to 4 channels), got "
            f"{array.dtype} of {array.shape}"
        )
    return array[:, :, 0] if array.ndim == 3 and channels == 1 else array
