"""Convolution and pooling of NHWC pictures, padded by explicit numbers as torch pads."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gam_flax.ops.convolution.convolve import conv_general_dilated


def conv2d(
    in_channels: int,
    out_channels: int,
    kernel_size: int,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    use_bias: bool = True,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """`torch.nn.Conv2d` in Flax: `padding` pixels of zeros on all four sides."""
    return nnx.Conv(
        in_channels,
        out_channels,
        (kernel_size, kernel_size),
        strides=stride,
        padding=((padding, padding), (padding, padding)),
        kernel_dilation=dilation,
        feature_group_count=groups,
        use_bias=use_bias,
        conv_general_dilated=conv_general_dilated,
        dtype=dtype,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def replicate_pad2d(x: Float[Array, "B H W C"], padding: int) -> Float[Array, "B h w C"]:
    """`x` with `padding` pixels more on all four sides, the border's own."""
    return jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode="edge")


def max_pool2d(
    x: Float[Array, "B H W C"], kernel_size: int, *, stride: int, padding: int
) -> Float[Array, "B h w C"]:
    """`torch.nn.functional.max_pool2d`: `padding` pixels on all four sides, which never win."""
    window, strides = (1, kernel_size, kernel_size, 1), (1, stride, stride, 1)
    widths = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, widths)


def channel_shuffle(x: Float[Array, "*B C"], groups: int) -> Float[Array, "*B C"]:
    """`torch.nn.functional.channel_shuffle`: channel (g, i) of (groups, C / groups) to (i, g)."""
    parts = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    return parts.swapaxes(-1, -2).reshape(x.shape)
