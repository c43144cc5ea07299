"""Boxes drawn on a photograph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gam_flax.detection.detector import Found

if TYPE_CHECKING:
    from PIL.Image import Image

COLOURS = (
    *("#e41a1c", "#4daf4a", "#377eb8", "#984ea3", "#ff7f00", "#f781bf", "#a65628", "#17becf"),
    *("#bcbd22", "#666666"),
)
"""Of the classes, in turn; white writing can be read on each."""


def draw_boxes(picture: Image, found: Found, classes: Sequence[str]) -> Image:
    """A copy of `picture` with a frame around each box, its class and its score; the best on top.

    Lines and letters grow with the picture.
    """
    from PIL import ImageDraw, ImageFont

    drawn = picture.convert("RGB")
    pen = ImageDraw.Draw(drawn)
    line = max(1, round(max(drawn.size) / 250))
    font = ImageFont.load_default(max(9, round(max(drawn.size) / 45)))
    order = range(len(found.scores) - 1, -1, -1)
    for i in order:
        pen.rectangle([float(x) for x in found.boxes[i]], outline=_colour(found, i), width=line)
    for i in order:
        name = classes[int(found.classes[i])]
        left, top = float(found.boxes[i][0]), float(found.boxes[i][1])
        words = f"{name} {found.scores[i]:.2f}"
        wide, high = pen.textbbox((0, 0), words, font=font)[2:]
        left = min(max(0.0, left), max(0.0, drawn.width - wide - 2 * line))
        top = top - high - 2 * line if top >= high + 2 * line else top
        pen.rectangle([left, top, left + wide + 2 * line, top + high + 2 * line], _colour(found, i))
        pen.text((left + line, top + line / 2), words, fill="white", font=font)
    return drawn


def _colour(found: Found, i: int) -> str:
    return COLOURS[int(found.classes[i]) % len(COLOURS)]
