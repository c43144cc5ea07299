"""The pictures of a run: Fashion-MNIST, MNIST, CIFAR, arrays, folders."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gam_flax.convert.errors import shorten
from gam_flax.preprocess import MEAN, STD
from gam_flax.train.augmentation import Element, augment, middle
from gam_flax.train.cifar import ARCHIVES, read_cifar
from gam_flax.train.errors import DataError
from gam_flax.train.folder import PictureFiles, list_folder
from gam_flax.train.idx import read_idx
from gam_flax.train.yolo_folder import LabelledData, read_yolo_folder

if TYPE_CHECKING:
    from gam_flax.train.tasks import Task

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where `apt install dataset-fashion-mnist` puts it."""

FASHION = (
    *("T-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "boot"),
)
DIGITS = tuple("0123456789")

KINDS = ("fashion-mnist", "mnist", *ARCHIVES, "arrays", "folder", "yolo")

MEASURED = 10_000
"""So many training pictures, evenly spaced, tell mean and deviation."""


@dataclass(frozen=True)
class Pictures:
    """Pictures and their classes, read one at a time.

    images: N H W C uint8.
    labels: int32, 0 … the number of classes − 1.
    """

    images: np.ndarray | PictureFiles
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"image": self.images[index], "label": self.labels[index]}


@dataclass(frozen=True)
class DataSet:
    """What a run learns from.

    mirrored: whether a picture's mirror image is one of the same class.
    side: of what the network sees, in pixels; the pictures may be larger.
    mean, std: of each channel, of pixels scaled to 0 … 1.
    """

    train: Pictures
    test: Pictures
    classes: tuple[str, ...]
    mirrored: bool
    side: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def channels(self) -> int:
        return self.train.images.shape[3]

    @property
    def task(self) -> Task:
        """What is learnt of these pictures."""
        from gam_flax.train.tasks import Classification

        return Classification()

    def training_change(self, *, crop: int | None, flip: bool | None) -> Callable[..., Element]:
        """`augment`, with what suits the data for what is None.

        A folder's pictures are larger than what is cut out of them, and need no border.
        """
        larger = self.train.images.shape[1] > self.side
        usual = 0 if larger else self.side // 8
        return partial(
            augment,
            side=self.side,
            crop=usual if crop is None else crop,
            flip=self.mirrored if flip is None else flip,
        )

    @property
    def evaluation_change(self) -> Callable[[Element], Element]:
        """`middle`."""
        return partial(middle, side=self.side)


Data = DataSet | LabelledData


def read_data(kind: str, place: str | Path | None = None, *, side: int | None = None) -> Data:
    """The pictures of a run.

    | kind          | what lies at `place`                                                    |
    |---------------|-------------------------------------------------------------------------|
    | fashion-mnist | train-images-idx3-ubyte.gz and the other three, .gz or plain            |
    | mnist         | the same                                                                |
    | cifar10, …100 | the python version: cifar-10-python.tar.gz, or the folder in it         |
    | arrays        | .npz, or a folder of .npy: x_train, y_train, x_test, y_test; uint8      |
    | folder        | train/CLASS/*.jpg and the like, and test/ or val/ with the same classes |
    | yolo          | boxes to detect: data.yaml, images/train, labels/train and the like     |

    Mean and deviation are those of the training pictures; of a folder, ImageNet's.

    Args:
        kind: of the table.
        place: the file or folder. fashion-mnist has a default, `DEBIAN_FASHION`.
        side: of a folder's pictures as the network sees them, in pixels, 224 by default; the
            files are read with an eighth more, of which training cuts out a random part and
            evaluation the middle. Of pictures with boxes, 640 by default. Of the others: how
            large they are.

    Raises:
        DataError: something is missing, broken, or not what `kind` says: one line with the file.
    """
    if kind not in KINDS:
        raise DataError(f"data {shorten(kind)!r}: must be one of {', '.join(KINDS)}")
    if place is None and kind != "fashion-mnist":
        raise DataError(f"data {kind}: say where it is (--data-dir)")
    place = Path(place or DEBIAN_FASHION)
    if kind == "folder":
        return _folder(place, side or 224)
    if kind == "yolo":
        return read_yolo_folder(place, side or 640)
    if kind in ARCHIVES:
        train, test, classes = read_cifar(kind, place)
    elif kind == "arrays":
        (train, test), classes = _arrays(place), None
    else:
        train, test = _idx(place, "train"), _idx(place, "t10k")
        classes = FASHION if kind == "fashion-mnist" else DIGITS
    known = _check(place, train, test, classes)
    mean, std = _measured(train[0])
    return DataSet(
        Pictures(train[0], train[1].astype(np.int32)),
        Pictures(test[0], test[1].astype(np.int32)),
        known,
        mirrored=kind != "mnist",
        side=train[0].shape[1],
        mean=mean,
        std=std,
    )


def _folder(place: Path, side: int) -> DataSet:
    read_side = side + side // 8
    files, labels, classes = list_folder(place / "train", read_side)
    name = "val" if (place / "val").is_dir() and not (place / "test").is_dir() else "test"
    test_files, test_labels, _ = list_folder(place / name, read_side, classes)
    if not len(test_files):
        raise DataError(f"{shorten(place / name)}: has no pictures in it")
    train, test = Pictures(files, labels), Pictures(test_files, test_labels)
    return DataSet(train, test, classes, mirrored=True, side=side, mean=MEAN, std=STD)


def _idx(place: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    images = read_idx(_found(place, f"{part}-images-idx3-ubyte"), 3)
    labels = read_idx(_found(place, f"{part}-labels-idx1-ubyte"), 1)
    return images[..., None], labels


def _found(place: Path, name: str) -> Path:
    for path in (place / f"{name}.gz", place / name):
        if path.exists():
            return path
    hint = (
        "; apt install dataset-fashion-mnist, or say --data-dir" if place == DEBIAN_FASHION else ""
    )
    raise DataError(f"{shorten(place / name)}: not found, neither so nor with .gz{hint}")


def _arrays(place: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    names = ("x_train", "y_train", "x_test", "y_test")
    try:
        if place.is_dir():
            loaded = {n: np.load(place / f"{n}.npy", allow_pickle=False) for n in names}
        else:
            with place.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                loaded = {n: file[n] for n in names}
    except KeyError as error:
        raise DataError(f"{shorten(place)}: {error}; expected {', '.join(names)}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise DataError(f"{shorten(place)}: cannot be read: {shorten(error, 150)}") from error
    images = [x[..., None] if x.ndim == 3 else x for x in (loaded["x_train"], loaded["x_test"])]
    labels = [y[:, 0] if y.ndim == 2 else y for y in (loaded["y_train"], loaded["y_test"])]
    return list(zip(images, labels, strict=True))


def _check(
    place: Path,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    classes: tuple[str, ...] | None,
) -> tuple[str, ...]:
    """The names of the classes; numbers where nobody named them."""
    for part, (x, y) in (("training", train), ("test", test)):
        if x.ndim != 4 or x.dtype != np.uint8 or x.shape[3] not in (1, 3) or not x.size:
            raise DataError(
                f"{shorten(place)}: {part} pictures are {x.dtype} of {x.shape}, expected uint8 of "
                "(N, H, W) or (N, H, W, 1 or 3)"
            )
        if y.shape != x.shape[:1] or y.dtype.kind not in "iu":
            raise DataError(
                f"{shorten(place)}: {len(x)} {part} pictures, but classes are {y.dtype} of "
                f"{y.shape}"
            )
    if train[0].shape[1:] != test[0].shape[1:] or train[0].shape[1] != train[0].shape[2]:
        raise DataError(
            f"{shorten(place)}: pictures of {train[0].shape[1:]} and {test[0].shape[1:]}, expected "
            "one size, square"
        )
    names = classes or tuple(str(n) for n in range(int(train[1].max()) + 1))
    for part, (_, y) in (("training", train), ("test", test)):
        if int(y.min()) < 0 or int(y.max()) >= len(names):
            raise DataError(
                f"{shorten(place)}: {part} classes go from {y.min()} to {y.max()}, expected 0 to "
                f"{len(names) - 1}"
            )
    return names


def _measured(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    some = images[:: max(1, -(-len(images) // MEASURED))]
    mean = some.mean((0, 1, 2), np.float64) / 255
    std = some.std((0, 1, 2), np.float64) / 255
    return tuple(map(float, mean)), tuple(float(max(s, 1 / 255)) for s in std)
