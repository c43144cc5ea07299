"""Residual networks, arXiv 1512.03385, with an attention block in them; torchvision's key names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gam_torch.attention.common import check_choice
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


def _conv(in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """A convolution without bias, padded by `kernel_size // 2` on both sides."""
    return nn.Conv2d(
        in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=False
    )


class PadShortcut(nn.Module):
    """The shortcut without weights, "option A": every second pixel, zero channels added."""

    def __init__(self, stride: int, extra: int):
        super().__init__()
        self.stride = stride
        self.extra = extra

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        before = self.extra // 2
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, before, self.extra - before))


def _shortcut(kind: str, in_channels: int, out_channels: int, stride: int) -> nn.Module | None:
    """What brings a block's input to its output's shape; None where it has that shape."""
    if stride == 1 and in_channels == out_channels:
        return None
    if kind == "pad":
        return PadShortcut(stride, out_channels - in_channels)
    return nn.Sequential(_conv(in_channels, out_channels, 1, stride), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """ReLU(attention(bn2(conv2(ReLU(bn1(conv1(x)))))) + shortcut(x)), both convolutions 3×3."""

    expansion = 1

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int = 1,
        shortcut_kind: str = "projection",
        attend: Attend = attends_not,
    ):
        super().__init__()
        self.conv1 = _conv(in_channels, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.attention = attend(width)
        self.downsample = _shortcut(shortcut_kind, in_channels, width, stride)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.attention is not None:
            y = self.attention(y)
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """1×1, 3×3 (with the stride, as torchvision), 1×1 to four times the width."""

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int = 1,
        shortcut_kind: str = "projection",
        attend: Attend = attends_not,
    ):
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = _conv(in_channels, width, 1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv(width, width, 3, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = _conv(width, out_channels, 1)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.attention = attend(out_channels)
        self.downsample = _shortcut(shortcut_kind, in_channels, out_channels, stride)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.attention is not None:
            y = self.attention(y)
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


BLOCKS: dict[str, type[BasicBlock] | type[Bottleneck]] = {
    "basic": BasicBlock,
    "bottleneck": Bottleneck,
}


class ResNet(nn.Module):
    """A residual network: stem, stages `layer1` … `layerN`, global average, `fc`.

    Stage i has `layers[i]` blocks of `widths[i]`; each stage but the first halves the picture.

    Args:
        layers: blocks in each stage.
        block: "basic" or "bottleneck".
        widths: of each stage, before the bottleneck's expansion by 4.
        stem: "imagenet" (7×7 stride 2, then 3×3 max-pooling stride 2) or "cifar" (3×3 stride 1).
        shortcut: where the shape changes, "projection" (1×1 convolution and norm) or "pad"
            (no weights, as the CIFAR networks of the paper).
        in_channels: channels of the picture.
        num_classes: outputs of `fc`; 0 for none, the network then returns what `fc` would see.
        attention: a name of `list_attentions()`, a factory called with the channels, or None.
        attention_options: arguments of each block; GAM is the paper's (sigmoid on both gates,
            ratio 16) but for these.
        attention_at: "blocks" (before the residual addition of every block, as the papers of
            GAM, CBAM and SE do) or the stages, counted from 1, that a block follows.
        identity_start: the blocks begin as nearly the identity, see `start_as_identity`.

    Shapes: (B, in_channels, H, W) → (B, num_classes).

    Raises:
        ValueError: lengths that differ, an unknown option, a stage that does not exist.
    """

    def __init__(
        self,
        layers: Sequence[int],
        *,
        block: Literal["basic", "bottleneck"] = "basic",
        widths: Sequence[int] = (64, 128, 256, 512),
        stem: Literal["imagenet", "cifar"] = "imagenet",
        shortcut: Literal["projection", "pad"] = "projection",
        in_channels: int = 3,
        num_classes: int = 1000,
        attention: Attention = None,
        attention_options: Mapping[str, Any] | None = None,
        attention_at: AttentionAt = "blocks",
        identity_start: bool = False,
    ):
        super().__init__()
        check_choice("block", block, BLOCKS)
        check_choice("stem", stem, ("imagenet", "cifar"))
        check_choice("shortcut", shortcut, ("projection", "pad"))
        if len(layers) != len(widths):
            raise ValueError(f"{len(layers)} stages in layers, {len(widths)} in widths")
        check_classes(num_classes)
        after = stages_with_attention(attention_at, len(layers))
        self.layers = tuple(layers)
        self.block = block
        self.widths = tuple(widths)
        self.stem = stem
        self.shortcut = shortcut
        self.in_channels = in_channels
        self.num_classes = num_classes
        self.attention = attention
        self.attention_options = dict(attention_options or {})
        self.attention_at = attention_at if attention_at == "blocks" else after
        self.identity_start = identity_start

        kernel_size, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = _conv(in_channels, widths[0], kernel_size, stride)
        self.bn1 = nn.BatchNorm2d(widths[0])
        channels = widths[0]
        attend = attends(attention, attention_options, identity_start=identity_start)
        for stage, (count, width) in enumerate(zip(layers, widths, strict=True), 1):
            blocks = []
            for i in range(count):
                made = BLOCKS[block](
                    channels,
                    width,
                    stride=2 if stage > 1 and i == 0 else 1,
                    shortcut_kind=shortcut,
                    attend=attend if attention_at == "blocks" else attends_not,
                )
                blocks.append(made)
                channels = width * made.expansion
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            if stage in after:
                self.add_module(f"attention{stage}", attend(channels))
        self.reset_classifier(num_classes)

    @property
    def stages(self) -> list[Stage]:
        """What `stage_outputs` returns, for those who build on it."""
        stem, expansion = 4 if self.stem == "imagenet" else 1, BLOCKS[self.block].expansion
        return [Stage(width * expansion, stem * 2**i) for i, width in enumerate(self.widths)]

    def reset_classifier(self, num_classes: int) -> None:
        """A new `fc` of so many classes; none for 0. Any module of (B, C) may stand there."""
        check_classes(num_classes)
        self.num_classes = num_classes
        self.fc = nn.Linear(self.stages[-1].channels, num_classes) if num_classes else None

    def stage_outputs(self, x: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """The output of each stage, its attention block included; sizes as `stages` has them."""
        x = F.relu(self.bn1(self.conv1(x)))
        if self.stem == "imagenet":
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        outputs = []
        for stage in range(1, len(self.layers) + 1):
            x = getattr(self, f"layer{stage}")(x)
            attention = getattr(self, f"attention{stage}", None)
            if attention is not None:
                x = attention(x)
            outputs.append(x)
        return outputs

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        x = torch.mean(self.stage_outputs(x)[-1], (2, 3))
        return x if self.fc is None else self.fc(x)
