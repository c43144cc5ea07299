"""CIFAR-10 and CIFAR-100 as their authors give them: pickles, read without running anything."""

from __future__ import annotations

import io
import pickle
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gam_flax.convert.errors import shorten
from gam_flax.train.errors import DataError

SIDE = 32


class Archive(NamedTuple):
    """Where one of the two keeps its parts, and under which keys its classes are."""

    folder: str
    file: str
    train: tuple[str, ...]
    test: str
    names: str
    labels_key: str
    names_key: str


ARCHIVES = {
    "cifar10": Archive(
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        "test_batch",
        "batches.meta",
        "labels",
        "label_names",
    ),
    "cifar100": Archive(
        "cifar-100-python",
        "cifar-100-python.tar.gz",
        ("train",),
        "test",
        "meta",
        "fine_labels",
        "fine_label_names",
    ),
}

Arrays = tuple[np.ndarray, np.ndarray]
"""Pictures N H W C uint8, classes N."""


def read_cifar(kind: str, place: Path) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """Training and test pictures, and the names of the classes.

    Args:
        kind: "cifar10" or "cifar100".
        place: the .tar.gz, the folder in it, or the folder that one of them lies in.

    Raises:
        DataError: nothing of the kind is there, a part is missing or broken, or a pickle names
            anything but numpy arrays.

    Source: https://www.cs.toronto.edu/~kriz/cifar.html.
    """
    archive = ARCHIVES[kind]
    with _opened(archive, place) as read:
        parts = [_pictures(read(name), archive.labels_key) for name in archive.train]
        images, labels = zip(*parts, strict=True)
        train = np.concatenate(images), np.concatenate(labels)
        test = _pictures(read(archive.test), archive.labels_key)
        where, names = read(archive.names)
        classes = tuple(str(_text(name)) for name in _entry(where, names, archive.names_key))
    return train, test, classes


@contextmanager
def _opened(archive: Archive, place: Path) -> Iterator[Any]:
    """A function from a part's name to its file's name and content."""
    if not place.exists():
        raise DataError(f"{shorten(place)}: not found; expected {archive.file} or its folder there")
    folders = [path for path in (place, place / archive.folder) if (path / archive.test).exists()]
    if folders:
        folder = folders[0]
        yield lambda name: (str(folder / name), _unpickled(folder / name, _bytes(folder / name)))
        return
    file = place / archive.file if place.is_dir() else place
    if not file.exists():
        raise DataError(f"{shorten(place)}: neither {archive.file} nor {archive.folder} is there")
    try:
        with tarfile.open(file) as tar:
            yield lambda name: _member(tar, file, f"{archive.folder}/{name}")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataError(
            f"{shorten(file)}: is cut short or broken: {shorten(error, 100)}; fetch it again"
        ) from error


def _member(tar: tarfile.TarFile, file: Path, name: str) -> tuple[str, Any]:
    try:
        content = tar.extractfile(name)
    except KeyError:
        content = None
    if content is None:
        raise DataError(f"{shorten(file)}: has no {name} in it")
    where = f"{file}:{name}"
    return where, _unpickled(where, content.read())


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{shorten(path)}: cannot be read: {error.strerror}") from error


def _pictures(read: tuple[str, Any], labels_key: str) -> Arrays:
    where, content = read
    data = np.asarray(_entry(where, content, "data"))
    labels = np.asarray(_entry(where, content, labels_key))
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * SIDE * SIDE:
        raise DataError(
            f"{shorten(where)}: data are {data.dtype} of {data.shape}, expected uint8 of (N, 3072)"
        )
    if labels.shape != data.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(f"{shorten(where)}: {len(data)} pictures, but {labels.size} classes")
    return data.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1), labels


def _entry(where: str, content: Any, key: str) -> Any:
    """Python 2 wrote the keys as bytes."""
    found = {_text(k): v for k, v in content.items()} if isinstance(content, dict) else {}
    if key not in found:
        raise DataError(f"{shorten(where)}: has no {key!r} in it; is it another archive?")
    return found[key]


def _text(name: Any) -> Any:
    return name.decode("ascii", "replace") if isinstance(name, bytes) else name


class _Refused(pickle.UnpicklingError):
    """A pickle wants more than arrays."""


class _ArraysOnly(pickle.Unpickler):
    """What these pickles hold beside plain data is numpy arrays; every other name is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return _reconstruct
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return _encode
        raise _Refused(f"it names {shorten(module)}.{shorten(name)}")


def _reconstruct(kind: Any, shape: Any, code: Any) -> np.ndarray:
    """An empty array, which the pickle then fills."""
    if kind is not np.ndarray:
        raise _Refused("it builds something else than an array")
    return np.empty(0, np.uint8)


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 puts bytes into a pickle that Python 2 can read."""
    if encoding != "latin1":
        raise _Refused("it encodes text otherwise than latin1")
    return text.encode("latin1")


def _unpickled(where: Any, raw: bytes) -> Any:
    try:
        return _ArraysOnly(io.BytesIO(raw), encoding="bytes").load()
    except _Refused as error:
        raise DataError(f"{shorten(where)}: not a batch of CIFAR: {shorten(error, 120)}") from error
    except Exception as error:  # a broken pickle raises whatever the bytes lead it to
        raise DataError(
            f"{shorten(where)}: is cut short or broken: {shorten(error, 120)}; fetch it again"
        ) from error
