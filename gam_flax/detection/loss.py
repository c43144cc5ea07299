"""YOLOv5's loss: which cell and anchor answers for which box, and how wrong it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gam_flax.detection.boxes import complete_iou

BOX = 5
"""Numbers of a box beside its classes: x, y, width, height, objectness."""

BALANCE = {3: (4.0, 1.0, 0.4)}
OTHER_BALANCE = (4.0, 1.0, 0.25, 0.06, 0.02)
"""Weight of each level's objectness, the finest first: by the number of levels."""

NEIGHBOURS = ((0, 0), (-1, 0), (0, -1), (1, 0), (0, 1))
"""The cell of a box's middle, and the ones beside it: (columns, rows)."""


class DetectionLoss(NamedTuple):
    """Means over the batch, weighted; `total` is the sum of the others."""

    total: Float[Array, ""]
    box: Float[Array, ""]
    objectness: Float[Array, ""]
    classification: Float[Array, ""]


class Matches(NamedTuple):
    """For each target, anchor and cell of `NEIGHBOURS`: (B, T, A, 5), or (B, T, 5) where the
    anchor does not matter.

    found: whether this anchor at this cell answers for the target.
    rows, columns: of the cell, inside the grid.
    boxes: the target as x, y from the cell's corner, width, height, in cells.
    """

    found: Array
    rows: Array
    columns: Array
    boxes: Array


def detection_loss(
    outputs: Sequence[Float[Array, "B A _ _ D"]],
    targets: Float[Array, "B T 5"],
    anchors: Float[Array, "L A 2"],
    *,
    box: float = 0.05,
    objectness: float = 1.0,
    classification: float = 0.5,
    anchor_ratio: float = 4.0,
    label_smoothing: float = 0.0,
) -> DetectionLoss:
    """The loss of what a network gave, level by level:

        box             1 − CIoU, the mean over all matches
        objectness      cross-entropy with the CIoU of the match at each cell, 0 where there is none
        classification  cross-entropy of each class, the mean over matches; none where K = 1

    A target is matched by each anchor that is less than `anchor_ratio` times as wide, high, narrow
    and low, at the cell of its middle and at the nearer one of its neighbours, across and down.
    Where several matches fall on one cell and anchor, objectness is that of the best (the published
    code takes whichever was written last).

    Args:
        outputs: of the network, not squashed.
        targets: class, then x, y of the middle, width, height as fractions of the picture; class
            −1 where there is none.
        anchors: in cells, as the network has them.
        box, objectness, classification: weights.
        label_smoothing: ε: classes are 1 − ε / 2 and ε / 2.
    """
    zero = jnp.zeros((), outputs[0].dtype)
    lost_box, lost_objectness, lost_class = zero, zero, zero
    balance = BALANCE.get(len(outputs), OTHER_BALANCE)
    for y, sizes, weight in zip(outputs, anchors, balance, strict=False):
        sizes = sizes.astype(y.dtype)
        match = match_targets(targets.astype(y.dtype), sizes, y.shape[2:4], anchor_ratio)
        count = match.found.sum().clip(min=1).astype(y.dtype)
        place = _places(match)
        p = y[place]
        xy = 2 * jax.nn.sigmoid(p[..., :2]) - 0.5
        wh = (2 * jax.nn.sigmoid(p[..., 2:4])) ** 2 * sizes[:, None]
        iou = complete_iou(jnp.concatenate([xy, wh], -1), match.boxes)
        lost_box = lost_box + jnp.where(match.found, 1 - iou, 0).sum() / count

        best = jnp.where(match.found, jax.lax.stop_gradient(iou).clip(min=0), 0)
        wanted = jnp.zeros_like(y[..., 4]).at[place].max(best)
        lost_objectness = lost_objectness + weight * _cross_entropy(y[..., 4], wanted).mean()

        classes = y.shape[-1] - BOX
        if classes > 1:
            known = jax.nn.one_hot(targets[..., 0].astype(int), classes, dtype=y.dtype)
            known = known * (1 - label_smoothing) + label_smoothing / 2
            each = _cross_entropy(p[..., BOX:], known[:, :, None, None])
            lost = jnp.where(match.found, each.mean(-1), 0).sum() / count
            lost_class = lost_class + lost
    parts = (box * lost_box, objectness * lost_objectness, classification * lost_class)
    return DetectionLoss(parts[0] + parts[1] + parts[2], *parts)


def match_targets(
    targets: Float[Array, "B T 5"],
    anchors: Float[Array, "A 2"],
    grid: Sequence[int],
    anchor_ratio: float,
) -> Matches:
    """Which anchors, at which cells of a grid of (rows, columns), answer for which target."""
    size = jnp.array([grid[1], grid[0]], targets.dtype)
    exists = targets[..., 0] >= 0
    xy, wh = targets[..., 1:3] * size, targets[..., 3:] * size
    xy, wh = (jnp.where(exists[..., None], value, 1) for value in (xy, wh))

    ratio = wh[:, :, None] / anchors
    fits = jnp.maximum(ratio, 1 / ratio).max(-1) < anchor_ratio
    before = (xy % 1 < 0.5) & (xy > 1)
    after = ((size - xy) % 1 < 0.5) & (size - xy > 1)
    near = jnp.concatenate([jnp.ones_like(before[..., :1]), before, after], -1)

    steps = jnp.array(NEIGHBOURS)
    cells = jnp.floor(xy)[:, :, None].astype(int) + steps
    cells = jnp.minimum(cells.clip(min=0), size.astype(int) - 1)
    around = jnp.broadcast_to(wh[:, :, None], cells.shape)
    boxes = jnp.concatenate([xy[:, :, None] - cells, around], -1)
    found = exists[..., None, None] & fits[..., None] & near[:, :, None]
    return Matches(found, cells[..., 1], cells[..., 0], boxes[:, :, None])


def _places(match: Matches) -> tuple[Array, ...]:
    """The index of each match in an output (B, A, h, w, …)."""
    batch, _, anchors, _ = match.found.shape
    return (
        jnp.arange(batch)[:, None, None, None],
        jnp.arange(anchors)[:, None],
        match.rows[:, :, None],
        match.columns[:, :, None],
    )


def _cross_entropy(logits: Array, wanted: Array) -> Array:
    """Of a probability σ(logits) with `wanted`, element by element."""
    return jax.nn.softplus(logits) - logits * wanted
