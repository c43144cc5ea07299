"""Discs, triangles and squares on photographs, as a folder in YOLO's format: what a detector can
learn in minutes. Used by 10_train_a_detector.py."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from rich.progress import track

CLASSES = ("disc", "triangle", "square")
COLOURS = {"disc": (214, 39, 40), "triangle": (44, 160, 44), "square": (31, 119, 180)}
PHOTOGRAPHS = {
    "train": ("coffee", "rocket", "chelsea", "retina", "brick"),
    "val": ("astronaut", "camera"),
}
"""Of scikit-image; the held-out pictures have other photographs behind them."""

CORNERS = {"disc": 48, "triangle": 3, "square": 4}


def write_shapes(place: Path, *, train: int, val: int, side: int, seed: int = 0) -> Path:
    """images/, labels/ and data.yaml; left as it is where it is there already.

    Args:
        train, val: how many pictures.
        side: of them, in pixels.
    """
    if (place / "data.yaml").exists():
        return place
    rng = np.random.default_rng(seed)
    for part, count in (("train", train), ("val", val)):
        behind = [_photograph(name) for name in PHOTOGRAPHS[part]]
        for kind in ("images", "labels"):
            (place / kind / part).mkdir(parents=True, exist_ok=True)
        for i in track(range(count), f"{part} pictures"):
            picture = _crop(behind[rng.integers(len(behind))], side, rng)
            rows = _draw(picture, rng)
            picture.save(place / "images" / part / f"{i:05}.png")
            (place / "labels" / part / f"{i:05}.txt").write_text("".join(rows))
    told = {"names": list(CLASSES), "train": "images/train", "val": "images/val"}
    (place / "data.yaml").write_text(json.dumps(told, indent=1))  # which is YAML too
    return place


def _photograph(name: str) -> Image.Image:
    import skimage.data

    return Image.fromarray(getattr(skimage.data, name)()).convert("RGB")


def _crop(photograph: Image.Image, side: int, rng: np.random.Generator) -> Image.Image:
    size = int(rng.uniform(0.4, 1) * min(photograph.size))
    left, top = (int(rng.integers(length - size + 1)) for length in photograph.size)
    return photograph.crop((left, top, left + size, top + size)).resize((side, side))


def _draw(picture: Image.Image, rng: np.random.Generator) -> list[str]:
    """One to four shapes that hardly overlap; a line of the label file each."""
    pen, side = ImageDraw.Draw(picture), picture.width
    taken: list[np.ndarray] = []
    rows = []
    for _ in range(rng.integers(1, 5)):
        name = CLASSES[rng.integers(len(CLASSES))]
        radius = rng.uniform(0.08, 0.26) * side
        points = _outline(name, rng.uniform(radius, side - radius, 2), radius, rng)
        box = np.array([points.min(0), points.max(0)])
        if box.min() < 0 or box.max() > side or any(_touch(box, other) for other in taken):
            continue
        taken.append(box)
        colour = np.clip(np.array(COLOURS[name]) + rng.integers(-30, 31, 3), 0, 255)
        pen.polygon([(float(x), float(y)) for x, y in points], fill=tuple(map(int, colour)))
        middle, size = box.mean(0) / side, (box[1] - box[0]) / side
        numbers = " ".join(f"{x:.6f}" for x in (*middle, *size))
        rows.append(f"{CLASSES.index(name)} {numbers}\n")
    return rows


def _outline(name: str, middle: np.ndarray, radius: float, rng: np.random.Generator) -> np.ndarray:
    turned = rng.uniform(0, 2 * math.pi)
    angles = turned + 2 * math.pi * np.arange(CORNERS[name]) / CORNERS[name]
    return middle + radius * np.stack([np.cos(angles), np.sin(angles)], 1)


def _touch(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((np.maximum(a[0], b[0]) < np.minimum(a[1], b[1])).all())
