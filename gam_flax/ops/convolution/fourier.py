"""Convolution in the Fourier domain, tile by tile, every step a matrix product.

A tile of n × n points gives (n − k + 1)² outputs of a k × k kernel: neighbours share k − 1 rows and
columns, of inputs (overlap-save) or of outputs, which are added (overlap-add). Along H the discrete
Fourier transform is real, along W complex; both are products with small constant matrices, and
between them stands one real matrix product per frequency,

    (2 · tiles, C_in) × (C_in, 2 · C_out)   or   (2 · tiles, 2 · C_in) × (2 · C_in, C_out),

rows and columns being real and imaginary parts; it is the smaller side that has them twice. Axes
are ordered (frequency, part, tile, channel), so that every product reads and writes contiguously.
It takes 4 · n · (n // 2 + 1) multiplications a channel pair and tile, where the direct way takes
k² · (n − k + 1)²: 11 times fewer for k = 7, n = 20. A picture that fits into one tile together with
*one* of its two borders needs no more: the period wraps around, and the zeros beyond one border
serve beyond the other.

The gradient by the pictures is such a convolution again, by the flipped kernel; that by the kernel
is one by pictures, of few outputs, and has a function of its own. What is large (the kernel's
spectrum, above all) is made a few rows of frequencies at a time: a machine spends more on writing
it to memory than on the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gam_flax.ops.convolution.tiles import (
    Cut,
    Padding,
    Tiling,
    cuts,
    into,
    out_of,
    output_sizes,
    tiles,
    untile,
)


def correlate(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "k l D O"],
    padding: Padding,
    tiling: Tiling,
    groups: int = 1,
) -> Float[Array, "B h w O"]:
    """What torch and `lax.conv_general_dilated` call a convolution, stride 1, in `x`'s type."""
    return _correlate(x, kernel, padding, tiling, groups, lambda kernel: kernel, (2, 3))


def correlate_flipped(
    g: Float[Array, "B h w O"],
    kernel: Float[Array, "k l D O"],
    padding: Padding,
    tiling: Tiling,
    groups: int = 1,
) -> Float[Array, "B H W C"]:
    """`correlate` with the `flipped` kernel."""
    return _correlate(g, kernel, padding, tiling, groups, partial(flipped, groups=groups), (3, 2))


def flipped(kernel: Float[Array, "k l D O"], groups: int) -> Float[Array, "k l P C"]:
    """The kernel of the gradient by the pictures: taps in reverse, each group's channels and
    outputs exchanged."""
    kernel = jnp.flip(kernel, (0, 1))
    high, wide, channels, _ = kernel.shape
    kernel = kernel.reshape(high, wide, channels, groups, -1).transpose(0, 1, 4, 3, 2)
    return kernel.reshape(high, wide, -1, groups * channels)


def _correlate(
    x: Array,
    kernel: Array,
    padding: Padding,
    tiling: Tiling,
    groups: int,
    turn: Callable[[Array], Array],
    axes: tuple[int, int],
) -> Array:
    """axes: those of `kernel` that are channels and outputs when `turn` has turned it."""
    x, kernel = jnp.asarray(x), jnp.asarray(kernel)

    def some(x: Array, kernel: Array) -> Array:
        kernel = turn(kernel)
        return _by_images(lambda x: _by_rows(x, kernel, padding, tiling, groups), x, tiling.images)

    if tiling.parts == 1:
        return some(x, kernel)
    channels, outputs = (kernel.shape[axis] for axis in axes)
    sizes = output_sizes((x.shape[1], x.shape[2]), kernel.shape[:2], padding)
    wide = max(channels, outputs) // tiling.parts

    def step(i: Array, y: Array) -> Array:
        if channels > outputs:
            return y + some(_part(x, i, wide, 3), _part(kernel, i, wide, axes[0]))
        return _with_part(y, some(x, _part(kernel, i, wide, axes[1])), i, 3)

    return jax.lax.fori_loop(0, tiling.parts, step, _zeros(x, (x.shape[0], *sizes, outputs)))


def _part(array: Array, index: Array, size: int, axis: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(array, index * size, size, axis)


def _with_part(array: Array, part: Array, index: Array, axis: int) -> Array:
    start = index * part.shape[axis]
    return jax.lax.dynamic_update_slice_in_dim(array, part, start, axis)


def _zeros(like: Array, shape: tuple[int, ...]) -> Array:
    """What is of `like`'s type, and under shard_map varies as it does."""
    zeros = jnp.zeros(shape, like.dtype)
    return jax.lax.pcast(zeros, tuple(jax.typeof(like).mat.varying), to="varying")


SPECTRA = 4
"""So many arrays, some rows of frequencies each, a kernel's spectrum is kept in. XLA on a CPU
multiplies a row's small matrices on one core, and what does not depend on each other side by side;
slices of one array would be copies. Two, and one for each row, were measured to be slower."""


def spectra_shapes(
    kernel_shape: Sequence[int], periods: tuple[int, int], groups: int = 1
) -> list[tuple[int, ...]]:
    """Some of the n_H // 2 + 1 rows each, (rows, groups, n_W, D, O / groups), the smaller of the
    last two doubled."""
    channels, outputs = kernel_shape[2], kernel_shape[3] // groups
    twice = (2 * channels, outputs) if channels <= outputs else (channels, 2 * outputs)
    parts = np.array_split(np.arange(periods[0] // 2 + 1), SPECTRA)
    return [(len(part), groups, periods[1], *twice) for part in parts if len(part)]


def kernel_spectra(
    kernel: Float[Array, "k l D O"], periods: tuple[int, int], groups: int = 1
) -> list[Float[Array, "_ g n c o"]]:
    """What `correlate_spectra` takes, of `spectra_shapes`; the real parts come first.

    They hold n_H · n_W / k² times the kernel's numbers, or a little more.
    """
    first, along = into(periods, _from_zero(kernel.shape), kernel.dtype)

    # Row by row: all at once would take twice the spectrum's memory while it is made.
    def row_of(row: Array) -> Array:
        return jnp.concatenate(_spectrum_of_kernel(kernel, row[None], along, groups), -1)[0]

    return [jax.lax.map(row_of, part) for part in np.array_split(first, SPECTRA) if len(part)]


def correlate_spectra(
    x: Float[Array, "B H W C"],
    spectra: Sequence[Float[Array, "_ g n c o"]],
    kernel_size: tuple[int, int],
    padding: Padding,
    tiling: Tiling,
) -> Float[Array, "B h w O"]:
    """`correlate` with a kernel transformed before; `tiling` has the periods of the spectra."""

    def some(x: Array) -> Array:
        batch, high, wide, _ = x.shape
        both = cuts((high, wide), kernel_size, padding, tiling)
        down, along = into(tiling.periods, _inputs(both), x.dtype)
        back, last = out_of(tiling.periods, _outputs(both), x.dtype)
        rows = jnp.einsum("fph,hwtc->fpwtc", down, tiles(x, both, "inputs"))
        parts = zip(jnp.array_split(rows, len(spectra)), spectra, strict=True)
        y = jnp.concatenate([_rows(part, (one,), along, back) for part, one in parts])
        y = jnp.einsum("fqh,fqwto->hwto", last, y)
        shape = batch, *output_sizes((high, wide), kernel_size, padding), y.shape[-1]
        return untile(y, shape, both)

    return _by_images(some, x, tiling.images)


def kernel_gradient(
    x: Float[Array, "B H W C"],
    g: Float[Array, "B h w O"],
    kernel_size: tuple[int, int],
    padding: Padding,
    tiling: Tiling,
    groups: int = 1,
) -> Float[Array, "k l D O"]:
    """The gradient of `correlate` by its kernel, where `g` is that by its outputs.

    It is the correlation of `x` with `g`, of which only the kernel's taps are transformed back.
    """

    def some(x: Array, g: Array) -> Array:
        return _gradient_by_images(x, g, kernel_size, padding, tiling, groups)

    if tiling.parts == 1:
        return some(x, g)
    channels, outputs = x.shape[-1], g.shape[-1]
    wide = max(channels, outputs) // tiling.parts

    def step(i: Array, taps: Array) -> Array:
        if channels > outputs:
            return _with_part(taps, some(_part(x, i, wide, 3), g), i, 2)
        return _with_part(taps, some(x, _part(g, i, wide, 3)), i, 3)

    shape = (*kernel_size, channels // groups, outputs)
    return jax.lax.fori_loop(0, tiling.parts, step, _zeros(x, shape))


def _gradient_by_images(
    x: Array, g: Array, kernel_size: tuple[int, int], padding: Padding, tiling: Tiling, groups: int
) -> Array:
    def some(x: Array, g: Array) -> Array:
        return _gradient_by_rows(x, g, kernel_size, padding, tiling, groups)

    batch, size = x.shape[0], _at_a_time(x.shape[0], tiling.images)
    if size == batch:
        return some(x, g)
    whole = batch - batch % size
    pieces = [a[:whole].reshape(-1, size, *a.shape[1:]) for a in (x, g)]
    found = jax.lax.map(lambda piece: some(*piece), tuple(pieces)).sum(0)
    return found if whole == batch else found + some(x[whole:], g[whole:])


def _at_a_time(batch: Any, images: int) -> Any:
    """A batch that is not known yet is not cut."""
    return images if images and isinstance(batch, int) and images < batch else batch


def _by_images(some, x: Array, images: int) -> Array:
    """`some` of `images` pictures at a time, and of what is left over."""
    batch, size = x.shape[0], _at_a_time(x.shape[0], images)
    if size == batch:
        return some(x)
    whole = batch - batch % size
    y = jax.lax.map(some, x[:whole].reshape(-1, size, *x.shape[1:]))
    y = y.reshape(whole, *y.shape[2:])
    return y if whole == batch else jnp.concatenate([y, some(x[whole:])])


def _inputs(both: tuple[Cut, Cut]) -> tuple[range, range]:
    """The points of a period at which a tile's inputs stand."""
    high, wide = (range(one.start, one.start + one.inputs.width) for one in both)
    return high, wide


def _outputs(both: tuple[Cut, Cut]) -> tuple[range, range]:
    return _from_zero([one.outputs.width for one in both])


def _from_zero(sizes: Sequence[int]) -> tuple[range, range]:
    return range(sizes[0]), range(sizes[1])


def _by_rows(x: Array, kernel: Array, padding: Padding, tiling: Tiling, groups: int) -> Array:
    batch, high, wide, _ = x.shape
    both = cuts((high, wide), kernel.shape[:2], padding, tiling)
    down, along = into(tiling.periods, _inputs(both), x.dtype)
    first, second = into(tiling.periods, _from_zero(kernel.shape), x.dtype)
    back, last = out_of(tiling.periods, _outputs(both), x.dtype)

    def step(carry: None, some: tuple[Array, Array]) -> tuple[None, Array]:
        rows, matrix = some
        spectrum = _spectrum_of_kernel(kernel, matrix, second, groups)
        return carry, _rows(rows, spectrum, along, back)

    down, first = _in_steps(down, tiling.rows), _in_steps(first, tiling.rows)
    rows = jnp.einsum("sfph,hwtc->sfpwtc", down, tiles(x, both, "inputs"))
    _, y = _scan(step, None, (rows, first))
    y = y.reshape(-1, *y.shape[2:])[: last.shape[0]]
    y = jnp.einsum("fqh,fqwto->hwto", last, y)
    shape = batch, *output_sizes((high, wide), kernel.shape[:2], padding), y.shape[-1]
    return untile(y, shape, both)


def _gradient_by_rows(
    x: Array, g: Array, kernel_size: tuple[int, int], padding: Padding, tiling: Tiling, groups: int
) -> Array:
    both = cuts((x.shape[1], x.shape[2]), kernel_size, padding, tiling)
    down, along = into(tiling.periods, _inputs(both), x.dtype)
    down_g, along_g = into(tiling.periods, _outputs(both), x.dtype)
    back, last = out_of(tiling.periods, _from_zero(kernel_size), x.dtype)

    def step(taps: Array, some: tuple[Array, Array, Array]) -> tuple[Array, None]:
        rows, rows_g, matrix = some
        a = jnp.einsum("fgqpw,fpwtc->fgqtc", _a_row(along, rows), rows)
        b = jnp.einsum("fgqpw,fpwto->fgqto", _a_row(along_g, rows_g), rows_g)
        z = _products(a, b, groups)
        z = jnp.einsum("fqwgp,fgpco->fqwco", _a_row(back, z), z)
        return taps + jnp.einsum("fqh,fqwco->hwco", matrix, z), None

    down, down_g, last = (_in_steps(one, tiling.rows) for one in (down, down_g, last))
    rows = jnp.einsum("sfph,hwtc->sfpwtc", down, tiles(x, both, "inputs"))
    rows_g = jnp.einsum("sfph,hwto->sfpwto", down_g, tiles(g, both, "outputs"))
    zero = _zeros(x, (*kernel_size, x.shape[-1] // groups, g.shape[-1]))
    return _scan(step, zero, (rows, rows_g, last))[0]


def _scan(step: Callable[..., Any], carry: Any, steps: tuple[Any, ...]) -> tuple[Any, Any]:
    """`lax.scan`; a single step, which is common, is not put into a loop."""
    if steps[0].shape[0] > 1:
        return jax.lax.scan(step, carry, steps)
    carry, y = step(carry, tuple(jnp.asarray(one[0]) for one in steps))
    return carry, y if y is None else y[None]


def _in_steps(matrix: np.ndarray, rows: int) -> np.ndarray:
    """(frequencies, …) as (steps, rows, …), zeros where the frequencies do not fill the last."""
    steps = -(-matrix.shape[0] // rows)
    short = steps * rows - matrix.shape[0]
    padded = np.pad(matrix, [(0, short)] + [(0, 0)] * (matrix.ndim - 1))
    return padded.reshape(steps, rows, *matrix.shape[1:])


Spectrum = tuple[Float[Array, "f g n c o"], ...]
"""Of a kernel, as a product takes it: one of `spectra_shapes`, or its real and imaginary part."""


def _rows(rows: Array, spectrum: Spectrum, along: np.ndarray, back: np.ndarray) -> Array:
    """Some rows of frequencies: transformed along W, multiplied, transformed back along W."""
    x = jnp.einsum("fgqpw,fpwtc->fgqtc", _a_row(along, rows), rows)
    (high, wide), tiles, groups = x.shape[:2], x.shape[3], spectrum[0].shape[1]
    x = x.reshape(high, wide, 2, tiles, groups, -1)
    doubled = spectrum[0].shape[3] > x.shape[-1]
    y = _inputs_twice(x, *spectrum) if doubled else _outputs_twice(x, spectrum)
    y = y.transpose(0, 2, 3, 4, 1, 5).reshape(high, wide, 2, tiles, -1)
    return jnp.einsum("fqwgp,fgpto->fqwto", _a_row(back, rows), y)


def _inputs_twice(x: Array, spectrum: Array) -> Array:
    """(real, -imaginary) and (imaginary, real) of `x` by (real, imaginary) of the spectrum."""
    high, wide, _, tiles, groups, _ = x.shape
    y = jnp.einsum("fgtnc,fngco->fngto", _beside_turned(x, 1), spectrum)
    return y.reshape(high, groups, wide, 2, tiles, -1)


def _outputs_twice(x: Array, spectrum: Spectrum) -> Array:
    """Real and imaginary part of `x`, as rows of one product, by those of the spectrum."""
    high, wide, _, tiles, groups, channels = x.shape
    x = x.reshape(high, wide, 2 * tiles, groups, channels)
    found = [jnp.einsum("fgtnc,fngco->fngto", x, part) for part in spectrum]
    found = jax.lax.optimization_barrier(found)
    found = [z.reshape(high, groups, wide, 2, tiles, -1) for z in found]
    by_real, by_imaginary = found if len(found) == 2 else jnp.split(found[0], 2, -1)
    # Split, not sliced: going backward each part would be padded to all of z, and these added.
    (a, c), (b, d) = (jax.lax.split(part, (1, 1), 3) for part in (by_real, by_imaginary))
    return jnp.concatenate([a - d, b + c], 3)


def _products(x: Array, g: Array, groups: int) -> Array:
    """x times the conjugate of g, summed over tiles: (f, g, part, D, O)."""
    high, wide, _, tiles, _ = x.shape
    x = x.reshape(high, wide, 2, tiles, groups, -1)
    g = g.reshape(high, wide, 2 * tiles, groups, -1)
    # Einsum would have the factors in the other order, and XLA transpose the result.
    contracted, alike = ((2,), (2,)), ((0, 1, 3), (0, 1, 3))
    z = jax.lax.dot_general(_beside_turned(x, -1), g, (contracted, alike))
    z = z.reshape(high, wide, groups, 2, x.shape[-1], -1).transpose(0, 1, 3, 4, 2, 5)
    return z.reshape(high, wide, 2, x.shape[-1], -1)


def _beside_turned(x: Array, sign: int) -> Array:
    """(f, g, part, tile, group, channel) as rows (part, tile), and beside each number itself times
    i, or -i where `sign` is negative: (f, g, 2 · tiles, group, 2 · channels)."""
    high, wide, _, tiles, groups, channels = x.shape
    real, imaginary = jax.lax.split(x, (1, 1), 2)
    x = jnp.stack([x, jnp.concatenate([-sign * imaginary, sign * real], 2)], 5)
    return x.reshape(high, wide, 2 * tiles, groups, 2 * channels)


def _a_row(matrix: np.ndarray, rows: Array) -> Array:
    """The same transform for each row: one for all would be a product with axes out of order, and
    XLA would write everything anew before and after it."""
    return jnp.broadcast_to(matrix, (rows.shape[0], *matrix.shape))


def _spectrum_of_kernel(
    kernel: Array, first: Array | np.ndarray, second: np.ndarray, groups: int
) -> Spectrum:
    """The conjugate spectrum of the rows that `first` makes."""
    conjugate = second * np.array([1, -1], second.dtype)[:, None, None]
    rows = jnp.einsum("fph,hwio->fpwio", first, kernel)
    if kernel.shape[2] <= kernel.shape[3] // groups:
        return (_along(rows, conjugate, groups),)
    # Side by side as the columns of one product they would have to be transposed.
    return _along(rows, conjugate[:, :1], groups), _along(rows, conjugate[:, 1:], groups)


def _along(rows: Array, matrix: np.ndarray, groups: int) -> Float[Array, "f n g c o"]:
    """A kernel's rows transformed along W; the parts that `matrix` makes, one after the other."""
    parts = jnp.einsum("fgqpw,fpwio->fgqio", _a_row(matrix, rows), rows)
    parts = parts.reshape(*parts.shape[:4], groups, -1).transpose(0, 4, 1, 2, 3, 5)
    return parts.reshape(*parts.shape[:3], -1, parts.shape[-1])
