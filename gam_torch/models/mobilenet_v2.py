"""MobileNetV2, arXiv 1801.04381, with an attention block in it; torchvision's key names."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gam_torch.models.common import (
    Attend,
    Attention,
    AttentionAt,
    Stage,
    attends,
    attends_not,
    check_classes,
    stages_with_attention,
)

STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
"""(expansion, channels, blocks, stride of the first block) of each stage: the paper's table 2."""


def round_channels(channels: float, divisor: int = 8) -> int:
    """The nearest multiple of `divisor`, but never less than nine tenths of `channels`."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * channels else rounded + divisor


class ConvNormReLU6(nn.Sequential):
    """ReLU6(norm(conv(x))), padded by `kernel_size // 2` on both sides, without bias."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
    ):
        padding = kernel_size // 2
        super().__init__(
            nn.Conv2d(
                in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False
            ),
            nn.BatchNorm2d(out_channels),
        )

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        return F.relu6(super().forward(x))


class InvertedResidual(nn.Module):
    """attention(norm(project(depthwise(expand(x))))), plus x where the shape has not changed.

    expand 1×1 to `expansion` times the channels (absent where that is 1), depthwise 3×3 with the
    stride, project 1×1 without activation.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expansion: int,
        stride: int = 1,
        attend: Attend = attends_not,
    ):
        super().__init__()
        hidden = in_channels * expansion
        self.conv = nn.Sequential(
            *([] if expansion == 1 else [ConvNormReLU6(in_channels, hidden, 1)]),
            ConvNormReLU6(hidden, hidden, 3, stride=stride, groups=hidden),
            nn.Conv2d(hidden, out_channels, 1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.attention = attend(out_channels)
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        y = self.conv(x)
        if self.attention is not None:
            y = self.attention(y)
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """MobileNetV2: `features.0` … `features.18`, global average, dropout, `classifier.1`.

    Seven stages of inverted residuals lie between a 3×3 convolution of stride 2 and a 1×1
    convolution to 1280 channels.

    Args:
        width_mult: the channels of every layer are multiplied by this and rounded to multiples of
            eight; the last 1280 only where it is above 1.
        dropout: probability, before the last layer, in training.
        in_channels: channels of the picture.
        num_classes: outputs of `classifier.1`; 0 for none, the network then returns what the
            classifier would see.
        attention: a name of `list_attentions()`, a factory called with the channels, or None.
        attention_options: arguments of each block; GAM is the paper's (sigmoid on both gates,
            ratio 16) but for these.
        attention_at: "blocks" (at the end of every inverted residual, before the addition where
            there is one) or the stages, counted from 1, that a block follows.
        identity_start: the blocks begin as nearly the identity, see `start_as_identity`.

    Shapes: (B, in_channels, H, W) → (B, num_classes).

    Raises:
        ValueError: a stage that does not exist, or what an attention block raises.
    """

    def __init__(
        self,
        *,
        width_mult: float = 1.0,
        dropout: float = 0.2,
        in_channels: int = 3,
        num_classes: int = 1000,
        attention: Attention = None,
        attention_options: Mapping[str, Any] | None = None,
        attention_at: AttentionAt = "blocks",
        identity_start: bool = False,
    ):
        super().__init__()
        check_classes(num_classes)
        after = stages_with_attention(attention_at, len(STAGES))
        self.width_mult = width_mult
        self.dropout = dropout
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.attention = attention
        self.attention_options = dict(attention_options or {})
        self.attention_at = attention_at if attention_at == "blocks" else after
        self.identity_start = identity_start

        attend = attends(attention, attention_options, identity_start=identity_start)
        channels = round_channels(32 * width_mult)
        layers: list[nn.Module] = [ConvNormReLU6(in_channels, channels, 3, stride=2)]
        for stage, (expansion, _, count, stride) in enumerate(STAGES, 1):
            width = self.stages[stage - 1].channels
            for i in range(count):
                made = InvertedResidual(
                    channels,
                    width,
                    expansion=expansion,
                    stride=stride if i == 0 else 1,
                    attend=attend if attention_at == "blocks" else attends_not,
                )
                layers.append(made)
                channels = width
            if stage in after:
                self.add_module(f"attention{stage}", attend(channels))
        self.last_channels = round_channels(1280 * max(1.0, width_mult))
        self.features = nn.Sequential(*layers, ConvNormReLU6(channels, self.last_channels, 1))
        self.reset_classifier(num_classes)

    @property
    def stages(self) -> list[Stage]:
        """What `stage_outputs` returns, for those who build on it."""
        found, stride = [], 2
        for _, channels, _, step in STAGES:
            stride *= step
            found.append(Stage(round_channels(channels * self.width_mult), stride))
        return found

    def reset_classifier(self, num_classes: int) -> None:
        """A new `classifier` of so many classes; none for 0. Any module of (B, C) may stand
        there."""
        check_classes(num_classes)
        self.num_classes = num_classes
        self.classifier = None
        if num_classes:
            linear = nn.Linear(self.last_channels, num_classes)
            self.classifier = nn.Sequential(nn.Dropout(self.dropout), linear)

    def stage_outputs(self, x: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """The output of each stage, its attention block included; sizes as `stages` has them."""
        x = self.features[0](x)
        outputs = []
        for stage, (first, last) in enumerate(pairwise(_first_layers()), 1):
            for i in range(first, last):
                x = self.features[i](x)
            attention = getattr(self, f"attention{stage}", None)
            if attention is not None:
                x = attention(x)
            outputs.append(x)
        return outputs

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        x = torch.mean(self.features[-1](self.stage_outputs(x)[-1]), (2, 3))
        return x if self.classifier is None else self.classifier(x)


def _first_layers() -> list[int]:
    """The index in `features` of each stage's first block, and of the layer after the last."""
    first = [1]
    for _, _, count, _ in STAGES:
        first.append(first[-1] + count)
    return first
