"""Convolutional Block Attention Module, arXiv 1807.06521: a pooled gate for each of two axes."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gam_torch.attention.common import (
    PROJECTIONS,
    check_channels,
    check_choice,
    check_odd,
    hidden_channels,
    variant_options,
)
from gam_torch.attention.variants import CBAM_VARIANTS


class ChannelGate(nn.Module):
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
    ):
        super().__init__()
        check_choice("projection", projection, PROJECTIONS)
        hidden = hidden_channels(channels, ratio)
        self.channels = channels
        self.ratio = ratio
        self.projection = projection
        self.use_bias = use_bias
        self.fc1 = PROJECTIONS[projection](channels, hidden, bias=use_bias)
        self.fc2 = PROJECTIONS[projection](hidden, channels, bias=use_bias)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C 1 1"]:
        """The gate itself, in (0, 1), to be multiplied with `x`."""
        check_channels("ChannelGate", x.shape, self.channels)
        mean = self.fc2(F.relu(self.fc1(x.mean((2, 3)))))
        peak = self.fc2(F.relu(self.fc1(x.amax((2, 3)))))
        return torch.sigmoid(mean + peak)[:, :, None, None]


class SpatialGate(nn.Module):
    """CBAM's spatial gate: the channels' maximum and mean through one convolution.

        s = σ(norm(conv([max_C(x), mean_C(x)])))        2 → 1 channels,   padding k // 2

    Arguments as in `CBAM`. The two maps stand in the order of `concat`.
    """

    def __init__(
        self,
        *,
        kernel_size: int = 7,
        concat: Literal["max_mean", "mean_max"] = "max_mean",
        spatial_norm: bool = True,
        spatial_bias: bool = False,
        norm_eps: float = 1e-5,
        norm_momentum: float | None = 0.01,
    ):
        super().__init__()
        check_choice("concat", concat, ("max_mean", "mean_max"))
        check_odd(kernel_size)
        self.kernel_size = kernel_size
        self.concat = concat
        self.spatial_norm = spatial_norm
        self.spatial_bias = spatial_bias
        self.norm_eps = norm_eps
        self.norm_momentum = norm_momentum
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=spatial_bias)
        self.norm = (
            nn.BatchNorm2d(1, eps=norm_eps, momentum=norm_momentum) if spatial_norm else None
        )

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 1 H W"]:
        """The gate itself, in (0, 1), to be multiplied with `x`."""
        maps = [x.amax(1, keepdim=True), x.mean(1, keepdim=True)]
        s = self.conv(torch.cat(maps if self.concat == "max_mean" else maps[::-1], dim=1))
        return torch.sigmoid(s if self.norm is None else self.norm(s))


class CBAM(nn.Module):
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

    Shapes: (B, C, H, W) → (B, C, H, W), any B, H and W.

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
    ):
        super().__init__()
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
        self.channel_attention = ChannelGate(
            channels, ratio=ratio, projection=projection, use_bias=use_bias
        )
        self.spatial_attention = SpatialGate(
            kernel_size=kernel_size,
            concat=concat,
            spatial_norm=spatial_norm,
            spatial_bias=spatial_bias,
            norm_eps=norm_eps,
            norm_momentum=norm_momentum,
        )

    @classmethod
    def from_variant(cls, variant: str, channels: int, **overrides: Any) -> CBAM:
        """The block of a named source, see above; `overrides` are constructor arguments."""
        return cls(channels, **variant_options(CBAM_VARIANTS, variant, overrides))

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        check_channels("CBAM", x.shape, self.channels)
        x = x * self.channel_attention(x)
        return x * self.spatial_attention(x)
