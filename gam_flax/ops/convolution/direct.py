"""Convolution as it stands in the formula: by XLA, in pieces, or as products and sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gam_flax.ops.convolution.tiles import Padding

Strides = tuple[int, int]

CACHED = 500_000
"""Numbers of a gradient that XLA multiplies fast with: with 6 MB at once, not 2, the gradient of a
kernel was measured to take three to seven times as long, on two cores that share 8 MB."""

MOST_PIECES = 16
"""Each is a convolution more to compile."""


def plain(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "k l D O"],
    strides: Strides,
    padding: Padding,
    groups: int = 1,
) -> Float[Array, "B h w O"]:
    """`lax.conv_general_dilated` without dilation."""
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def in_borders(
    x: Float[Array, "B H W C"], kernel: Float[Array, "k l C O"], strides: Strides, padding: Padding
) -> Float[Array, "B h w O"]:
    """`plain`; what is smaller than its kernel gets its zeros beforehand, and is not any more.

    For a kernel larger than the picture XLA on a CPU has a loop of its own, which was measured to
    take 4 to 90 times as long.
    """
    if not is_larger(kernel.shape, x.shape[1:3]):
        return plain(x, kernel, strides, padding)
    widths = [(before, after, 0) for before, after in ((0, 0), *padding, (0, 0))]
    wide = jax.lax.pad(x, jnp.zeros((), x.dtype), widths)
    # Without the barrier XLA would put the zeros back into the convolution.
    return plain(jax.lax.optimization_barrier(wide), kernel, strides, ((0, 0), (0, 0)))


def is_larger(kernel_size: Sequence[int], sizes: Sequence[int]) -> bool:
    return any(k > size for k, size in zip(kernel_size[:2], sizes, strict=True))


def pointwise(
    x: Float[Array, "B H W C"], kernel: Float[Array, "1 1 C O"], strides: Strides
) -> Float[Array, "B h w O"]:
    """A kernel of one pixel: a product at every pixel."""
    return x[:, :: strides[0], :: strides[1]] @ kernel[0, 0]


def pointwise_gradient(
    x: Float[Array, "B H W C"], g: Float[Array, "B h w O"], strides: Strides
) -> Float[Array, "1 1 C O"]:
    """The gradient of `pointwise` by its kernel, where `g` is that by its outputs.

    XLA on a CPU writes it as a convolution by a kernel as large as the picture, which was measured
    to take up to 80 times as long as this product. Of a product's factors the first is transposed,
    and what made it (a norm, a relu) made anew in that order, element by element: so the narrow one
    is the first. It was measured to take a quarter to a half of the time.
    """
    x, pixels = x[:, :: strides[0], :: strides[1]], (0, 1, 2)
    contracted = (pixels, pixels), ((), ())
    if x.shape[-1] < g.shape[-1]:
        return jax.lax.dot_general(x, g, contracted)[None, None]
    # Without the barrier XLA would exchange the factors again.
    turned = jax.lax.optimization_barrier(jax.lax.dot_general(g, x, contracted))
    return turned.T[None, None]


def of_kernel(
    x: Float[Array, "B H W C"], kernel: Float[Array, "k l C O"], strides: Strides, padding: Padding
) -> Float[Array, "B h w O"]:
    """`plain`, so few pictures at a time that its transpose by the kernel has no more than `CACHED`
    to multiply with.

    Every n-th picture is of one piece, so that of a batch which is cut over devices each has its
    part of every piece.
    """
    way = partial(plain, strides=strides, padding=padding)
    batch, outputs = x.shape[0], jax.eval_shape(way, x, kernel)
    if not isinstance(batch, int):  # an export of an open batch
        return way(x, kernel)
    wanted = min(MOST_PIECES, -(-outputs.size // CACHED))
    count = max(n for n in range(1, max(2, wanted + 1)) if batch % n == 0)
    pictures = x.reshape(-1, count, *x.shape[1:])
    pieces = [way(pictures[:, i], kernel) for i in range(count)]
    return jnp.stack(pieces, 1).reshape(outputs.shape)


def per_group(
    way: Callable[[Array, Array], Array],
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "k l D O"],
    groups: int,
) -> Float[Array, "B h w O"]:
    """`way` a group, and a concatenation.

    XLA on a CPU writes the kernel's gradient of a grouped convolution as a dilated convolution
    that takes 60 to 130 times as long.
    """
    if groups == 1:
        return way(x, kernel)
    pairs = zip(jnp.split(x, groups, -1), jnp.split(kernel, groups, -1), strict=True)
    return jnp.concatenate([way(some, part) for some, part in pairs], -1)


NARROW, WIDE = 5, 32
"""With fewer channels, or outputs, than `NARROW` in a group XLA on a CPU does not fill its vectors.
Neighbouring groups as one were measured to take 0.12 to 1.2 of the time where neither their
channels nor their outputs are then more than `WIDE`, and up to five times as long beyond."""


def merged_groups(channels: int, outputs: int, groups: int) -> int:
    """How many groups there are when narrow ones that are neighbours become one."""
    narrow, wide = sorted((channels // groups, outputs // groups))
    merged = groups
    for count in (n for n in range(1, groups + 1) if groups % n == 0 and n * wide <= WIDE):
        merged = groups // count
        if count * narrow >= NARROW:
            break
    return merged


def merged(kernel: Float[Array, "k l D O"], groups: int, into: int) -> Float[Array, "k l E O"]:
    """The same convolution's kernel in `into` groups: zeros between those that became one."""
    high, wide, channels, outputs = kernel.shape
    count = groups // into
    if count == 1:
        return kernel
    parts = kernel.reshape(high, wide, channels, into, count, outputs // groups)
    blocks = jnp.einsum("hwcgno,nm->hwmcgno", parts, jnp.eye(count, dtype=kernel.dtype))
    return blocks.reshape(high, wide, count * channels, outputs)


def tap_by_tap(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "k l 1 C"],
    strides: Strides,
    padding: Padding,
) -> Float[Array, "B h w C"]:
    """A depthwise convolution: shifted pictures, each times one number a channel, added."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    high, wide = kernel.shape[:2]
    sizes = [(x.shape[1 + i] - kernel.shape[i]) // strides[i] + 1 for i in (0, 1)]

    def shifted(u: int, v: int) -> Array:
        ends = [
            start + (size - 1) * stride + 1
            for start, size, stride in zip((u, v), sizes, strides, strict=True)
        ]
        return x[:, u : ends[0] : strides[0], v : ends[1] : strides[1]]

    y = shifted(0, 0) * kernel[0, 0, 0]
    for u, v in [(u, v) for u in range(high) for v in range(wide)][1:]:
        y += shifted(u, v) * kernel[u, v, 0]
    return y
