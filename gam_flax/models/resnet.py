"""Residual networks, arXiv 1512.03385, with an attention block in them; torchvision's key names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import freeze
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gam_flax.attention.common import check_choice
from gam_flax.models.common import (
    Attend,
    Attention,
    AttentionAt,
    Stage,
    attends,
    attends_not,
    check_classes,
    stages_with_attention,
)
from gam_flax.ops.batch_norm import BatchNorm
from gam_flax.ops.conv import conv2d, max_pool2d
from gam_flax.ops.sequential import Sequential, run_layers


def _conv(
    in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, **types: Any
) -> nnx.Conv:
    """A convolution without bias, padded by `kernel_size // 2` on both sides."""
    return conv2d(
        in_channels,
        out_channels,
        kernel_size,
        stride=stride,
        padding=kernel_size // 2,
        use_bias=False,
        **types,
    )


class PadShortcut(nnx.Module):
    """The shortcut without weights, "option A": every second pixel, zero channels added."""

    def __init__(self, stride: int, extra: int):
        self.stride = stride
        self.extra = extra

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        before = self.extra // 2
        x = x[:, :: self.stride, :: self.stride, :]
        return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, self.extra - before)))


def _shortcut(
    kind: str, in_channels: int, out_channels: int, stride: int, **types: Any
) -> PadShortcut | Sequential | None:
    """What brings a block's input to its output's shape; None where it has that shape."""
    if stride == 1 and in_channels == out_channels:
        return None
    if kind == "pad":
        return PadShortcut(stride, out_channels - in_channels)
    return Sequential(
        [
            _conv(in_channels, out_channels, 1, stride, **types),
            BatchNorm(out_channels, **types),
        ]
    )


class BasicBlock(nnx.Module):
    """ReLU(attention(bn2(conv2(ReLU(bn1(conv1(x)))))) + shortcut(x)), both convolutions 3×3."""

    expansion = 1

    NORMS: ClassVar[dict[str, str]] = {"conv1": "bn1", "conv2": "bn2"}
    """Which norm follows which convolution."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int = 1,
        shortcut_kind: str = "projection",
        attend: Attend = attends_not,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conv1 = _conv(in_channels, width, 3, stride, **types)
        self.bn1 = BatchNorm(width, **types)
        self.conv2 = _conv(width, width, 3, **types)
        self.bn2 = BatchNorm(width, **types)
        self.attention = attend(width)
        self.downsample = _shortcut(shortcut_kind, in_channels, width, stride, **types)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.attention is not None:
            y = self.attention(y)
        return jax.nn.relu(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nnx.Module):
    """1×1, 3×3 (with the stride, as torchvision), 1×1 to four times the width."""

    expansion = 4

    NORMS: ClassVar[dict[str, str]] = {"conv1": "bn1", "conv2": "bn2", "conv3": "bn3"}
    """Which norm follows which convolution."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        *,
        stride: int = 1,
        shortcut_kind: str = "projection",
        attend: Attend = attends_not,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        out_channels = width * self.expansion
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.conv1 = _conv(in_channels, width, 1, **types)
        self.bn1 = BatchNorm(width, **types)
        self.conv2 = _conv(width, width, 3, stride, **types)
        self.bn2 = BatchNorm(width, **types)
        self.conv3 = _conv(width, out_channels, 1, **types)
        self.bn3 = BatchNorm(out_channels, **types)
        self.attention = attend(out_channels)
        self.downsample = _shortcut(shortcut_kind, in_channels, out_channels, stride, **types)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
        y = jax.nn.relu(self.bn1(self.conv1(x)))
        y = jax.nn.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.attention is not None:
            y = self.attention(y)
        return jax.nn.relu(y + (x if self.downsample is None else self.downsample(x)))


BLOCKS: dict[str, type[BasicBlock] | type[Bottleneck]] = {
    "basic": BasicBlock,
    "bottleneck": Bottleneck,
}


class ResNet(nnx.Module):
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
        remat: in the backward pass compute each block once more instead of keeping what is inside
            it: less memory, more time.
        dtype: of the computation; None for the wider of the input's and the parameters' type.
        param_dtype: of the parameters.
        rngs: draws the parameters, as Flax does by default; see `torch_default_init`.

    Shapes: (B, H, W, in_channels) → (B, num_classes).

    Raises:
        ValueError: lengths that differ, an unknown option, a stage that does not exist.
    """

    NORMS: ClassVar[dict[str, str]] = {"conv1": "bn1"}
    """Which norm follows which convolution."""

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
        remat: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
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
        self.attention_options = freeze(dict(attention_options or {}))
        self.attention_at = attention_at if attention_at == "blocks" else after
        self.identity_start = identity_start
        self.remat = remat
        self.dtype = dtype
        self.param_dtype = param_dtype

        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        kernel_size, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = _conv(in_channels, widths[0], kernel_size, stride, **types)
        self.bn1 = BatchNorm(widths[0], **types)
        channels = widths[0]
        attend = attends(attention, attention_options, identity_start=identity_start, **types)
        for stage, (count, width) in enumerate(zip(layers, widths, strict=True), 1):
            blocks = []
            for i in range(count):
                made = BLOCKS[block](
                    channels,
                    width,
                    stride=2 if stage > 1 and i == 0 else 1,
                    shortcut_kind=shortcut,
                    attend=attend if attention_at == "blocks" else attends_not,
                    **types,
                )
                blocks.append(made)
                channels = width * made.expansion
            setattr(self, f"layer{stage}", Sequential(blocks))
            if stage in after:
                setattr(self, f"attention{stage}", attend(channels))
        self.reset_classifier(num_classes, rngs=rngs)

    @property
    def stages(self) -> list[Stage]:
        """What `stage_outputs` returns, for those who build on it."""
        stem, expansion = 4 if self.stem == "imagenet" else 1, BLOCKS[self.block].expansion
        return [Stage(width * expansion, stem * 2**i) for i, width in enumerate(self.widths)]

    def reset_classifier(self, num_classes: int, *, rngs: nnx.Rngs) -> None:
        """A new `fc` of so many classes; none for 0. Any module of (B, C) may stand there."""
        check_classes(num_classes)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype, "rngs": rngs}
        self.num_classes = num_classes
        head = nnx.Linear(self.stages[-1].channels, num_classes, **types) if num_classes else None
        self.fc = nnx.data(head)  # or a place that once was None would take no module

    def stage_outputs(self, x: Float[Array, "B H W C"]) -> list[Array]:
        """The output of each stage, its attention block included; sizes as `stages` has them."""
        x = jax.nn.relu(self.bn1(self.conv1(x)))
        if self.stem == "imagenet":
            x = max_pool2d(x, 3, stride=2, padding=1)
        outputs = []
        for stage in range(1, len(self.layers) + 1):
            x = run_layers(getattr(self, f"layer{stage}"), x, remat=self.remat)
            attention = getattr(self, f"attention{stage}", None)
            if attention is not None:
                x = attention(x)
            outputs.append(x)
        return outputs

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B K"]:
        x = jnp.mean(self.stage_outputs(x)[-1], (1, 2))
        return x if self.fc is None else self.fc(x)
