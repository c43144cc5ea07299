"""A YOLOv5 with one of each layer and two levels, for tests."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

SMALL: dict[str, Any] = {
    "nc": 3,
    "depth_multiple": 0.33,
    "width_multiple": 0.5,
    "anchors": [[6, 8, 12, 10], [20, 24, 30, 16]],
    "backbone": [
        [-1, 1, "Conv", [32, 6, 2, 2]],
        [-1, 1, "Conv", [128, 3, 2]],
        [-1, 3, "C3", [128]],
        [-1, 1, "SPPF", [128, 5]],
    ],
    "head": [
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 1, "nn.Upsample", [None, 2, "nearest"]],
        [[-1, 2], 1, "Concat", [1]],
        [-1, 3, "C3", [64, False]],
        [[7, 4], 1, "Detect", ["nc", "anchors"]],
    ],
}


def with_layers(
    at: int, line: Sequence[Any], *, base: Mapping[str, Any] = SMALL, replace: bool = False
) -> dict[str, Any]:
    """`base` with a line more before layer `at` of its backbone, or in its place. What follows
    keeps its indices where the line replaces; else absolute ones in the head move by one."""
    config = copy.deepcopy(dict(base))
    config["backbone"][at : at + replace] = [list(line)]
    if not replace:
        for other in config["head"]:
            if isinstance(other[0], list):
                other[0] = [j + 1 if j >= at else j for j in other[0]]
    return config
