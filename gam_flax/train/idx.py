"""IDX files, in which MNIST and its successors come."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from gam_flax.convert.errors import shorten
from gam_flax.train.errors import DataError

BYTES = 0x08
"""The type code of unsigned bytes, the only one that pictures and their classes have."""


def read_idx(path: Path, axes: int) -> np.ndarray:
    """An IDX file of unsigned bytes, gzipped or plain.

    Two zero bytes, the type, the number of axes; the length of each axis as a big-endian 32-bit
    number; the data, last axis fastest.

    Args:
        path: the file.
        axes: how many are expected: 3 for pictures, 1 for classes.

    Raises:
        DataError: the file is missing, cut short, too long, or something else.

    Source: http://yann.lecun.com/exdb/mnist.
    """
    raw = _raw(path)
    if len(raw) < 4 or raw[:3] != bytes([0, 0, BYTES]):
        raise DataError(
            f"{shorten(path)}: not an IDX file of bytes: it begins with "
            f"{raw[:4].hex(' ') or 'nothing'}, expected 00 00 08 {axes:02x}"
        )
    if raw[3] != axes:
        raise DataError(f"{shorten(path)}: has {raw[3]} axes, expected {axes}")
    head = 4 + 4 * axes
    if len(raw) < head:
        raise DataError(f"{shorten(path)}: is cut short in its head: {len(raw)} of {head} bytes")
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", count=axes, offset=4))
    expected = head
    for n in shape:
        expected = head + (expected - head or 1) * n
    if len(raw) != expected:
        wrong = "is cut short" if len(raw) < expected else "is too long"
        raise DataError(
            f"{shorten(path)}: {wrong}: {len(raw):,} bytes, expected {expected:,} for "
            f"{'×'.join(map(str, shape))}; fetch it again"
        )
    return np.frombuffer(raw, np.uint8, offset=head).reshape(shape)


def _raw(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(
            f"{shorten(path)}: is cut short or broken: {error}; fetch it again"
        ) from error
    except OSError as error:
        raise DataError(f"{shorten(path)}: cannot be read: {error.strerror}") from error
