"""Convolution as it stands in the formula: by XLA, a group at a time, or a tap at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gam_flax.ops.convolution.fourier import Padding

Strides = tuple[int, int]


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


def per_group(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "k l D O"],
    strides: Strides,
    padding: Padding,
    groups: int,
) -> Float[Array, "B h w O"]:
    """One convolution a group, and a concatenation.

    XLA on a CPU writes the kernel's gradient of a grouped convolution as a dilated convolution
    that takes 60 to 130 times as long.
    """
    pairs = zip(jnp.split(x, groups, -1), jnp.split(kernel, groups, -1), strict=True)
    return jnp.concatenate([plain(some, part, strides, padding) for some, part in pairs], -1)


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
