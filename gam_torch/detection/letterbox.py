"""A picture of any shape in a square, and boxes back out of it."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

GREY = 114 / 255
"""Around the picture."""


class Letterboxed(NamedTuple):
    """A picture in its frame: (x, y) of the picture lies at (x · scale + left, y · scale + top)."""

    image: Float[Tensor, "3 h w"]
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
    pixels = torch.from_numpy(image / 255).permute(2, 0, 1)  # float64, or places are not exact
    small = F.interpolate(pixels[None], (high, wide), mode="bilinear", align_corners=False)[0]
    framed = torch.full((3, frame_high, frame_wide), GREY, dtype=torch.float32)
    framed[:, top : top + high, left : left + wide] = small
    return Letterboxed(framed, scale, left, top)


def undo(
    boxes: Float[np.ndarray, "*B 4"], letterboxed: Letterboxed, height: int, width: int
) -> Float[np.ndarray, "*B 4"]:
    """Boxes in the frame, as corners, in pixels of the picture, and cut at its border."""
    shift = np.array([letterboxed.left, letterboxed.top] * 2, boxes.dtype)
    moved = (boxes - shift) / letterboxed.scale
    return np.clip(moved, 0, np.array([width, height] * 2, boxes.dtype))


def _up(size: int, stride: int) -> int:
    return math.ceil(size / stride) * stride
