"""Pictures cut into tiles, put together again, and the matrices of the tiles' transforms."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

Padding = tuple[tuple[int, int], tuple[int, int]]
"""Zeros before and after, along H and along W."""

Side = Literal["inputs", "outputs"]


class Tiling(NamedTuple):
    """How a convolution is cut into pieces.

    periods: n along H and along W, in pixels; at least the kernel's size.
    rows: rows of frequencies at a time, of n // 2 + 1.
    images: pictures at a time; 0 for all.
    overlap: whether neighbouring tiles share inputs (overlap-save), or outputs, which are added
        (overlap-add). The other side is cut without a copy of anything.
    """

    periods: tuple[int, int]
    rows: int = 1
    images: int = 0
    overlap: Side = "inputs"
    parts: int = 1


class Window(NamedTuple):
    """Of `width` pixels; the first tile's begins at pixel `first`."""

    first: int
    width: int


class Cut(NamedTuple):
    """Tiles along one axis: `count` of them, one every `step` pixels; the inputs stand from point
    `start` of the period on, the outputs from 0."""

    count: int
    step: int
    inputs: Window
    start: int
    outputs: Window


def cut(
    size: int, kernel_size: int, padding: tuple[int, int], period: int, overlap: Side = "inputs"
) -> Cut:
    """The tiles of one axis of `size` pixels."""
    before, shared = padding[0], kernel_size - 1
    outputs = size + sum(padding) - shared
    if period >= size + max(padding):
        return Cut(1, size, Window(0, size), before, Window(0, outputs))
    step = period - shared
    if overlap == "inputs":
        return Cut(-(-outputs // step), step, Window(-before, period), 0, Window(0, step))
    return Cut(-(-size // step), step, Window(0, step), shared, Window(before - shared, period))


def cuts(
    sizes: tuple[int, int], kernel_size: tuple[int, ...], padding: Padding, tiling: Tiling
) -> tuple[Cut, Cut]:
    """The tiles of pictures of `sizes`."""
    high, wide = (
        cut(sizes[i], kernel_size[i], padding[i], tiling.periods[i], tiling.overlap) for i in (0, 1)
    )
    return high, wide


def output_sizes(
    sizes: tuple[int, int], kernel_size: tuple[int, ...], padding: Padding
) -> tuple[int, int]:
    """Of a convolution of stride 1."""
    high, wide = (sizes[i] + sum(padding[i]) - kernel_size[i] + 1 for i in (0, 1))
    return high, wide


def adjoint_padding(kernel_size: tuple[int, ...], padding: Padding) -> Padding:
    """The padding of the gradient by the pictures, of stride 1."""
    (top, bottom), (left, right) = padding
    down, along = kernel_size[0] - 1, kernel_size[1] - 1
    return (down - top, down - bottom), (along - left, along - right)


def tiles(x: Array, both: tuple[Cut, Cut], side: Side) -> Array:
    """The windows of one side of a convolution, its pictures or its outputs, as
    (h, w, tile, channel); zeros beyond the pictures."""
    for axis, one in ((1, both[0]), (3, both[1])):
        x = _windows(x, axis, one, getattr(one, side))
    x = x.transpose(2, 4, 1, 3, 0, 5)
    return x.reshape(*x.shape[:2], -1, x.shape[-1])


def untile(y: Array, shape: tuple[Any, ...], both: tuple[Cut, Cut]) -> Array:
    """Outputs of `shape` from their windows: `tiles` transposed, what overlaps is added."""
    like = jax.typeof(y).update(shape=shape)
    return jax.linear_transpose(partial(tiles, both=both, side="outputs"), like)(y)[0]


def _windows(x: Array, axis: int, one: Cut, window: Window) -> Array:
    """Axis `axis` as two: the tile and the point in it."""
    step = one.step if one.count > 1 else window.width
    pieces = []
    for start in range(0, window.width, step):
        # The next tiles' beginnings are this one's end.
        first = window.first + start
        widths = [(0, 0, 0)] * x.ndim
        widths[axis] = (-first, first + one.count * step - x.shape[axis], 0)
        piece = jax.lax.pad(x, jnp.zeros((), x.dtype), widths)
        piece = piece.reshape(*x.shape[:axis], one.count, step, *x.shape[axis + 1 :])
        width = min(step, window.width - start)
        pieces.append(jax.lax.slice_in_dim(piece, 0, width, axis=axis + 1))
    return jnp.concatenate(pieces, axis + 1)


def into(
    periods: tuple[int, int], points: tuple[range, range], dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """The transforms of a signal that stands at `points` and is zero elsewhere: along H, real,
    (f, part, point), and along W, complex, (g, part, part, point)."""
    down, along = _real_dft(periods[0], points[0]), _complex_dft(periods[1], points[1])
    return down.astype(dtype), along.astype(dtype)


def out_of(
    periods: tuple[int, int], points: tuple[range, range], dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Their inverses, wanted at `points`: along W, (part, point, g, part), and along H,
    (f, part, point)."""
    n, m = periods
    # A real signal's other frequencies are the conjugates of these: they count twice.
    twice = np.where(np.arange(n // 2 + 1) * 2 % n == 0, 1, 2)[:, None, None]
    along = _complex_dft(m, points[1]).transpose(2, 3, 0, 1) / m
    return along.astype(dtype), (_real_dft(n, points[0]) * twice / n).astype(dtype)


@lru_cache
def _real_dft(n: int, points: range) -> np.ndarray:
    """(f, part, point): frequencies 0 … n // 2 of a real signal that is zero elsewhere."""
    angle = 2 * np.pi / n * (np.outer(range(n // 2 + 1), points) % n)
    return np.stack([np.cos(angle), -np.sin(angle)], 1)


@lru_cache
def _complex_dft(n: int, points: range) -> np.ndarray:
    """(g, part, part, point): all n frequencies of a complex signal that is zero elsewhere."""
    angle = 2 * np.pi / n * (np.outer(range(n), points) % n)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([np.stack([cos, sin], 1), np.stack([-sin, cos], 1)], 1)
