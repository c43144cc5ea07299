"""Pictures with boxes, in the folders and files that YOLO's users have."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gam_flax.convert.errors import shorten
from gam_flax.train.augmentation import Element, jitter
from gam_flax.train.errors import DataError
from gam_flax.train.folder import ENDINGS

if TYPE_CHECKING:
    from gam_flax.train.tasks import Task

COLUMNS = 5
"""Of a line: class, x and y of the middle, width, height; fractions of the picture."""


@dataclass(frozen=True)
class LabelledPictures:
    """Picture files and their boxes, read one at a time.

    side: in pixels; a picture is brought to side × side, grey around it where it is not square.
    boxes: of each picture, (n, 5).
    most: boxes of a picture, of all of them; where there are fewer, rows of class −1 follow.
    """

    paths: tuple[Path, ...]
    boxes: tuple[np.ndarray, ...]
    side: int
    most: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Element:
        """{"image": (side, side, 3) uint8, "boxes": (most, 5) float32}.

        Raises DataError for a picture that is missing or broken.
        """
        from gam_flax.detection import letterbox

        pixels = _read(self.paths[index])
        high, wide = pixels.shape[:2]
        placed = letterbox(pixels, self.side)
        image = np.rint(placed.image * 255).astype(np.uint8)
        boxes = np.full((self.most, COLUMNS), -1, np.float32)
        own = self.boxes[index]
        if len(own):
            scale = np.array([wide, high, wide, high]) * placed.scale / self.side
            shift = np.array([placed.left, placed.top, 0, 0]) / self.side
            boxes[: len(own)] = np.concatenate([own[:, :1], own[:, 1:] * scale + shift], 1)
        return {"image": image, "boxes": boxes}


@dataclass(frozen=True)
class LabelledData:
    """What a detector learns from; the fields are `DataSet`'s."""

    train: LabelledPictures
    test: LabelledPictures
    classes: tuple[str, ...]
    side: int
    channels: int = 3
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    std: tuple[float, ...] = (1.0, 1.0, 1.0)

    @property
    def task(self) -> Task:
        """What is learnt of these pictures."""
        from gam_flax.train.tasks import Detection

        return Detection()

    def training_change(self, *, crop: int | None, flip: bool | None) -> Callable[..., Element]:
        """`jitter`; `crop` is not asked for where boxes are."""
        if crop:
            raise DataError(f"crop {crop}: pictures with boxes are moved and scaled instead")
        return partial(jitter, flip=flip is not False)

    @property
    def evaluation_change(self) -> Callable[[Element], Element]:
        """The picture as it is read."""
        return _as_it_is


def _as_it_is(element: Element) -> Element:
    return element


def read_yolo_folder(place: Path, side: int) -> LabelledData:
    """The pictures and boxes that a data.yaml tells of.

        names: [cat, dog]           or {0: cat, 1: dog}
        train: images/train         a folder, from data.yaml's own or from `path`
        val: images/val

    Beside `images` lies `labels` with a text file for each picture, of the same name; a line is
    "class x y width height", the last four as fractions of the picture. A picture without a file
    has no boxes.

    Args:
        place: data.yaml, or the folder that it is in.
        side: of what the network sees, in pixels; a multiple of 32.

    Raises:
        DataError: one line with the file, and the line in it.
    """
    file = place / "data.yaml" if place.is_dir() else place
    told = _yaml(file)
    classes = _names(told.get("names"), file)
    if side % 32:
        raise DataError(f"side {side}: must be a multiple of 32 for a detector")
    root = file.parent / str(told.get("path") or "")
    parts = [_part(file, root, told, name, len(classes)) for name in ("train", "val")]
    most = max((len(boxes) for _, every in parts for boxes in every), default=0)
    train, test = (LabelledPictures(paths, boxes, side, max(1, most)) for paths, boxes in parts)
    return LabelledData(train, test, classes, side)


def _yaml(file: Path) -> dict[str, Any]:
    import yaml

    try:
        told = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{shorten(file)}: cannot be read: {shorten(error, 100)}") from error
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise DataError(f"{shorten(file)}: not YAML: {shorten(said, 150)}") from error
    if not isinstance(told, dict):
        raise DataError(f"{shorten(file)}: expected names, train and val")
    return told


def _names(names: Any, file: Path) -> tuple[str, ...]:
    if isinstance(names, dict) and sorted(names) == list(range(len(names))):
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names:
        raise DataError(f"{shorten(file)}: names is {shorten(names)}, expected a list of classes")
    return tuple(map(str, names))


def _part(
    file: Path, root: Path, told: dict[str, Any], name: str, classes: int
) -> tuple[tuple[Path, ...], tuple[np.ndarray, ...]]:
    if not isinstance(told.get(name), str):
        raise DataError(f"{shorten(file)}: {name} is {shorten(told.get(name))}, expected a folder")
    folder = root / told[name]
    if not folder.is_dir():
        raise DataError(f"{shorten(folder)}: not found, {shorten(file)} has it as {name}")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS)
    paths = tuple(p for p in found if p.name[0] != ".")
    if not paths:
        raise DataError(f"{shorten(folder)}: has no pictures in it")
    return paths, tuple(_boxes(label_file(path), classes) for path in paths)


def label_file(picture: Path) -> Path:
    """Where the boxes of a picture are: under `labels` in the place of the last `images`."""
    parts = list(picture.with_suffix(".txt").parts)
    for i in reversed(range(len(parts) - 1)):
        if parts[i] == "images":
            return Path(*parts[:i], "labels", *parts[i + 1 :])
    return picture.with_suffix(".txt")


def _boxes(file: Path, classes: int) -> np.ndarray:
    """(n, 5); none where there is no file."""
    if not file.exists():
        return np.zeros((0, COLUMNS))
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{shorten(file)}: cannot be read: {shorten(error, 100)}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = [float(word) for word in line.split()]
        except ValueError:
            row = []
        _check_row(row, classes, f"{shorten(file)}, line {number}", line)
        rows.append(row)
    return np.array(rows).reshape(-1, COLUMNS)


def _check_row(row: list[float], classes: int, where: str, line: str) -> None:
    if len(row) != COLUMNS or not all(map(math.isfinite, row)):
        raise DataError(f"{where}: {shorten(line)!r}, expected class x y width height")
    if row[0] != int(row[0]) or not 0 <= row[0] < classes:
        raise DataError(f"{where}: class {row[0]:g}, expected 0 to {classes - 1}")
    if not all(0 <= x <= 1 for x in row[1:]) or min(row[3:]) == 0:
        raise DataError(f"{where}: {shorten(line)!r}, expected fractions of the picture, 0 to 1")


def _read(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{shorten(path)}: not a readable picture: {shorten(error, 100)}; mend it or take it "
            "away"
        ) from error
