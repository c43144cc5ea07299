"""Convolution, padding, pooling and the channel shuffle against torch's, in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

from gam_flax.convert.leaves import to_flax_layout
from gam_flax.linen.common import conv2d as linen_conv2d
from gam_flax.ops.conv import channel_shuffle, conv2d, max_pool2d, replicate_pad2d


def pictures(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


def in_torch(function, x: np.ndarray) -> np.ndarray:
    """`function` of the NCHW tensor, back in NHWC."""
    return np.moveaxis(function(torch.from_numpy(np.moveaxis(x, -1, 1))).detach().numpy(), 1, -1)


@pytest.mark.parametrize("size", [(0, 4, 4), (2, 7, 6)], ids=str)
@pytest.mark.parametrize(
    "kernel_size, options",
    [
        (1, {}),
        (1, {"stride": 2}),
        (3, {"padding": 1, "stride": 2}),
        (7, {"padding": 3, "stride": 2}),
        (3, {"padding": 4, "dilation": 4}),
        (3, {"padding": 1, "groups": 2}),
        (4, {"padding": 1, "use_bias": False}),
    ],
    ids=str,
)
def test_conv2d(kernel_size, options, size):
    bias = options.get("use_bias", True)
    known = {name: value for name, value in options.items() if name != "use_bias"}
    twin = torch.nn.Conv2d(4, 6, kernel_size, bias=bias, **known).double()
    kernel = to_flax_layout("kernel", twin.weight.detach().numpy())
    x = pictures(*size, 4)
    expected = in_torch(twin, x)
    with jax.enable_x64(True):
        conv = conv2d(4, 6, kernel_size, param_dtype=jnp.float64, rngs=nnx.Rngs(0), **options)
        assert conv.kernel.shape == kernel.shape
        conv.kernel[...] = jnp.asarray(kernel)
        if bias:
            conv.bias[...] = jnp.asarray(twin.bias.detach().numpy())
        np.testing.assert_allclose(conv(jnp.asarray(x)), expected, rtol=0, atol=1e-12)
        if "stride" not in options:  # Linen's blocks have none
            params = {"kernel": kernel} | ({"bias": twin.bias.detach().numpy()} if bias else {})
            y = linen_conv2d(6, kernel_size, **options).apply({"params": params}, jnp.asarray(x))
            np.testing.assert_allclose(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", [0, 1, 3])
@pytest.mark.parametrize("size", [(0, 2, 3), (2, 1, 1), (1, 4, 2)], ids=str)
def test_replicate_pad2d_also_by_more_than_the_picture(padding, size):
    x = pictures(*size, 3).astype(np.float32)
    expected = in_torch(lambda x: F.pad(x, (padding,) * 4, mode="replicate"), x)
    np.testing.assert_array_equal(replicate_pad2d(jnp.asarray(x), padding), expected)


@pytest.mark.parametrize("size", [(0, 4, 4), (1, 1, 1), (2, 7, 8), (2, 8, 7)], ids=str)
@pytest.mark.parametrize("kernel_size, stride, padding", [(3, 2, 1), (2, 2, 0), (3, 1, 1)])
def test_max_pool2d_of_negative_numbers(size, kernel_size, stride, padding):
    if min(size[1:]) + 2 * padding < kernel_size:
        pytest.skip("torch refuses an empty picture")
    x = pictures(*size, 3).astype(np.float32) - 10  # padding by zeros would win everywhere
    expected = in_torch(lambda x: F.max_pool2d(x, kernel_size, stride, padding), x)
    y = max_pool2d(jnp.asarray(x), kernel_size, stride=stride, padding=padding)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("groups", [1, 2, 4, 12])
@pytest.mark.parametrize("size", [(0, 2, 3), (2, 3, 1)], ids=str)
def test_channel_shuffle(groups, size):
    x = pictures(*size, 12).astype(np.float32)
    expected = in_torch(lambda x: F.channel_shuffle(x, groups), x)
    np.testing.assert_array_equal(channel_shuffle(jnp.asarray(x), groups), expected)
