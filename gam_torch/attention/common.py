"""What the blocks share: sizes checked once, with the numbers in the message."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn


def hidden_channels(channels: int, ratio: float) -> int:
    """`int(channels / ratio)`, the width of a block's bottleneck; at least one channel is left.

    Raises:
        ValueError: `channels` or `ratio` is not positive, or the ratio leaves no channel.
    """
    if channels < 1 or ratio <= 0:
        raise ValueError(f"channels and ratio must be positive, got {channels} and {ratio}")
    hidden = int(channels / ratio)
    if hidden < 1:
        raise ValueError(
            f"ratio {ratio} leaves no channel of {channels}; use a ratio of at most {channels}"
        )
    return hidden


def check_divides(what: str, groups: int, **counts: int) -> None:
    """Raises ValueError unless `groups` is positive and divides each of `counts`."""
    for name, count in counts.items():
        if groups < 1 or count % groups:
            raise ValueError(f"{what} {groups} does not divide the {count} {name}")


def check_choice(argument: str, value: Any, choices: Collection[Any]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{argument} must be one of {list(choices)}, got {value!r}")


def check_odd(kernel_size: int) -> None:
    """Raises ValueError for an even kernel: no symmetric padding keeps the picture's size."""
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, got {kernel_size}")


def check_channels(block: str, shape: tuple[int, ...], channels: int) -> None:
    """Raises ValueError unless `shape` is (batch, channels, height, width)."""
    if len(shape) != 4:
        raise ValueError(f"{block} expects (batch, channels, height, width), got {tuple(shape)}")
    if shape[1] != channels:
        raise ValueError(f"{block} was built for {channels} channels, got {shape[1]}")


def variant_options(
    variants: Mapping[str, Mapping[str, Any]], variant: str, overrides: Mapping[str, Any]
) -> dict[str, Any]:
    """The constructor arguments of a named variant, `overrides` last."""
    check_choice("variant", variant, variants)
    return {**variants[variant], **overrides}


class PointwiseConv(nn.Conv2d):
    """A linear map of (B, C) vectors, its weight stored as a 1×1 convolution, (out, in, 1, 1)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True):
        super().__init__(in_features, out_features, 1, bias=bias)

    def forward(self, input: Float[Tensor, "B C"]) -> Float[Tensor, "B M"]:
        return super().forward(input[:, :, None, None])[:, :, 0, 0]


PROJECTIONS: dict[str, type[nn.Linear] | type[PointwiseConv]] = {
    "linear": nn.Linear,
    "conv": PointwiseConv,
}
