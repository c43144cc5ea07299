"""Mean average precision, by COCO's own code."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def mean_average_precision(pictures: Sequence[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """COCO's mAP, over all classes that any picture has, of 100 boxes a picture at most.

    Args:
        pictures: of each, "boxes" (M, 4) left, top, right, bottom, "scores" (M,), "classes" (M,)
            and "count", as `non_maximum_suppression` gives them; and "truth" (T, 5): class, −1
            where there is none, x, y of the middle, width, height, in the same pixels.

    Returns:
        {"map50": at an IoU of 0.5, "map50_95": the mean of 0.5, 0.55 … 0.95}; 0 where no picture
        has a box.

    Raises:
        ModuleNotFoundError: pycocotools, the extra `detection`, is not installed.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truths = [_truth(i, row) for i, one in enumerate(pictures) for row in one["truth"]]
    truths = [truth for truth in truths if truth["category_id"] >= 0]
    found = [box for i, one in enumerate(pictures) for box in _found(i, one)]
    if not truths or not found:
        return {"map50": 0.0, "map50_95": 0.0}
    for number, truth in enumerate(truths, 1):
        truth["id"] = number
    images = [{"id": i} for i in range(len(pictures))]
    names = sorted({truth["category_id"] for truth in truths})
    with contextlib.redirect_stdout(io.StringIO()):  # it prints how long it took
        known: Any = COCO()
        categories = [{"id": name} for name in names]
        known.dataset = {"images": images, "annotations": truths, "categories": categories}
        known.createIndex()
        evaluation = COCOeval(known, known.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"map50": float(evaluation.stats[1]), "map50_95": float(evaluation.stats[0])}


def _truth(image: int, row: np.ndarray) -> dict[str, Any]:
    name, x, y, wide, high = map(float, row)
    corner = [x - wide / 2, y - high / 2, wide, high]
    about = {"image_id": image, "category_id": int(name), "bbox": corner}
    return {**about, "area": wide * high, "iscrowd": 0}


def _found(image: int, one: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    rows = []
    for i in range(int(one["count"])):
        left, top, right, bottom = map(float, one["boxes"][i])
        box = [left, top, right - left, bottom - top]
        about = {"image_id": image, "category_id": int(one["classes"][i]), "bbox": box}
        rows.append({**about, "score": float(one["scores"][i])})
    return rows
