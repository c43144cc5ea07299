"""YOLOv5, releases 5 to 7, with attention lines in its YAML; keys as in its checkpoints.

The architecture is written from its description and its YAML files; no code of the original is
here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import freeze
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gam_flax.attention.common import check_choice
from gam_flax.attention.registry import create_attention, list_attentions
from gam_flax.models.yolov5_config import LayerPlan, insert_attention, plan, read_config
from gam_flax.ops.batch_norm import BatchNorm
from gam_flax.ops.conv import conv2d, max_pool2d
from gam_flax.ops.sequential import Sequential, run_layers

BOX = 5
"""Numbers of a box beside its classes: x, y, width, height, objectness."""


class Conv(nnx.Module):
    """SiLU(bn(conv(x))), without bias; padded by `kernel_size // 2` where nothing else is said."""

    NORMS: ClassVar[dict[str, str]] = {"conv": "bn"}

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        **types: Any,
    ):
        padding = kernel_size // 2 if padding is None else padding
        self.conv = conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            groups=groups,
            use_bias=False,
            **types,
        )
        self.bn = BatchNorm(out_channels, **types)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        return jax.nn.silu(self.bn(self.conv(x)))


class Bottleneck(nnx.Module):
    """cv2(cv1(x)), 1×1 to `expansion` times the channels and 3×3; plus x where that fits."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        shortcut: bool = True,
        groups: int = 1,
        expansion: float = 0.5,
        **types: Any,
    ):
        hidden = int(out_channels * expansion)
        self.cv1 = Conv(in_channels, hidden, 1, **types)
        self.cv2 = Conv(hidden, out_channels, 3, groups=groups, **types)
        self.residual = shortcut and in_channels == out_channels

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        y = self.cv2(self.cv1(x))
        return x + y if self.residual else y


class C3(nnx.Module):
    """cv3 of [m(cv1(x)), cv2(x)]: m are `repeats` bottlenecks, the other half passes by."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        repeats: int = 1,
        shortcut: bool = True,
        groups: int = 1,
        expansion: float = 0.5,
        **types: Any,
    ):
        hidden = int(out_channels * expansion)
        self.cv1 = Conv(in_channels, hidden, 1, **types)
        self.cv2 = Conv(in_channels, hidden, 1, **types)
        self.cv3 = Conv(2 * hidden, out_channels, 1, **types)
        inner = [Bottleneck(hidden, hidden, shortcut, groups, 1.0, **types) for _ in range(repeats)]
        self.m = Sequential(inner)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        return self.cv3(jnp.concatenate([self.m(self.cv1(x)), self.cv2(x)], -1))


class SPP(nnx.Module):
    """cv2 of [y, maxima of y over windows of `kernel_sizes`], y = cv1(x) with half the channels."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_sizes: Sequence[int] = (5, 9, 13),
        **types: Any,
    ):
        self.kernel_sizes = tuple(kernel_sizes)
        hidden = in_channels // 2
        self.cv1 = Conv(in_channels, hidden, 1, **types)
        self.cv2 = Conv(hidden * (len(self.kernel_sizes) + 1), out_channels, 1, **types)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        y = self.cv1(x)
        pooled = (max_pool2d(y, k, stride=1, padding=k // 2) for k in self.kernel_sizes)
        return self.cv2(jnp.concatenate([y, *pooled], -1))


class SPPF(nnx.Module):
    """SPP of windows k, 2k − 1 and 3k − 2 as three maxima of k in turn, which is the same."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 5, **types: Any):
        self.kernel_size = kernel_size
        hidden = in_channels // 2
        self.cv1 = Conv(in_channels, hidden, 1, **types)
        self.cv2 = Conv(hidden * 4, out_channels, 1, **types)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        found = [self.cv1(x)]
        for _ in range(3):
            k = self.kernel_size
            found.append(max_pool2d(found[-1], k, stride=1, padding=k // 2))
        return self.cv2(jnp.concatenate(found, -1))


class Focus(nnx.Module):
    """conv of the four pixels of each 2×2 square as channels: (0, 0), (1, 0), (0, 1), (1, 1)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        **types: Any,
    ):
        self.conv = Conv(
            4 * in_channels, out_channels, kernel_size, stride, padding, groups, **types
        )

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        squares = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.conv(jnp.concatenate(squares, -1))


class Upsample(nnx.Module):
    """Each pixel twice along both axes."""

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)


class Concat(nnx.Module):
    """The channels of all inputs, one after the other."""

    def __call__(self, inputs: Sequence[Float[Array, "B H W _"]]) -> Float[Array, "B H W C"]:
        return jnp.concatenate(list(inputs), -1)


class _Anchors(nnx.Variable):
    """Sizes of boxes to begin from: no parameter, but part of the weights, as in torch."""


class Detect(nnx.Module):
    """A 1×1 convolution a level, and what its numbers mean.

    Args:
        in_channels: of each level.
        num_classes: K.
        anchors: of each level, widths and heights by turns, in pixels.
        strides: of each level: pixels between two cells.

    Shapes: L times (B, h, w, C) → L times (B, A, h, w, 5 + K), not yet squashed: axes as torch
    has them, for there is no channel among them.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        *,
        num_classes: int,
        anchors: Sequence[Sequence[float]],
        strides: Sequence[int],
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if not len(in_channels) == len(anchors) == len(strides):
            raise ValueError(f"anchors of {len(anchors)} levels, inputs of {len(in_channels)}")
        self.num_classes = num_classes
        self.strides = tuple(strides)
        sizes = jnp.asarray(anchors, param_dtype).reshape(len(anchors), -1, 2)
        self.anchors = _Anchors(sizes / jnp.asarray(strides, param_dtype)[:, None, None])
        width = sizes.shape[1] * (BOX + num_classes)
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.m = Sequential([conv2d(channels, width, 1, **types) for channels in in_channels])
        for layer, stride in zip(self.m, strides, strict=True):
            layer.bias.set_value(self._expecting_few(layer.bias[...], stride))

    def _expecting_few(self, bias: Array, stride: int) -> Array:
        """As if 8 of a 640 × 640 picture's cells held something, and each class were as likely."""
        each = bias.reshape(-1, BOX + self.num_classes)
        each = each.at[:, 4].add(math.log(8 / (640 / stride) ** 2))
        each = each.at[:, BOX:].add(math.log(0.6 / (self.num_classes - 0.99999)))
        return each.reshape(-1)

    def __call__(self, inputs: Sequence[Float[Array, "B _ _ _"]]) -> tuple[Array, ...]:
        found = []
        for x, layer in zip(inputs, self.m, strict=True):
            y = layer(x)
            y = y.reshape(*y.shape[:3], -1, BOX + self.num_classes)
            found.append(y.transpose(0, 3, 1, 2, 4))
        return tuple(found)

    def decode(self, outputs: Sequence[Float[Array, "B A _ _ D"]]) -> Float[Array, "B N D"]:
        """Boxes in pixels of the picture: x, y of the middle, width, height, then the objectness
        and the classes' probabilities; by level, anchor, row and column.

            xy = (2σ − 0.5 + cell) · stride,      wh = (2σ)² · anchor · stride
        """
        found = []
        for y, anchors, stride in zip(outputs, self.anchors[...], self.strides, strict=True):
            y = y.astype(jnp.promote_types(y.dtype, jnp.float32))  # half has no 1/8 pixel at 300
            high, wide = y.shape[2:4]
            rows, columns = jnp.meshgrid(jnp.arange(high), jnp.arange(wide), indexing="ij")
            cells = jnp.stack([columns, rows], -1).astype(y.dtype) - 0.5
            s = jax.nn.sigmoid(y)
            xy = (2 * s[..., :2] + cells) * stride
            wh = (2 * s[..., 2:4]) ** 2 * (anchors[:, None, None] * stride)
            boxes = jnp.concatenate([xy, wh, s[..., 4:]], -1)
            found.append(boxes.reshape(y.shape[0], -1, y.shape[-1]))
        return jnp.concatenate(found, 1)


class YOLOv5(nnx.Module):
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
        remat: in the backward pass compute each layer once more instead of keeping what is inside
            it: less memory, more time.
        dtype: of the computation; None for the wider of the input's and the parameters' type.
        param_dtype: of the parameters.
        rngs: draws the parameters, as Flax does by default, see `torch_default_init`.

    Shapes: (B, H, W, in_channels), multiples of 32 → for each of L levels of stride 8, 16 and 32
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
        remat: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        read = read_config(config)
        if num_classes is not None:
            if num_classes < 1:
                raise ValueError(f"num_classes must be 1 or more, got {num_classes}")
            read["nc"] = num_classes
        if attention is not None:
            check_choice("attention", attention, list_attentions())
            read = insert_attention(read, attention.upper(), attention_at)
        self.config = _hashable(read)
        self.in_channels = in_channels
        self.num_classes = read["nc"]
        self.attention = self.attention_at = None  # they are in the configuration now
        self.attention_options = freeze(dict(attention_options or {}))
        self.norm_eps = norm_eps
        self.norm_momentum = norm_momentum
        self.remat = remat
        self.dtype = dtype
        self.param_dtype = param_dtype

        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        layers, self.notices = plan(read, in_channels)
        self.sources = tuple(layer.sources for layer in layers)
        strides = [layers[j].stride for j in self.sources[-1]]
        self.model = Sequential([self._built(layer, strides, types) for layer in layers])
        for _, module in nnx.iter_modules(self):
            if isinstance(module, Conv):
                module.bn.eps, module.bn.momentum = norm_eps, norm_momentum

    def _built(self, layer: LayerPlan, strides: Sequence[int], types: dict[str, Any]) -> nnx.Module:
        try:
            if layer.kind == "Detect":
                return Detect(layer.in_channels, **layer.arguments, strides=strides, **types)
            if layer.kind in list_attentions():
                return self._attention(layer, types)
            make = MODULES[layer.kind]
            if layer.kind in ("nn.Upsample", "Concat"):
                return make()
            channels = (layer.in_channels[0], layer.out_channels)
            if layer.kind == "C3":
                return make(*channels, layer.repeats, **layer.arguments, **types)
            made = [make(*channels, **layer.arguments, **types) for _ in range(layer.repeats)]
            return made[0] if layer.repeats == 1 else Sequential(made)
        except (TypeError, ValueError) as error:
            raise ValueError(f"layer {layer.index}, {layer.kind}: {error}") from error

    def _attention(self, layer: LayerPlan, types: dict[str, Any]) -> nnx.Module:
        usual: dict[str, Any] = {"variant": "grouped"} if layer.kind == "gam" else {}
        if layer.kind != "se":  # which has no norm
            usual |= {"norm_eps": self.norm_eps, "norm_momentum": self.norm_momentum}
        options = {**usual, **(layer.arguments or self.attention_options)}
        return create_attention(layer.kind, layer.in_channels[0], **options, **types)

    @property
    def detect(self) -> Detect:
        """The last layer."""
        return self.model[-1]

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels between two cells, of each level."""
        return self.detect.strides

    def __call__(self, x: Float[Array, "B H W C"]) -> tuple[Array, ...]:
        kept: list[Any] = [x]
        for layer, sources in zip(self.model, self.sources, strict=True):
            inputs = [kept[j + 1] for j in sources]
            if isinstance(layer, Concat | Detect):
                kept.append(layer(inputs))
            else:
                kept.append(run_layers([layer], inputs[0], remat=self.remat))
        return kept[-1]

    def decode(self, outputs: Sequence[Float[Array, "B A _ _ D"]]) -> Float[Array, "B N D"]:
        """The boxes, see `Detect.decode`."""
        return self.detect.decode(outputs)


def _hashable(value: Any) -> Any:
    """Lists as tuples, dictionaries frozen: what is not an array of a module must have a hash."""
    if isinstance(value, Mapping):
        return freeze({key: _hashable(inner) for key, inner in value.items()})
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


MODULES: dict[str, Any] = {
    "nn.Upsample": Upsample,
    **{made.__name__: made for made in (Conv, Bottleneck, C3, SPP, SPPF, Focus, Concat)},
}
"""`LayerPlan.kind` → class, of what is built from channels and arguments alone."""
