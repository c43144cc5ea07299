"""Suppression, letterbox and loss: torch's and Flax's are the same, and right."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import gam_flax.detection as ours
import gam_torch.detection as theirs
from gam_flax.detection import loss as our_loss

LEVELS = ((8, 8), (4, 6), (2, 2))
ANCHORS = np.array(
    [
        [[1.2, 1.6], [2, 3.7], [4.1, 2.9]],
        [[1.9, 3.8], [3.9, 2.8], [3.7, 7.4]],
        [[3.6, 2.8], [4, 5], [6, 5]],
    ]
)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def predictions(count: int = 200, classes: int = 3, seed: int = 0, batch: int = 2) -> np.ndarray:
    """Boxes in heaps, so that many suppress many."""
    rng = np.random.default_rng(seed)
    middles = rng.uniform(20, 80, (batch, 8, 2))[:, rng.integers(0, 8, count)]
    boxes = np.concatenate(
        [middles + rng.normal(0, 3, (batch, count, 2)), rng.uniform(8, 24, (batch, count, 2))], -1
    )
    return np.concatenate([boxes, rng.uniform(0, 1, (batch, count, 1 + classes))], -1)


def suppressed(x: np.ndarray, **options) -> tuple[list[np.ndarray], list[np.ndarray]]:
    a = theirs.non_maximum_suppression(torch.tensor(x), **options)
    b = jax.jit(lambda x: ours.non_maximum_suppression(x, **options))(x)
    return [part.numpy() for part in a], [np.asarray(part) for part in b]


def by_hand(x: np.ndarray, confidence: float, iou: float, multi: bool, agnostic: bool):
    """Greedy, box by box, for one picture."""
    rows = []
    for i, row in enumerate(x):
        scores = row[4] * row[5:]
        for name in range(len(scores)) if multi else [int(scores.argmax())]:
            if row[4] > confidence and scores[name] > confidence:
                rows.append((-scores[name], i, name))
    kept: list[tuple[float, int, int]] = []
    for score, i, name in sorted(rows):
        clash = False
        for _, j, other in kept:
            low = np.maximum(x[i, :2] - x[i, 2:4] / 2, x[j, :2] - x[j, 2:4] / 2)
            high = np.minimum(x[i, :2] + x[i, 2:4] / 2, x[j, :2] + x[j, 2:4] / 2)
            shared = np.prod(np.maximum(high - low, 0))
            union = np.prod(x[i, 2:4]) + np.prod(x[j, 2:4]) - shared
            clash |= (agnostic or name == other) and shared / union > iou
        if not clash:
            kept.append((score, i, name))
    return kept


@pytest.mark.parametrize("agnostic", [False, True], ids=["by class", "agnostic"])
@pytest.mark.parametrize("multi", [False, True], ids=["best class", "all classes"])
@pytest.mark.parametrize("confidence", [0.05, 0.3])
def test_suppression(confidence, multi, agnostic):
    x = predictions()
    options = {"multi_label": multi, "agnostic": agnostic}
    a, b = suppressed(x, confidence=confidence, **options)
    for one, other in zip(a, b, strict=True):
        assert one.shape == other.shape and np.array_equal(one, other)
    boxes, scores, classes, count = b
    for i in range(len(x)):
        kept = by_hand(x[i], confidence, 0.45, multi, agnostic)
        assert 0 < count[i] == len(kept) < len(x[i])
        assert np.array_equal(classes[i, : count[i]], [name for *_, name in kept])
        assert np.allclose(scores[i, : count[i]], [-score for score, *_ in kept], rtol=1e-15)
        assert (classes[i, count[i] :] == -1).all() and (boxes[i, count[i] :] == 0).all()


def test_the_comparison_would_notice():
    x = predictions()
    a, _ = suppressed(x, iou=0.45)
    _, b = suppressed(x, iou=0.5)
    assert not np.array_equal(a[0], b[0])


def test_ties_go_to_the_first():
    x = np.repeat(predictions(5, batch=1), 2, 1)
    x[0, :, 4:] = 0.9
    a, b = suppressed(x, iou=0.99, agnostic=True)
    assert all(np.array_equal(one, other) for one, other in zip(a, b, strict=True))
    assert a[3] == 5 and np.allclose(
        a[0][0, 0], np.concatenate([x[0, 0, :2] - x[0, 0, 2:4] / 2, x[0, 0, :2] + x[0, 0, 2:4] / 2])
    )


def test_nothing_found_and_no_room():
    x = predictions()
    for options in ({"confidence": 0.999}, {"confidence": 0.05, "max_boxes": 3}, {"candidates": 7}):
        a, b = suppressed(x, **options)
        assert all(np.array_equal(one, other) for one, other in zip(a, b, strict=True))
    assert suppressed(x, confidence=0.999)[1][3].tolist() == [0, 0]
    assert suppressed(x, confidence=0.05, max_boxes=3)[1][3].tolist() == [3, 3]


# Boxes


def test_complete_iou_by_hand():
    """Side by side, one twice as wide: IoU 0, and the other two terms."""
    a, b = np.array([1.0, 1, 2, 2]), np.array([4.0, 1, 4, 2])
    distance = 9 / (6**2 + 2**2)
    v = 4 / math.pi**2 * (math.atan(2) - math.atan(1)) ** 2
    expected = 0 - distance - v * v / (v + 1)
    for found in (
        theirs.complete_iou(torch.tensor(a), torch.tensor(b)).item(),
        float(ours.complete_iou(jnp.array(a), jnp.array(b))),
    ):
        assert found == pytest.approx(expected, abs=1e-6)
    same = ours.complete_iou(jnp.array(b), jnp.array(b))
    assert float(same) == pytest.approx(1, abs=1e-6)


# Letterbox


@pytest.mark.parametrize("stride", [None, 32])
@pytest.mark.parametrize("size", [(40, 64), (97, 33), (200, 301), (64, 64), (1, 5)])
def test_letterbox(size, stride):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8)
    a, b = theirs.letterbox(image, 96, stride=stride), ours.letterbox(image, 96, stride=stride)
    assert a[1:] == b[1:]
    assert np.abs(a.image.permute(1, 2, 0).numpy() - b.image).max() <= 1.2e-7
    high, wide = b.image.shape[:2]
    assert (high, wide) == (96, 96) if stride is None else high % 32 == wide % 32 == 0
    boxes = np.array([[0.0, 0, *size[::-1]], [1, 0, 3, 1]])
    scaled = boxes * b.scale + [b.left, b.top] * 2
    for package, framed in ((theirs, a), (ours, b)):
        assert np.allclose(package.undo(scaled, framed, *size), boxes)
    outside = np.array([[-50.0, -50, 500, 500]])
    assert np.array_equal(ours.undo(outside, b, *size), [[0, 0, size[1], size[0]]])


def test_letterbox_leaves_a_picture_that_fits_as_it_is():
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3)).astype(np.uint8)
    framed = ours.letterbox(image, 96)
    assert (framed.scale, framed.left, framed.top) == (1, 0, 16)
    assert np.array_equal(np.rint(framed.image[16:80] * 255), image)
    assert np.allclose(framed.image[:16], 114 / 255)


# Loss


def outputs(classes: int = 3, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(0, 1.5, (3, 3, *level, 5 + classes)) for level in LEVELS]


def targets(seed: int = 0, classes: int = 3) -> np.ndarray:
    """Of three pictures: many boxes, none, and boxes at the border and twice on one cell."""
    rng = np.random.default_rng(seed)
    rows = np.full((3, 7, 5), -1.0)
    rows[0, :, 0] = rng.integers(0, classes, 7)
    rows[0, :, 1:] = rng.uniform(0.05, 0.95, (7, 4))
    rows[2, :4] = [
        [0, 0.0, 1.0, 0.3, 0.4],
        [1, 1.0, 0.0, 0.5, 0.2],
        [classes - 1, 0.52, 0.52, 0.3, 0.3],
        [0, 0.53, 0.52, 0.35, 0.25],
    ]
    return rows


def losses(y, t, **options):
    """Both losses with the gradients of each level."""
    leaves = [torch.tensor(one, requires_grad=True) for one in y]
    a = theirs.detection_loss(leaves, torch.tensor(t), torch.tensor(ANCHORS), **options)
    a.total.backward()

    def total(y):
        found = ours.detection_loss(y, jnp.asarray(t), jnp.asarray(ANCHORS), **options)
        return found.total, found

    (_, b), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(y)
    parts = [v.item() for v in a], [float(v) for v in b]
    return (*parts, [leaf.grad.numpy() for leaf in leaves], [np.asarray(g) for g in gradients])


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "box": 1.0, "anchor_ratio": 2.0}])
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients(classes, options, seed):
    a, b, of_a, of_b = losses(outputs(classes, seed), targets(seed, classes), **options)
    assert np.allclose(a, b, rtol=1e-13, atol=0) and all(np.isfinite(a))
    assert (a[3] == 0) == (classes == 1)
    for one, other in zip(of_a, of_b, strict=True):
        assert np.abs(one - other).max() <= 1e-12 * np.abs(one).max()


def test_a_fault_of_the_loss_is_noticed(monkeypatch):
    monkeypatch.setattr(our_loss, "NEIGHBOURS", ((0, 0), (1, 0), (0, -1), (-1, 0), (0, 1)))
    a, b, *_ = losses(outputs(), targets())
    assert not np.allclose(a, b, rtol=1e-6)


def test_pictures_without_boxes():
    empty = np.full((3, 2, 5), -1.0)
    a, b, of_a, of_b = losses(outputs(), empty)
    assert np.allclose(a, b, rtol=1e-13) and b[1] == b[3] == 0
    assert all(np.isfinite(g).all() for g in of_b)
    assert all(np.allclose(x, y, rtol=1e-9, atol=1e-18) for x, y in zip(of_a, of_b, strict=True))


def test_matches_of_one_box():
    """In the left upper part of cell (5, 3): the neighbours to the left and above answer too."""
    t = jnp.array([[[0, (5 + 0.3) / 8, (3 + 0.2) / 8, 2 / 8, 2 / 8]]])
    found = our_loss.match_targets(t, jnp.array([[2.0, 2.0], [9.0, 2.0]]), (8, 8), 4.0)
    assert found.found[0, 0, 0].tolist() == [True, True, True, False, False]
    assert not found.found[0, 0, 1].any()  # 4.5 times as wide
    cells = list(zip(found.columns[0, 0].tolist(), found.rows[0, 0].tolist(), strict=True))
    assert cells[:3] == [(5, 3), (4, 3), (5, 2)]
    assert np.allclose(found.boxes[0, 0, 0, 1], [1.3, 0.2, 2, 2])


def test_a_perfect_answer_costs_little():
    t = np.full((1, 1, 5), -1.0)
    t[0, 0] = [1, 2.5 / 4, 1.5 / 4, 2 / 4, 2 / 4]
    anchors = np.array([[[2.0, 2.0]]])
    y = np.full((1, 1, 4, 4, 7), -20.0)
    y[0, 0, 1, 2] = [0, 0, 0, 0, 20, -20, 20]
    found = ours.detection_loss([jnp.asarray(y)], jnp.asarray(t), jnp.asarray(anchors))
    assert 0 <= float(found.total) < 1e-6
    y[0, 0, 1, 2, 5:] = [20, -20]
    wrong = ours.detection_loss([jnp.asarray(y)], jnp.asarray(t), jnp.asarray(anchors))
    assert float(wrong.classification) > 5
