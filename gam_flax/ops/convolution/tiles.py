"""Pictures cut into overlapping tiles, put together again, and the matrices of their transforms."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

Padding = tuple[tuple[int, int], tuple[int, int]]
"""Zeros before and after, along H and along W."""


class Tiling(NamedTuple):
    """How a convolution is cut into pieces.

    periods: n along H and along W, in pixels; at least the kernel's size.
    rows: rows of frequencies at a time, of n // 2 + 1.
    images: pictures at a time; 0 for all.
    """

    periods: tuple[int, int]
    rows: int = 1
    images: int = 0


class Cut(NamedTuple):
    """Tiles along one axis: `count` of them; input i stands at point `start` + i of the period."""

    count: int
    inputs: int
    start: int
    outputs: int


def cut(size: int, kernel_size: int, padding: tuple[int, int], period: int) -> Cut:
    """The tiles of one axis of `size` pixels."""
    outputs = size + sum(padding) - kernel_size + 1
    if period >= size + max(padding):
        return Cut(1, size, padding[0], outputs)
    step = period - kernel_size + 1
    return Cut(-(-outputs // step), period, 0, step)


def adjoint_padding(kernel_size: tuple[int, ...], padding: Padding) -> Padding:
    """The padding of the gradient by the pictures, of stride 1."""
    (top, bottom), (left, right) = padding
    down, along = kernel_size[0] - 1, kernel_size[1] - 1
    return (down - top, down - bottom), (along - left, along - right)


def tiles(
    x: Array, kernel_size: tuple[int, ...], padding: Padding, periods: tuple[int, int]
) -> tuple[Array, tuple[Cut, Cut]]:
    """The tiles as (h, w, tile, channel), and how each axis was cut."""
    high, wide = (
        cut(x.shape[1 + axis], kernel_size[axis], padding[axis], periods[axis]) for axis in (0, 1)
    )
    for axis, one in ((1, high), (3, wide)):
        x = _windows(x, axis, one, kernel_size[axis // 2], padding[axis // 2][0])
    x = x.transpose(2, 4, 1, 3, 0, 5)
    return x.reshape(*x.shape[:2], -1, x.shape[-1]), (high, wide)


def _windows(x: Array, axis: int, one: Cut, kernel_size: int, before: int) -> Array:
    """Axis `axis` as two: the tile and the point in it; neighbours share `kernel_size` − 1."""
    if one.inputs == x.shape[axis] and one.count == 1:
        return jnp.expand_dims(x, axis)
    shared = kernel_size - 1
    length = one.count * one.outputs + shared
    widths = [(0, 0, 0)] * x.ndim
    widths[axis] = (before, length - before - x.shape[axis], 0)
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), widths)
    pieces = []
    for start in range(0, one.inputs, one.outputs):
        # The next tiles' beginnings are this one's end.
        width = min(one.outputs, one.inputs - start)
        stop = start + (one.count - 1) * one.outputs + width
        piece = jax.lax.slice_in_dim(x, start, stop, axis=axis)
        fill = [(0, 0, 0)] * x.ndim
        fill[axis] = (0, one.outputs - width, 0)
        piece = jax.lax.pad(piece, jnp.zeros((), x.dtype), fill)
        shape = (*x.shape[:axis], one.count, one.outputs, *x.shape[axis + 1 :])
        pieces.append(jax.lax.slice_in_dim(piece.reshape(shape), 0, width, axis=axis + 1))
    return jnp.concatenate(pieces, axis + 1)


def output_tiles(g: Array, cuts: tuple[Cut, Cut]) -> Array:
    """Outputs, or their gradients, as (h, w, tile, channel); what `untile` undoes."""
    high, wide = cuts
    missing = [one.count * one.outputs - size for one, size in zip(cuts, g.shape[1:3], strict=True)]
    g = jnp.pad(g, ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)))
    g = g.reshape(g.shape[0], high.count, high.outputs, wide.count, wide.outputs, -1)
    g = g.transpose(2, 4, 1, 3, 0, 5)
    return g.reshape(*g.shape[:2], -1, g.shape[-1])


def untile(
    y: Array,
    shape: tuple[Any, ...],
    cuts: tuple[Cut, Cut],
    kernel_size: tuple[int, ...],
    padding: Padding,
) -> Array:
    """The outputs (B, h, w, O) of pictures of `shape`, from those of tiles, (h, w, tile, O)."""
    high, wide = cuts
    y = y.reshape(high.outputs, wide.outputs, high.count, wide.count, shape[0], -1)
    y = y.transpose(4, 2, 0, 3, 1, 5)
    y = y.reshape(shape[0], high.count * high.outputs, wide.count * wide.outputs, -1)
    sizes = [shape[1 + i] + sum(padding[i]) - kernel_size[i] + 1 for i in (0, 1)]
    return y[:, : sizes[0], : sizes[1]]


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
