"""Convolution in the Fourier domain, tile by tile (overlap-save), every step a matrix product.

A tile of n × n pixels gives (n − k + 1)² outputs of a k × k kernel. Along H the discrete Fourier
transform is real, along W complex; both are products with small constant matrices, and between
them stands one real matrix product per frequency,

    (2 · tiles, C_in) × (C_in, 2 · C_out),

rows and columns being real and imaginary parts. Axes are ordered (frequency, part, tile, channel),
so that every product reads and writes contiguously. It takes 4 · n · (n // 2 + 1) multiplications
a channel pair and tile, where the direct way takes k² · (n − k + 1)²: 11 times fewer for k = 7,
n = 20. A picture that fits into one tile together with *one* of its two borders needs no more:
the period wraps around, and the zeros beyond one border serve beyond the other.

Everything is linear in the pictures and in the kernel and made of products, so that derivatives
of any order, forward and reverse, are products of the same kind. What is large (the kernel's
spectrum, above all) is made a few rows of frequencies at a time and made again going backward:
a machine spends more on writing it to memory than on the arithmetic.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

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


def correlate(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "k l D O"],
    padding: Padding,
    tiling: Tiling,
    groups: int = 1,
) -> Float[Array, "B h w O"]:
    """What torch and `lax.conv_general_dilated` call a convolution, stride 1, in `x`'s type."""
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)

    @partial(jax.checkpoint, prevent_cse=False)
    def some(x: Array) -> Array:
        return _by_rows(x, kernel, padding, tiling, groups)

    return _by_images(some, x, tiling.images)


def kernel_spectrum(
    kernel: Float[Array, "k l D O"], periods: tuple[int, int], groups: int = 1
) -> Float[Array, "f n g D P"]:
    """What `correlate_spectrum` takes: (n_H // 2 + 1, groups, n_W, D, 2 · O / groups), the real
    parts first.

    It holds n_H · n_W / k² times the kernel's numbers, or a little more.
    """
    first = _kernel_rows(periods, kernel.shape, kernel.dtype)
    # Row by row: all at once would take twice the spectrum's memory while it is made.
    return jax.lax.map(
        lambda row: _spectrum_of_kernel(kernel, row[None], periods, groups)[0], first
    )


def correlate_spectrum(
    x: Float[Array, "B H W C"],
    spectrum: Float[Array, "f n g D P"],
    kernel_size: tuple[int, int],
    padding: Padding,
    tiling: Tiling,
) -> Float[Array, "B h w O"]:
    """`correlate` with a kernel transformed before; `tiling` has the periods of the spectrum."""

    def some(x: Array) -> Array:
        tiles, cuts = _tiles(x, kernel_size, padding, tiling.periods)
        forward, second, back, last = _matrices(tiling.periods, cuts, x.dtype)
        rows = _half_spectrum(tiles, forward)
        return _untile(
            _rows(rows, spectrum, second, back), last, x.shape, cuts, kernel_size, padding
        )

    return _by_images(some, x, tiling.images)


def _by_images(some, x: Array, images: int) -> Array:
    """`some` of `images` pictures at a time, and of what is left over."""
    batch = x.shape[0]
    if not images or images >= batch:
        return some(x)
    whole = batch - batch % images
    y = jax.lax.map(some, x[:whole].reshape(-1, images, *x.shape[1:]))
    y = y.reshape(whole, *y.shape[2:])
    return y if whole == batch else jnp.concatenate([y, some(x[whole:])])


def _by_rows(x: Array, kernel: Array, padding: Padding, tiling: Tiling, groups: int) -> Array:
    tiles, cuts = _tiles(x, kernel.shape[:2], padding, tiling.periods)
    forward, second, back, last = _matrices(tiling.periods, cuts, x.dtype)
    first = _kernel_rows(tiling.periods, kernel.shape, x.dtype)
    count = forward.shape[0]
    steps = -(-count // tiling.rows)

    @partial(jax.checkpoint, prevent_cse=False)
    def step(carry: None, some: tuple[Array, Array]) -> tuple[None, Array]:
        rows, matrix = some
        spectrum = _spectrum_of_kernel(kernel, matrix, tiling.periods, groups)
        return carry, _rows(rows, spectrum, second, back)

    parts = _in_steps(forward, steps, tiling.rows), _in_steps(first, steps, tiling.rows)
    rows = jnp.einsum("sfph,hwtc->sfpwtc", parts[0], tiles)
    if steps == 1:
        _, y = step(None, (rows[0], parts[1][0]))
    else:
        _, y = jax.lax.scan(step, None, (rows, parts[1]))
        y = y.reshape(-1, *y.shape[2:])[:count]
    return _untile(y, last, x.shape, cuts, kernel.shape[:2], padding)


def _in_steps(matrix: np.ndarray, steps: int, rows: int) -> np.ndarray:
    """(frequencies, …) as (steps, rows, …), zeros where the frequencies do not fill the last."""
    short = steps * rows - matrix.shape[0]
    padded = np.pad(matrix, [(0, short)] + [(0, 0)] * (matrix.ndim - 1))
    return padded.reshape(steps, rows, *matrix.shape[1:])


def _tiles(
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


def _half_spectrum(tiles: Array, forward: np.ndarray) -> Array:
    return jnp.einsum("fph,hwtc->fpwtc", forward, tiles)


def _rows(rows: Array, spectrum: Array, second: np.ndarray, back: np.ndarray) -> Array:
    """Some rows of frequencies: transformed along W, multiplied, transformed back along W."""
    x = jnp.einsum("fgqpw,fpwtc->fgqtc", _a_row(second, rows), rows)
    (high, wide), tiles, groups = x.shape[:2], x.shape[3], spectrum.shape[1]
    # Real and imaginary parts are more rows: one product a frequency and group, not four.
    x = x.reshape(high, wide, 2 * tiles, groups, -1)
    z = jnp.einsum("fgtnc,fngco->fngto", x, spectrum)
    z = jax.lax.optimization_barrier(z)
    z = z.reshape(high, groups, wide, 2, tiles, 2, -1)
    # Split, not sliced: going backward each part would be padded to all of z, and these added.
    upper, lower = jax.lax.split(z, (1, 1), 3)
    (a, b), (c, d) = (jax.lax.split(part, (1, 1), 5) for part in (upper, lower))
    y = jnp.concatenate([a - d, b + c], 3)[..., 0, :].transpose(0, 2, 3, 4, 1, 5)
    y = y.reshape(*y.shape[:4], -1)
    return jnp.einsum("fqwgp,fgpto->fqwto", _a_row(back, rows), y)


def _a_row(matrix: np.ndarray, rows: Array) -> Array:
    """The same transform for each row: one for all would be a product with axes out of order, and
    XLA would write everything anew before and after it."""
    return jnp.broadcast_to(matrix, (rows.shape[0], *matrix.shape))


def _spectrum_of_kernel(
    kernel: Array, first: Array | np.ndarray, periods: tuple[int, int], groups: int
) -> Array:
    """The conjugate spectrum, (f, n, g, D, 2 · O / n), of the rows that `first` makes."""
    second = _complex_dft(periods[1], range(kernel.shape[1])).astype(kernel.dtype)
    second[:, 1] *= -1
    rows = jnp.einsum("fph,hwio->fpwio", first, kernel)
    both = jnp.einsum("fgqpw,fpwio->fgqio", _a_row(second, rows), rows)
    both = both.reshape(*both.shape[:4], groups, -1).transpose(0, 4, 1, 3, 2, 5)
    return both.reshape(*both.shape[:4], -1)


def _untile(
    y: Array,
    last: np.ndarray,
    shape: tuple[Any, ...],
    cuts: tuple[Cut, Cut],
    kernel_size: tuple[int, ...],
    padding: Padding,
) -> Array:
    """The outputs (B, h, w, O) from rows of frequencies, transformed along W already."""
    high, wide = cuts
    y = jnp.einsum("hfq,fqwto->hwto", last, y)
    y = y.reshape(high.outputs, wide.outputs, high.count, wide.count, shape[0], -1)
    y = y.transpose(4, 2, 0, 3, 1, 5)
    y = y.reshape(shape[0], high.count * high.outputs, wide.count * wide.outputs, -1)
    sizes = [shape[1 + i] + sum(padding[i]) - kernel_size[i] + 1 for i in (0, 1)]
    return y[:, : sizes[0], : sizes[1]]


def _matrices(
    periods: tuple[int, int], cuts: tuple[Cut, Cut], dtype: np.dtype
) -> tuple[np.ndarray, ...]:
    """The four transforms of pictures, cast to `dtype`: H, W, and back again, W, H."""
    (high, wide), (n, m) = cuts, periods
    in_h, out_h = range(high.start, high.start + high.inputs), range(high.outputs)
    in_w, out_w = range(wide.start, wide.start + wide.inputs), range(wide.outputs)
    back = _complex_dft(m, out_w).transpose(2, 3, 0, 1) / m
    # A real signal's other frequencies are the conjugates of these: they count twice.
    twice = np.where(np.arange(n // 2 + 1) * 2 % n == 0, 1, 2)[:, None, None]
    last = (_real_dft(n, out_h) * twice / n).transpose(2, 0, 1)
    every = _real_dft(n, in_h), _complex_dft(m, in_w), back, last
    return tuple(matrix.astype(dtype) for matrix in every)


def _kernel_rows(periods: tuple[int, int], shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The transform of a kernel along H."""
    return _real_dft(periods[0], range(shape[0])).astype(dtype)


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
