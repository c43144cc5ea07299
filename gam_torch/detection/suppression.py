"""Of many boxes on one thing, the best."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gam_torch.detection.boxes import box_iou, xywh_to_xyxy


class Detections(NamedTuple):
    """What was found in each picture, best first; rows beyond `count` are 0, their class −1.

    boxes: left, top, right, bottom, in pixels.
    scores: objectness times the class's probability.
    """

    boxes: Float[Tensor, "B M 4"]
    scores: Float[Tensor, "B M"]
    classes: Int[Tensor, "B M"]
    count: Int[Tensor, "B"]


def non_maximum_suppression(
    predictions: Float[Tensor, "B N D"],
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

    Args:
        predictions: what a detector's `decode` gives: x, y, width, height, objectness, classes.
        confidence: what objectness and score must exceed.
        iou: intersection over union.
        max_boxes: of a picture.
        multi_label: every class above `confidence` makes a box of its own, not the best alone.
        agnostic: boxes suppress those of other classes too.
        candidates: so many boxes with the highest scores are looked at.
    """
    return Detections(
        *(
            torch.stack(parts)
            for parts in zip(
                *(
                    _of_one(one, confidence, iou, max_boxes, multi_label, agnostic, candidates)
                    for one in predictions
                ),
                strict=True,
            )
        )
    )


def _of_one(
    prediction: Tensor,
    confidence: float,
    iou: float,
    max_boxes: int,
    multi_label: bool,
    agnostic: bool,
    candidates: int,
) -> Detections:
    scores, classes, owners = _scored(prediction, multi_label)
    alive = (prediction[owners, 4] > confidence) & (scores > confidence)
    scores = torch.where(alive, scores, 0)
    order = torch.sort(scores, descending=True, stable=True).indices[:candidates]
    scores, classes, owners = scores[order], classes[order], owners[order]
    boxes = xywh_to_xyxy(prediction[owners, :4])

    found = torch.zeros(max_boxes, dtype=torch.long)
    count = 0
    left = scores
    while count < max_boxes and left.numel() and left.max() > 0:
        best = int(left.argmax())
        same = torch.ones_like(left, dtype=torch.bool) if agnostic else classes == classes[best]
        gone = same & (box_iou(boxes[best], boxes) > iou)
        gone[best] = True
        left = torch.where(gone, 0, left)
        found[count] = best
        count += 1
    is_found = torch.arange(max_boxes) < count
    return Detections(
        torch.where(is_found[:, None], boxes[found], 0),
        torch.where(is_found, scores[found], 0),
        torch.where(is_found, classes[found], -1).int(),
        torch.tensor(count, dtype=torch.int32),
    )


def _scored(prediction: Tensor, multi_label: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Score and class of each candidate, and the prediction that it is of."""
    scores = prediction[:, 4:5] * prediction[:, 5:]
    rows, classes = scores.shape
    if multi_label:
        owners = torch.arange(rows).repeat_interleave(classes)
        return scores.reshape(-1), torch.arange(classes).repeat(rows), owners
    return scores.max(1).values, scores.argmax(1), torch.arange(rows)
