"""A photograph through a network, with all that its attention did on the way."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from gam_flax.convert.errors import CheckpointError, shorten
from gam_flax.maps.gates import AttentionMap, Blocks, attention_maps
from gam_flax.preprocess import MEAN, STD, cut_square, normalized, usual_side

if TYPE_CHECKING:
    from PIL.Image import Image

SMALL = 64
"""A square picture of up to so many pixels comes from a data set, and is taken as it is."""


@dataclass(frozen=True)
class Photograph:
    """One photograph as a network saw it.

    pixels: what was cut out of it, uint8, (H, W, 1 or 3).
    probabilities: softmax of the network's output, (K,); None where that is no vector of logits.
    classes: K names.
    maps: what the attention blocks did, of this photograph alone.
    """

    pixels: np.ndarray
    probabilities: np.ndarray | None
    classes: Sequence[str]
    maps: list[AttentionMap]

    def likeliest(self, count: int) -> list[tuple[str, float]]:
        """Names and probabilities, from the highest; none without probabilities."""
        if self.probabilities is None:
            return []
        order = np.argsort(-self.probabilities, kind="stable")[:count]
        return [(self.classes[int(i)], float(self.probabilities[i])) for i in order]


def draw_attention_maps(
    model: nnx.Module,
    image: str | os.PathLike | np.ndarray | Image,
    path: str | os.PathLike,
    *,
    side: int | None = None,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
    classes: Sequence[str] | None = None,
    blocks: Blocks = "last",
    force: bool = False,
) -> Photograph:
    """One figure of a photograph: the prediction, and a row for each attention block.

    Of each block, from left to right: the channel gate, one value a channel in ascending order,
    with the pixels' spread where it has more than one; the spatial gate's mean over the channels,
    laid over the photograph; and the root mean square of the activations over the channels,
    before and after the block, on one scale.

    Args:
        model: an NNX network with GAM, CBAM, SE or BAM in it.
        image: a file, a PIL picture, or uint8 (H, W) or (H, W, channels).
        path: .png to write.
        side: the middle so many pixels are cut out after the shorter side became 8/7 of it; a
            square picture that has that side is taken as it is. None for what suits the network,
            224 or 32 pixels, and for square pictures of up to 64 pixels as they are.
        mean, std: of each channel of pixels scaled to 0 … 1, by which the network was trained;
            `gam_flax.convert.picture_settings` reads them, and what else a file knows.
        classes: their names; None for numbers.
        blocks: see `attention_maps`.
        force: replace `path` where it exists.

    Returns:
        What was drawn, as numbers.

    Raises:
        CheckpointError: the photograph cannot be read; `path` exists, or cannot be written.
        ValueError: `attention_maps`' and `preprocess_imagenet`'s; a mean of other channels.
        ModuleNotFoundError: the extra `plots`, or `images`, is not installed.
    """
    from gam_flax.convert.files import check_free, whole_file
    from gam_flax.maps.figure import draw

    check_free(path, force=force)
    seen = look(model, image, side=side, mean=mean, std=std, classes=classes, blocks=blocks)
    figure = draw(seen)
    with whole_file(path, force=force) as part:
        figure.savefig(part, format="png", dpi=110)
    return seen


def look(
    model: nnx.Module,
    image: str | os.PathLike | np.ndarray | Image,
    *,
    side: int | None,
    mean: Sequence[float],
    std: Sequence[float],
    classes: Sequence[str] | None,
    blocks: Blocks,
) -> Photograph:
    """`draw_attention_maps` without the drawing."""
    channels = getattr(model, "in_channels", 3)
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"the network sees {channels} channels, mean has {len(mean)} and std {len(std)}"
        )
    picture = _opened(image)
    high, wide = _sides(picture)
    if high == wide and (high == side or (side is None and high <= SMALL)):
        pixels = cut_square(picture, size=high, resize=high, channels=channels)
    else:
        side = side or usual_side(model)
        pixels = cut_square(picture, size=side, resize=round(side * 8 / 7), channels=channels)
    x = jnp.asarray(normalized(pixels[None], mean, std))
    output, maps = attention_maps(model, x, blocks=blocks)
    probabilities = _softmax(output)
    count = 0 if probabilities is None else len(probabilities)
    if classes is not None and count and len(classes) != count:
        raise ValueError(f"{len(classes)} names of classes for {count} outputs of the network")
    return Photograph(pixels, probabilities, classes or [f"class {i}" for i in range(count)], maps)


def _opened(image: Any) -> Any:
    if not isinstance(image, str | os.PathLike):
        return image
    from PIL import Image, ImageOps

    try:
        with Image.open(image) as picture:
            return ImageOps.exif_transpose(picture)  # as its camera was held
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        found = "not found" if not Path(image).exists() else f"not a picture: {shorten(error)}"
        raise CheckpointError(f"{shorten(image)}: {found}") from error


def _sides(picture: Any) -> tuple[int, int]:
    """Height and width."""
    return picture.shape[:2] if isinstance(picture, np.ndarray) else picture.size[::-1]


def _softmax(output: Any) -> np.ndarray | None:
    if getattr(output, "ndim", 0) != 2 or output.shape[1] < 2:
        return None
    logits = np.asarray(output[0], np.float64)
    raised = np.exp(logits - logits.max())
    return raised / raised.sum()
