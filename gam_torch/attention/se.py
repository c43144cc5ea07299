"""Squeeze-and-Excitation, arXiv 1709.01507."""

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
    hidden_channels,
    variant_options,
)
from gam_torch.attention.variants import SE_VARIANTS

GATES = {"sigmoid": torch.sigmoid, "hard_sigmoid": F.hardsigmoid}


class SqueezeExcitation(nn.Module):
    """One gate a channel, from the global average.

        y = x · σ(fc2(ReLU(fc1(mean_HW(x)))))        C → C // ratio → C

    | variant      | weights             | gate         | found in                            |
    |--------------|---------------------|--------------|-------------------------------------|
    | reference    | linear, no bias     | sigmoid      | moskomule/senet.pytorch             |
    | torchvision  | 1×1 conv, with bias | sigmoid      | torchvision (EfficientNet), timm    |
    | mobilenet_v3 | 1×1 conv, with bias | hard sigmoid | torchvision MobileNetV3             |

    Args:
        channels: C, the channels of the input and of the output.
        ratio: the bottleneck has `int(channels / ratio)` channels.
        projection: how the weights are stored, "linear" (out, in) or "conv" (out, in, 1, 1).
        use_bias: whether both layers have biases.
        gate: "sigmoid", or "hard_sigmoid" = clip(x / 6 + 1 / 2, 0, 1).

    Shapes: (B, C, H, W) → (B, C, H, W), any B, H and W.

    Raises:
        ValueError: the ratio leaves no channel; an unknown option; an input of other channels.

    Source: arXiv 1709.01507, section 3.
    """

    def __init__(
        self,
        channels: int,
        *,
        ratio: float = 16,
        projection: Literal["linear", "conv"] = "linear",
        use_bias: bool = False,
        gate: Literal["sigmoid", "hard_sigmoid"] = "sigmoid",
    ):
        super().__init__()
        check_choice("projection", projection, PROJECTIONS)
        check_choice("gate", gate, GATES)
        hidden = hidden_channels(channels, ratio)
        self.channels = channels
        self.ratio = ratio
        self.projection = projection
        self.use_bias = use_bias
        self.gate = gate
        self.fc1 = PROJECTIONS[projection](channels, hidden, bias=use_bias)
        self.fc2 = PROJECTIONS[projection](hidden, channels, bias=use_bias)

    @classmethod
    def from_variant(cls, variant: str, channels: int, **overrides: Any) -> SqueezeExcitation:
        """The block of a named source, see above; `overrides` are constructor arguments."""
        return cls(channels, **variant_options(SE_VARIANTS, variant, overrides))

    def channel_attention(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C 1 1"]:
        """The gate itself, in [0, 1], to be multiplied with `x`."""
        check_channels("SqueezeExcitation", x.shape, self.channels)
        gate = GATES[self.gate](self.fc2(F.relu(self.fc1(x.mean((2, 3))))))
        return gate[:, :, None, None]

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        return x * self.channel_attention(x)
