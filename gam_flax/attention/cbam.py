"""Convolutional Block Attention Module, arXiv 1807.06521: a pooled gate for each of two axes."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gam_flax.attention.common import (
    PROJECTIONS,
    check_channels,
    check_choice,
    check_odd,
    hidden_channels,
    variant_options,
)
from gam_flax.attention.variants import CBAM_VARIANTS
from gam_flax.ops.batch_norm import BatchNorm
from gam_flax.ops.conv import conv2d


class ChannelGate(nnx.Module):
    """CBAM's channel gate: average and maximum through one perceptron.

        g = σ(mlp(mean_HW(x)) + mlp(max_HW(x))),    mlp = fc2 ∘ ReLU ∘ fc1,    C → C // ratio → C

    Arguments as in `CBAM`. The gradient of the maximum is shared by equal largest pixels.
    """

    def __init__(
        self,
        channels: int,
        *,
        ratio: float = 16,
        projection: Literal["linear", "conv"] = "linear",
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_choice("projection", projection, PROJECTIONS)
        hidden = hidden_channels(channels, ratio)
        self.channels = channels
        self.ratio = ratio
        self.projection = projection
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        layer = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.fc1 = PROJECTIONS[projection](channels, hidden, **layer)
        self.fc2 = PROJECTIONS[projection](hidden, channels, **layer)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B 1 1 C"]:
        """The gate itself, in (0, 1), to be multiplied with `x`."""
        check_channels("ChannelGate", x.shape, self.channels)
        mean = self.fc2(jax.nn.relu(self.fc1(x.mean((1, 2)))))
        peak = self.fc2(jax.nn.relu(self.fc1(x.max((1, 2)))))
        return jax.nn.sigmoid(mean + peak)[:, None, None, :]


class SpatialGate(nnx.Module):
    """CBAM's spatial gate: the channels' maximum and mean through one convolution.

        s = σ(norm(conv([max_C(x), mean_C(x)])))        2 → 1 channels,   padding k // 2

    Arguments as in `CBAM`. The two maps stand in the order of `concat`.
    """

    NORMS: ClassVar[dict[str, str]] = {"conv": "norm"}
    """Which norm follows which convolution."""

    def __init__(
        self,
        *,
        kernel_size: int = 7,
        concat: Literal["max_mean", "mean_max"] = "max_mean",
        spatial_norm: bool = True,
        spatial_bias: bool = False,
        norm_eps: float = 1e-5,
        norm_momentum: float | None = 0.01,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_choice("concat", concat, ("max_mean", "mean_max"))
        check_odd(kernel_size)
        self.kernel_size = kernel_size
        self.concat = concat
        self.spatial_norm = spatial_norm
        self.spatial_bias = spatial_bias
        self.norm_eps = norm_eps
        self.norm_momentum = norm_momentum
        self.dtype = dtype
        self.param_dtype = param_dtype
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conv = conv2d(
            2, 1, kernel_size, padding=kernel_size // 2, use_bias=spatial_bias, **types
        )
        self.norm = (
            BatchNorm(1, eps=norm_eps, momentum=norm_momentum, **types) if spatial_norm else None
        )

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W 1"]:
        """The gate itself, in (0, 1), to be multiplied with `x`."""
        maps = [x.max(-1, keepdims=True), x.mean(-1, keepdims=True)]
        s = self.conv(jnp.concatenate(maps if self.concat == "max_mean" else maps[::-1], axis=-1))
        return jax.nn.sigmoid(s if self.norm is None else self.norm(s))


class CBAM(nnx.Module):
    """Convolutional Block Attention Module.

        x₁ = x · σ(mlp(mean_HW(x)) + mlp(max_HW(x)))
        y  = x₁ · σ(norm(conv([max_C(x₁), mean_C(x₁)])))

    | variant   | weights of the mlp  | maps      | norm | found in                            |
    |-----------|---------------------|-----------|------|-------------------------------------|
    | reference | linear, with bias   | max, mean | yes  | Jongchan/attention-module           |
    | timm      | 1×1 conv, no bias   | mean, max | yes  | timm                                |
    | plain     | 1×1 conv, no bias   | mean, max | no   | the short rewrites that circulate   |
    | prose     | linear, with bias   | max, mean | no   | the description in words alone      |

    Args:
        channels: C, the channels of the input and of the output.
        ratio: the bottleneck has `int(channels / ratio)` channels.
        kernel_size: k, of the spatial convolution, odd.
        concat: order of the two maps that the spatial convolution sees.
        projection: how the mlp's weights are stored, "linear" (out, in) or "conv" (out, in, 1, 1).
        use_bias: whether the mlp has biases.
        spatial_norm: whether a BatchNorm follows the spatial convolution.
        spatial_bias: whether the spatial convolution has a bias.
        norm_eps, norm_momentum: of that BatchNorm; the reference code's momentum is 0.01.
        dtype: of the computation; None for the wider of the input's and the parameters' type.
        param_dtype: of the parameters.
        rngs: draws the parameters, as Flax does by default; see `torch_default_init`.

    Shapes: (B, H, W, C) → (B, H, W, C), any B, H and W.

    Raises:
        ValueError: the ratio leaves no channel; an even kernel; an unknown option;
            an input of other channels.

    Source: arXiv 1807.06521, section 3.
    """

    def __init__(
        self,
        channels: int,
        *,
        ratio: float = 16,
        kernel_size: int = 7,
        concat: Literal["max_mean", "mean_max"] = "max_mean",
        projection: Literal["linear", "conv"] = "linear",
        use_bias: bool = True,
        spatial_norm: bool = True,
        spatial_bias: bool = False,
        norm_eps: float = 1e-5,
        norm_momentum: float | None = 0.01,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.channels = channels
        self.ratio = ratio
        self.kernel_size = kernel_size
        self.concat = concat
        self.projection = projection
        self.use_bias = use_bias
        self.spatial_norm = spatial_norm
        self.spatial_bias = spatial_bias
        self.norm_eps = norm_eps
        self.norm_momentum = norm_momentum
        self.dtype = dtype
        self.param_dtype = param_dtype
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.channel_attention = ChannelGate(
            channels, ratio=ratio, projection=projection, use_bias=use_bias, **types
        )
        self.spatial_attention = SpatialGate(
            kernel_size=kernel_size,
            concat=concat,
            spatial_norm=spatial_norm,
            spatial_bias=spatial_bias,
            norm_eps=norm_eps,
            norm_momentum=norm_momentum,
            **types,
        )

    @classmethod
    def from_variant(cls, variant: str, channels: int, **overrides: Any) -> CBAM:
        """The block of a named source, see above; `overrides` are constructor arguments."""
        return cls(channels, **variant_options(CBAM_VARIANTS, variant, overrides))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        check_channels("CBAM", x.shape, self.channels)
        x = x * self.channel_attention(x)
        return x * self.spatial_attention(x)
