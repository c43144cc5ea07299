"""Bottleneck Attention Module, arXiv 1807.06514: both gates side by side, then one sigmoid."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gam_torch.attention.common import (
    check_channels,
    check_choice,
    hidden_channels,
    variant_options,
)
from gam_torch.attention.variants import BAM_VARIANTS


class ChannelGate(nn.Module):
    """BAM's channel gate, before the sigmoid.

        g = fc2(ReLU(norm(fc1(mean_HW(x)))))        C → C // ratio → C

    Arguments as in `BAM`. One value a channel and image: training wants a batch of two or more.
    """

    def __init__(
        self,
        channels: int,
        *,
        ratio: float = 16,
        use_bias: bool = True,
        norm_eps: float = 1e-5,
        norm_momentum: float | None = 0.1,
    ):
        super().__init__()
        hidden = hidden_channels(channels, ratio)
        self.channels = channels
        self.ratio = ratio
        self.use_bias = use_bias
        self.norm_eps = norm_eps
        self.norm_momentum = norm_momentum
        self.fc1 = nn.Linear(channels, hidden, bias=use_bias)
        self.norm = nn.BatchNorm1d(hidden, eps=norm_eps, momentum=norm_momentum)
        self.fc2 = nn.Linear(hidden, channels, bias=use_bias)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C 1 1"]:
        check_channels("ChannelGate", x.shape, self.channels)
        g = self.fc2(F.relu(self.norm(self.fc1(x.mean((2, 3))))))
        return g[:, :, None, None]


class SpatialGate(nn.Module):
    """BAM's spatial gate, before the sigmoid.

        s = conv4(h₃),  hᵢ = ReLU(normᵢ(convᵢ(hᵢ₋₁))),  h₀ = x

    conv1 1×1 C → C // ratio; conv2, conv3 3×3, dilated; conv4 1×1 to one channel.
    Arguments as in `BAM`.
    """

    def __init__(
        self,
        channels: int,
        *,
        ratio: float = 16,
        dilation: int = 4,
        use_bias: bool = True,
        norm_eps: float = 1e-5,
        norm_momentum: float | None = 0.1,
    ):
        super().__init__()
        if dilation < 1:
            raise ValueError(f"dilation must be positive, got {dilation}")
        hidden = hidden_channels(channels, ratio)
        self.channels = channels
        self.ratio = ratio
        self.dilation = dilation
        self.use_bias = use_bias
        self.norm_eps = norm_eps
        self.norm_momentum = norm_momentum
        wide = {"kernel_size": 3, "padding": dilation, "dilation": dilation, "bias": use_bias}
        norm = {"eps": norm_eps, "momentum": norm_momentum}
        self.conv1 = nn.Conv2d(channels, hidden, 1, bias=use_bias)
        self.norm1 = nn.BatchNorm2d(hidden, **norm)
        self.conv2 = nn.Conv2d(hidden, hidden, **wide)
        self.norm2 = nn.BatchNorm2d(hidden, **norm)
        self.conv3 = nn.Conv2d(hidden, hidden, **wide)
        self.norm3 = nn.BatchNorm2d(hidden, **norm)
        self.conv4 = nn.Conv2d(hidden, 1, 1, bias=use_bias)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 1 H W"]:
        check_channels("SpatialGate", x.shape, self.channels)
        s = F.relu(self.norm1(self.conv1(x)))
        s = F.relu(self.norm2(self.conv2(s)))
        s = F.relu(self.norm3(self.conv3(s)))
        return self.conv4(s)


class BAM(nn.Module):
    """Bottleneck Attention Module.

        y = x · (1 + σ(channel_attention(x) ∘ spatial_attention(x)))

    where ∘ is the product in the authors' code ("reference") and the sum in the paper ("paper").

    Args:
        channels: C, the channels of the input and of the output.
        ratio: both bottlenecks have `int(channels / ratio)` channels.
        dilation: of the two 3×3 convolutions.
        combine: "product" or "sum".
        use_bias: of the linear layers and the convolutions.
        norm_eps, norm_momentum: of the four norms.

    Shapes: (B, C, H, W) → (B, C, H, W), any B, H and W; training wants B ≥ 2.

    Raises:
        ValueError: the ratio leaves no channel; an unknown option; an input of other channels.

    Source: arXiv 1807.06514, section 3, and Jongchan/attention-module.
    """

    def __init__(
        self,
        channels: int,
        *,
        ratio: float = 16,
        dilation: int = 4,
        combine: Literal["product", "sum"] = "product",
        use_bias: bool = True,
        norm_eps: float = 1e-5,
        norm_momentum: float | None = 0.1,
    ):
        super().__init__()
        check_choice("combine", combine, ("product", "sum"))
        self.channels = channels
        self.ratio = ratio
        self.dilation = dilation
        self.combine = combine
        self.use_bias = use_bias
        self.norm_eps = norm_eps
        self.norm_momentum = norm_momentum
        shared = {
            "ratio": ratio,
            "use_bias": use_bias,
            "norm_eps": norm_eps,
            "norm_momentum": norm_momentum,
        }
        self.channel_attention = ChannelGate(channels, **shared)
        self.spatial_attention = SpatialGate(channels, dilation=dilation, **shared)

    @classmethod
    def from_variant(cls, variant: str, channels: int, **overrides: Any) -> BAM:
        """The block of a named source, see above; `overrides` are constructor arguments."""
        return cls(channels, **variant_options(BAM_VARIANTS, variant, overrides))

    def gate(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """Both gates as one, in (0, 1): what is added to 1, and multiplied with `x`."""
        check_channels("BAM", x.shape, self.channels)
        channel, spatial = self.channel_attention(x), self.spatial_attention(x)
        both = channel * spatial if self.combine == "product" else channel + spatial
        return torch.sigmoid(both)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return x * (1 + self.gate(x))
