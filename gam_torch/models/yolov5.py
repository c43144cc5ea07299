"""YOLOv5, releases 5 to 7, with attention lines in its YAML; keys as in its checkpoints.

The architecture is written from its description and its YAML files; no code of the original is
here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gam_torch.attention.common import check_choice
from gam_torch.attention.registry import create_attention, list_attentions
from gam_torch.models.yolov5_config import LayerPlan, insert_attention, plan, read_config

BOX = 5
"""Numbers of a box beside its classes: x, y, width, height, objectness."""


class Conv(nn.Module):
    """SiLU(bn(conv(x))), without bias; padded by `kernel_size // 2` where nothing else is said."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
    ):
        super().__init__()
        padding = kernel_size // 2 if padding is None else padding
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, groups=groups, bias=False
        )
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        return F.silu(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    """cv2(cv1(x)), 1×1 to `expansion` times the channels and 3×3; plus x where that fits."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        shortcut: bool = True,
        groups: int = 1,
        expansion: float = 0.5,
    ):
        super().__init__()
        hidden = int(out_channels * expansion)
        self.cv1 = Conv(in_channels, hidden, 1)
        self.cv2 = Conv(hidden, out_channels, 3, groups=groups)
        self.residual = shortcut and in_channels == out_channels

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D H W"]:
        y = self.cv2(self.cv1(x))
        return x + y if self.residual else y


class C3(nn.Module):
    """cv3 of [m(cv1(x)), cv2(x)]: m are `repeats` bottlenecks, the other half passes by."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        repeats: int = 1,
        shortcut: bool = True,
        groups: int = 1,
        expansion: float = 0.5,
    ):
        super().__init__()
        hidden = int(out_channels * expansion)
        self.cv1 = Conv(in_channels, hidden, 1)
        self.cv2 = Conv(in_channels, hidden, 1)
        self.cv3 = Conv(2 * hidden, out_channels, 1)
        inner = [Bottleneck(hidden, hidden, shortcut, groups, 1.0) for _ in range(repeats)]
        self.m = nn.Sequential(*inner)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D H W"]:
        return self.cv3(torch.cat([self.m(self.cv1(x)), self.cv2(x)], 1))


class SPP(nn.Module):
    """cv2 of [y, maxima of y over windows of `kernel_sizes`], y = cv1(x) with half the channels."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_sizes: Sequence[int] = (5, 9, 13)
    ):
        super().__init__()
        self.kernel_sizes = tuple(kernel_sizes)
        hidden = in_channels // 2
        self.cv1 = Conv(in_channels, hidden, 1)
        self.cv2 = Conv(hidden * (len(self.kernel_sizes) + 1), out_channels, 1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D H W"]:
        y = self.cv1(x)
        return self.cv2(
            torch.cat([y, *(F.max_pool2d(y, k, 1, k // 2) for k in self.kernel_sizes)], 1)
        )


class SPPF(nn.Module):
    """SPP of windows k, 2k − 1 and 3k − 2 as three maxima of k in turn, which is the same."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 5):
        super().__init__()
        self.kernel_size = kernel_size
        hidden = in_channels // 2
        self.cv1 = Conv(in_channels, hidden, 1)
        self.cv2 = Conv(hidden * 4, out_channels, 1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D H W"]:
        found = [self.cv1(x)]
        for _ in range(3):
            found.append(F.max_pool2d(found[-1], self.kernel_size, 1, self.kernel_size // 2))
        return self.cv2(torch.cat(found, 1))


class Focus(nn.Module):
    """conv of the four pixels of each 2×2 square as channels: (0, 0), (1, 0), (0, 1), (1, 1)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
    ):
        super().__init__()
        self.conv = Conv(4 * in_channels, out_channels, kernel_size, stride, padding, groups)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        squares = [x[..., i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.conv(torch.cat(squares, 1))


class Upsample(nn.Module):
    """Each pixel twice along both axes."""

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C h w"]:
        return F.interpolate(x, scale_factor=2, mode="nearest")


class Concat(nn.Module):
    """The channels of all inputs, one after the other."""

    def forward(self, inputs: Sequence[Float[Tensor, "B _ H W"]]) -> Float[Tensor, "B C H W"]:
        return torch.cat(list(inputs), 1)


class Detect(nn.Module):
    """A 1×1 convolution a level, and what its numbers mean.

    Args:
        in_channels: of each level.
        num_classes: K.
        anchors: of each level, widths and heights by turns, in pixels.
        strides: of each level: pixels between two cells.

    Shapes: L times (B, C, h, w) → L times (B, A, h, w, 5 + K), not yet squashed.
    """

    anchors: Tensor

    def __init__(
        self,
        in_channels: Sequence[int],
        *,
        num_classes: int,
        anchors: Sequence[Sequence[float]],
        strides: Sequence[int],
    ):
        super().__init__()
        if not len(in_channels) == len(anchors) == len(strides):
            raise ValueError(f"anchors of {len(anchors)} levels, inputs of {len(in_channels)}")
        self.num_classes = num_classes
        self.strides = tuple(strides)
        sizes = torch.tensor(anchors, dtype=torch.get_default_dtype())
        sizes = sizes.reshape(len(anchors), -1, 2)
        self.register_buffer("anchors", sizes / torch.tensor(strides)[:, None, None])
        width = sizes.shape[1] * (BOX + num_classes)
        convs: list[Any] = [nn.Conv2d(channels, width, 1) for channels in in_channels]
        self.m = nn.ModuleList(convs)
        for layer, stride in zip(convs, strides, strict=True):
            layer.bias = nn.Parameter(self._expecting_few(layer.bias.detach(), stride))

    def _expecting_few(self, bias: Tensor, stride: int) -> Tensor:
        """As if 8 of a 640 × 640 picture's cells held something, and each class were as likely."""
        each = bias.reshape(-1, BOX + self.num_classes).clone()
        each[:, 4] += math.log(8 / (640 / stride) ** 2)
        each[:, BOX:] += math.log(0.6 / (self.num_classes - 0.99999))
        return each.reshape(-1)

    def forward(self, inputs: Sequence[Float[Tensor, "B _ _ _"]]) -> tuple[Tensor, ...]:
        found = []
        for x, layer in zip(inputs, self.m, strict=True):
            y = layer(x)
            y = y.reshape(y.shape[0], -1, BOX + self.num_classes, *y.shape[2:])
            found.append(y.permute(0, 1, 3, 4, 2).contiguous())
        return tuple(found)

    def decode(self, outputs: Sequence[Float[Tensor, "B A _ _ D"]]) -> Float[Tensor, "B N D"]:
        """Boxes in pixels of the picture: x, y of the middle, width, height, then the objectness
        and the classes' probabilities; by level, anchor, row and column.

            xy = (2σ − 0.5 + cell) · stride,      wh = (2σ)² · anchor · stride
        """
        found = []
        for y, anchors, stride in zip(outputs, self.anchors, self.strides, strict=True):
            y = y.to(torch.promote_types(y.dtype, torch.float32))  # half has no 1/8 pixel at 300
            high, wide = y.shape[2:4]
            rows, columns = torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij")
            cells = torch.stack([columns, rows], -1).to(y) - 0.5
            s = torch.sigmoid(y)
            xy = (2 * s[..., :2] + cells) * stride
            wh = (2 * s[..., 2:4]) ** 2 * (anchors[:, None, None] * stride)
            found.append(torch.cat([xy, wh, s[..., 4:]], -1).reshape(y.shape[0], -1, y.shape[-1]))
        return torch.cat(found, 1)


class YOLOv5(nn.Module):
    """A YOLOv5 as its YAML describes it; layer i is `model.i`.

    Args:
        config: "yolov5n", "…s", "…m", "…l" or "…x", the path of a YAML file, or what one holds;
            see `yolov5_config`. Kept as what it says, whole.
        in_channels: channels of the picture.
        num_classes: K; None for what `config` says.
        attention: a name of `list_attentions()`: puts a block of it into the configuration.
        attention_options: arguments of each block whose line has none of its own. But for what
            these or the line say, GAM is "grouped", as YOLO forks have it, and norms are as below.
        attention_at: the layers before which these blocks stand; None for SPPF.
        norm_eps: of every norm, attention's too; 1e-3 as in YOLOv5.
        norm_momentum: of every norm: the weight of the new value.

    Shapes: (B, in_channels, H, W), multiples of 32 → for each of L levels of stride 8, 16 and 32
    (B, A, h, w, 5 + K), which `decode` makes boxes of.

    Raises:
        ValueError: the configuration is not understood; a line's index is named.
    """

    def __init__(
        self,
        config: str | os.PathLike | Mapping[str, Any] = "yolov5s",
        *,
        in_channels: int = 3,
        num_classes: int | None = None,
        attention: str | None = None,
        attention_options: Mapping[str, Any] | None = None,
        attention_at: Sequence[int] | None = None,
        norm_eps: float = 1e-3,
        norm_momentum: float = 0.03,
    ):
        super().__init__()
        read = read_config(config)
        if num_classes is not None:
            if num_classes < 1:
                raise ValueError(f"num_classes must be 1 or more, got {num_classes}")
            read["nc"] = num_classes
        if attention is not None:
            check_choice("attention", attention, list_attentions())
            read = insert_attention(read, attention.upper(), attention_at)
        self.config = read
        self.in_channels = in_channels
        self.num_classes = read["nc"]
        self.attention = self.attention_at = None  # they are in the configuration now
        self.attention_options = dict(attention_options or {})
        self.norm_eps = norm_eps
        self.norm_momentum = norm_momentum

        layers, self.notices = plan(read, in_channels)
        self.sources = tuple(layer.sources for layer in layers)
        strides = [layers[j].stride for j in self.sources[-1]]
        self.model = nn.Sequential(*(self._built(layer, strides) for layer in layers))
        for module in self.modules():
            if isinstance(module, Conv):
                module.bn.eps, module.bn.momentum = norm_eps, norm_momentum

    def _built(self, layer: LayerPlan, strides: Sequence[int]) -> nn.Module:
        try:
            if layer.kind == "Detect":
                return Detect(layer.in_channels, **layer.arguments, strides=strides)
            if layer.kind in list_attentions():
                return self._attention(layer)
            make = MODULES[layer.kind]
            if layer.kind in ("nn.Upsample", "Concat"):
                return make()
            channels = (layer.in_channels[0], layer.out_channels)
            if layer.kind == "C3":
                return make(*channels, layer.repeats, **layer.arguments)
            made = [make(*channels, **layer.arguments) for _ in range(layer.repeats)]
            return made[0] if layer.repeats == 1 else nn.Sequential(*made)
        except (TypeError, ValueError) as error:
            raise ValueError(f"layer {layer.index}, {layer.kind}: {error}") from error

    def _attention(self, layer: LayerPlan) -> nn.Module:
        usual: dict[str, Any] = {"variant": "grouped"} if layer.kind == "gam" else {}
        if layer.kind != "se":  # which has no norm
            usual |= {"norm_eps": self.norm_eps, "norm_momentum": self.norm_momentum}
        options = {**usual, **(layer.arguments or self.attention_options)}
        return create_attention(layer.kind, layer.in_channels[0], **options)

    @property
    def detect(self) -> Detect:
        """The last layer."""
        return cast(Detect, self.model[-1])

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels between two cells, of each level."""
        return self.detect.strides

    def forward(self, x: Float[Tensor, "B C H W"]) -> tuple[Tensor, ...]:
        kept: list[Any] = [x]
        for layer, sources in zip(self.model, self.sources, strict=True):
            inputs = [kept[j + 1] for j in sources]
            several = isinstance(layer, Concat | Detect)
            kept.append(layer(inputs if several else inputs[0]))
        return kept[-1]

    def decode(self, outputs: Sequence[Float[Tensor, "B A _ _ D"]]) -> Float[Tensor, "B N D"]:
        """The boxes, see `Detect.decode`."""
        return self.detect.decode(outputs)


MODULES: dict[str, Any] = {
    "nn.Upsample": Upsample,
    **{made.__name__: made for made in (Conv, Bottleneck, C3, SPP, SPPF, Focus, Concat)},
}
"""`LayerPlan.kind` → class, of what is built from channels and arguments alone."""
