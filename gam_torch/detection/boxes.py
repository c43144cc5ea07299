"""Boxes and how much they share."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

EPS = 1e-7
"""Keeps quotients of empty boxes finite, as in YOLOv5."""


def xywh_to_xyxy(boxes: Float[Tensor, "*B 4"]) -> Float[Tensor, "*B 4"]:
    """Middle and size to the corners at the left above and at the right below."""
    middle, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([middle - half, middle + half], -1)


def box_iou(a: Float[Tensor, "*A 4"], b: Float[Tensor, "*B 4"]) -> Float[Tensor, "*C"]:
    """Intersection over union of boxes as corners, which broadcast; 0 for two empty ones."""
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(0)
    shared = inner[..., 0] * inner[..., 1]
    sizes = a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2]
    areas = [size[..., 0] * size[..., 1] for size in sizes]
    return shared / (areas[0] + areas[1] - shared + EPS)


def complete_iou(a: Float[Tensor, "*A 4"], b: Float[Tensor, "*B 4"]) -> Float[Tensor, "*C"]:
    """CIoU of boxes as middle and size, which broadcast, arXiv 1911.08287:

        IoU − d² / c² − α · v,      v = 4 / π² · (atan(w / h) of b − that of a)²,
        α = v / (v − IoU + 1)

    d is the distance of the middles, c the diagonal of the smallest box around both. α counts as
    a constant where gradients are taken.
    """
    corners_a, corners_b = xywh_to_xyxy(a), xywh_to_xyxy(b)
    iou = box_iou(corners_a, corners_b)
    around = torch.maximum(corners_a[..., 2:], corners_b[..., 2:]) - torch.minimum(
        corners_a[..., :2], corners_b[..., :2]
    )
    diagonal = (around**2).sum(-1) + EPS
    distance = ((a[..., :2] - b[..., :2]) ** 2).sum(-1)
    angle = torch.atan(b[..., 2] / (b[..., 3] + EPS)) - torch.atan(a[..., 2] / (a[..., 3] + EPS))
    v = 4 / math.pi**2 * angle**2
    alpha = (v / (v - iou + (1 + EPS))).detach()
    return iou - distance / diagonal - v * alpha
