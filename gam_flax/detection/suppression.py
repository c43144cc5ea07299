"""Of many boxes on one thing, the best."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gam_flax.detection.boxes import box_iou, xywh_to_xyxy


class Detections(NamedTuple):
    """What was found in each picture, best first; rows beyond `count` are 0, their class −1.

    boxes: left, top, right, bottom, in pixels.
    scores: objectness times the class's probability.
    """

    boxes: Float[Array, "B M 4"]
    scores: Float[Array, "B M"]
    classes: Int[Array, "B M"]
    count: Int[Array, "B"]


def non_maximum_suppression(
    predictions: Float[Array, "B N D"],
    *,
    confidence: float = 0.25,
    iou: float = 0.45,
    max_boxes: int = 300,
    multi_label: bool = False,
    agnostic: bool = False,
    candidates: int = 30000,
) -> Detections:
    """The box with the highest score, and away with those of its class that share more than `iou`
    with it; again, until none is left or `max_boxes` are found. Of equal scores the first counts.

    Shapes are fixed, so that it is compiled: one look at all candidates for each of `max_boxes`.

    Args:
        predictions: what a detector's `decode` gives: x, y, width, height, objectness, classes.
        confidence: what objectness and score must exceed.
        iou: intersection over union.
        max_boxes: of a picture.
        multi_label: every class above `confidence` makes a box of its own, not the best alone.
        agnostic: boxes suppress those of other classes too.
        candidates: so many boxes with the highest scores are looked at.
    """
    of_one = partial(
        _of_one,
        confidence=confidence,
        iou=iou,
        max_boxes=max_boxes,
        multi_label=multi_label,
        agnostic=agnostic,
        candidates=candidates,
    )
    return jax.vmap(of_one)(predictions)


def _of_one(
    prediction: Array,
    confidence: float,
    iou: float,
    max_boxes: int,
    multi_label: bool,
    agnostic: bool,
    candidates: int,
) -> Detections:
    scores, classes, owners = _scored(prediction, multi_label)
    alive = (prediction[owners, 4] > confidence) & (scores > confidence)
    scores = jnp.where(alive, scores, 0)
    scores, order = jax.lax.top_k(scores, min(candidates, scores.size))
    classes, owners = classes[order], owners[order]
    boxes = xywh_to_xyxy(prediction[owners, :4])

    def pick(left: Array, _: None) -> tuple[Array, tuple[Array, Array]]:
        best = left.argmax()
        same = jnp.ones_like(left, bool) if agnostic else classes == classes[best]
        gone = same & (box_iou(boxes[best], boxes) > iou)
        gone = gone.at[best].set(True)
        return jnp.where(gone, 0, left), (best, left[best] > 0)

    _, (found, is_found) = jax.lax.scan(pick, scores, None, length=max_boxes)
    return Detections(
        jnp.where(is_found[:, None], boxes[found], 0),
        jnp.where(is_found, scores[found], 0),
        jnp.where(is_found, classes[found], -1).astype(jnp.int32),
        is_found.sum().astype(jnp.int32),
    )


def _scored(prediction: Array, multi_label: bool) -> tuple[Array, Array, Array]:
    """Score and class of each candidate, and the prediction that it is of."""
    scores = prediction[:, 4:5] * prediction[:, 5:]
    rows, classes = scores.shape
    if multi_label:
        owners = jnp.repeat(jnp.arange(rows), classes)
        return scores.reshape(-1), jnp.tile(jnp.arange(classes), rows), owners
    return scores.max(1), scores.argmax(1), jnp.arange(rows)
