"""Pictures in a folder for each class."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gam_flax.convert.errors import shorten
from gam_flax.train.errors import DataError

ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


@dataclass(frozen=True)
class PictureFiles:
    """Picture files as a sequence of uint8 arrays (side, side, 3).

    The shorter side of each becomes `side` pixels (bilinear, smoothed where it shrinks) and the
    middle is cut out; grey becomes RGB.
    """

    paths: tuple[Path, ...]
    side: int

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As of an array: (N, side, side, 3)."""
        return (len(self.paths), self.side, self.side, 3)

    def __getitem__(self, i: int) -> np.ndarray:
        """Raises DataError for a file that is missing or broken."""
        from PIL import Image, ImageOps

        path = self.paths[i]
        try:
            with Image.open(path) as picture:
                cut = ImageOps.fit(
                    picture.convert("RGB"), (self.side, self.side), Image.Resampling.BILINEAR
                )
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(
                f"{shorten(path)}: not a readable picture: {shorten(error, 100)}; "
                "mend it or take it away"
            ) from error
        return np.asarray(cut)


def list_folder(
    folder: Path, side: int, classes: tuple[str, ...] | None = None
) -> tuple[PictureFiles, np.ndarray, tuple[str, ...]]:
    """The picture files in `folder`, one folder a class, in the order of their names.

    Args:
        folder: the folder of the classes' folders. Files that begin with a dot, and files with
            other endings than pictures have, are left out.
        side: of the pictures, in pixels.
        classes: the names to expect, as the training pictures had them; None to find them.

    Returns:
        Files, their classes as int32, the names of the classes.

    Raises:
        DataError: no folder, no classes, a class without pictures, a class that training has not.
    """
    if not folder.is_dir():
        raise DataError(f"{shorten(folder)}: not found; expected a folder with one folder a class")
    found = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != "."))
    if not found:
        raise DataError(f"{shorten(folder)}: has no folders in it; expected one a class")
    unknown = [name for name in found if name not in (classes or found)]
    if unknown:
        raise DataError(
            f"{shorten(folder / unknown[0])}: a class that the training pictures have not"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes or found):
        files = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in ENDINGS)
        files = [p for p in files if p.name[0] != "."]
        if not files and classes is None:
            raise DataError(
                f"{shorten(folder / name)}: has no pictures in it ({', '.join(ENDINGS)})"
            )
        paths += files
        labels += [label] * len(files)
    return PictureFiles(tuple(paths), side), np.array(labels, np.int32), classes or found
