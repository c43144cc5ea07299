"""What happens to a picture on its way into a batch."""

from __future__ import annotations

import numpy as np

Element = dict[str, np.ndarray]


def augment(
    element: Element, rng: np.random.Generator, *, side: int, crop: int, flip: bool
) -> Element:
    """A random part of `side` × `side` pixels of the picture, mirrored in half of the cases.

    Args:
        element: {"image": (H, W, C), …}.
        rng: where the randomness comes from.
        side: of the result, in pixels.
        crop: black pixels that are first put around the picture.
        flip: whether to mirror at all.
    """
    image = np.pad(element["image"], ((crop, crop), (crop, crop), (0, 0)))
    top, left = (int(rng.integers(size - side + 1)) for size in image.shape[:2])
    image = image[top : top + side, left : left + side]
    if flip and rng.integers(2):
        image = image[:, ::-1]
    return {**element, "image": image}


def middle(element: Element, *, side: int) -> Element:
    """The middle `side` × `side` pixels of the picture."""
    top, left = ((size - side) // 2 for size in element["image"].shape[:2])
    return {**element, "image": element["image"][top : top + side, left : left + side]}


SCALE, SHIFT = 0.4, 0.1
"""A picture with boxes becomes 1 − SCALE to 1 + SCALE times as large, and moves by up to SHIFT of
its side."""

HUE, SATURATION, VALUE = 0.015, 0.6, 0.4
"""By how much colours change, at most: of the circle, and as factors 1 ± so much."""

GREY = 114
"""Around a picture that does not fill its square."""

LEAST_PIXELS, LEAST_PART = 2, 0.2
"""A box that less is left of, a side or of its area, is no longer one."""


def jitter(element: Element, rng: np.random.Generator, *, flip: bool) -> Element:
    """A picture with boxes scaled and moved, its colours changed, mirrored in half of the cases.

    Boxes are cut at the border, and dropped where little is left of them.

    Args:
        element: {"image": (S, S, 3) uint8, "boxes": (T, 5)}, class −1 where there is none.
        rng: where the randomness comes from.
        flip: whether to mirror at all.
    """
    image, boxes = element["image"], element["boxes"]
    scale = rng.uniform(1 - SCALE, 1 + SCALE)
    shift = rng.uniform(-SHIFT, SHIFT, 2) + (1 - scale) / 2
    image = _moved(image, scale, shift)
    middle_of = np.concatenate([boxes[:, 1:3] * scale + shift, boxes[:, 3:] * scale], 1)
    image, mirrored = _recoloured(image, rng), flip and bool(rng.integers(2))
    if mirrored:
        image = image[:, ::-1]
        middle_of[:, 0] = 1 - middle_of[:, 0]
    return {**element, "image": image, "boxes": _cut(boxes[:, :1], middle_of, len(image))}


def _moved(image: np.ndarray, scale: float, shift: np.ndarray) -> np.ndarray:
    from PIL import Image

    side = len(image)
    across, down = (-shift * side / scale).tolist()
    data = (1 / scale, 0, across, 0, 1 / scale, down)
    moved = Image.fromarray(image).transform(
        (side, side),
        Image.Transform.AFFINE,
        data,
        resample=Image.Resampling.BILINEAR,
        fillcolor=(GREY, GREY, GREY),
    )
    return np.asarray(moved)


def _recoloured(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    from PIL import Image

    gains = rng.uniform(-1, 1, 3) * (HUE, SATURATION, VALUE)
    hsv = np.asarray(Image.fromarray(image).convert("HSV")).astype(np.float32)
    hue = (hsv[..., 0] + 256 * gains[0]) % 256
    rest = np.clip(hsv[..., 1:] * (1 + gains[1:]), 0, 255)
    changed = np.concatenate([hue[..., None], rest], -1).astype(np.uint8)
    return np.asarray(Image.fromarray(changed, "HSV").convert("RGB"))


def _cut(classes: np.ndarray, boxes: np.ndarray, side: int) -> np.ndarray:
    """The boxes as far as they are in the picture, those that are left first."""
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    low, high = np.clip(low, 0, 1), np.clip(high, 0, 1)
    sizes = high - low
    area = boxes[:, 2:].prod(1)
    kept = (classes[:, 0] >= 0) & (sizes.min(1) * side >= LEAST_PIXELS)
    kept &= sizes.prod(1) >= LEAST_PART * area
    found = np.full((len(boxes), 5), -1, np.float32)
    rows = np.concatenate([classes, (low + high) / 2, sizes], 1)[kept]
    found[: len(rows)] = rows
    return found
