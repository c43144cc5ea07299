"""A picture of any shape in a square, and boxes back out of it. numpy: a size more is no program
more."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

GREY = 114 / 255
"""Around the picture."""


class Letterboxed(NamedTuple):
    """A picture in its frame: (x, y) of the picture lies at (x · scale + left, y · scale + top)."""

    image: Float[np.ndarray, "h w 3"]
    scale: float
    left: int
    top: int


def letterbox(
    image: UInt8[np.ndarray, "H W 3"], side: int, *, stride: int | None = None
) -> Letterboxed:
    """The picture, as large as fits into `side` × `side`, in the middle of a grey frame.

    Bilinear between the middles of pixels without smoothing, as OpenCV's INTER_LINEAR; the result
    is not rounded to bytes.

    Args:
        image: RGB.
        side: of the frame, in pixels.
        stride: the frame is the smallest with sides of multiples of it; None for a square.
    """
    height, width = image.shape[:2]
    scale = min(side / height, side / width)
    high, wide = max(1, round(height * scale)), max(1, round(width * scale))
    frame_high, frame_wide = (
        (side, side) if stride is None else (_up(high, stride), _up(wide, stride))
    )
    top, left = (frame_high - high) // 2, (frame_wide - wide) // 2
    small = _resized(_resized(image / 255, high, 0), wide, 1)
    framed = np.full((frame_high, frame_wide, 3), GREY, np.float32)
    framed[top : top + high, left : left + wide] = small
    return Letterboxed(framed, scale, left, top)


def undo(
    boxes: Float[np.ndarray, "*B 4"], letterboxed: Letterboxed, height: int, width: int
) -> Float[np.ndarray, "*B 4"]:
    """Boxes in the frame, as corners, in pixels of the picture, and cut at its border."""
    shift = np.array([letterboxed.left, letterboxed.top] * 2, boxes.dtype)
    moved = (boxes - shift) / letterboxed.scale
    return np.clip(moved, 0, np.array([width, height] * 2, boxes.dtype))


def _resized(pixels: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Bilinear along one axis: point i of the result lies at (i + ½) · old / new − ½."""
    old = pixels.shape[axis]
    at = np.maximum((np.arange(size) + 0.5) * (old / size) - 0.5, 0)
    first = np.minimum(at.astype(int), old - 1)
    part = (at - first).reshape([-1 if i == axis else 1 for i in range(pixels.ndim)])
    second = np.minimum(first + 1, old - 1)
    return pixels.take(first, axis) * (1 - part) + pixels.take(second, axis) * part


def _up(size: int, stride: int) -> int:
    return math.ceil(size / stride) * stride
