"""What the Linen blocks share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from flax import linen as nn
from flax.errors import ScopeParamShapeError
from jaxtyping import Array, Float

from gam_flax.ops.convolution.convolve import conv_general_dilated


@contextmanager
def channels_of(block: str, x: Array) -> Iterator[int]:
    """The channels of `x`; ValueError where `x` or the variables do not fit the block."""
    if x.ndim != 4:
        raise ValueError(f"{block} expects (batch, height, width, channels), got {x.shape}")
    try:
        yield x.shape[-1]
    except ScopeParamShapeError as error:
        raise ValueError(
            f"{block} was initialized for other channels than {x.shape[-1]}: {error}"
        ) from error


def conv2d(
    out_channels: int,
    kernel_size: int,
    *,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    **kwargs: Any,
) -> nn.Conv:
    """`torch.nn.Conv2d` in Linen: `padding` pixels of zeros on all four sides."""
    return nn.Conv(
        out_channels,
        (kernel_size, kernel_size),
        padding=((padding, padding), (padding, padding)),
        kernel_dilation=dilation,
        feature_group_count=groups,
        conv_general_dilated=conv_general_dilated,
        **kwargs,
    )


class PointwiseConv(nn.Conv):
    """A linear map of (B, C) vectors, its weight stored as a 1×1 convolution, (1, 1, in, out)."""

    kernel_size: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, inputs: Float[Array, "B C"]) -> Float[Array, "B M"]:
        return super().__call__(inputs[:, None, None, :])[:, 0, 0, :]


PROJECTIONS: dict[str, type[nn.Dense] | type[PointwiseConv]] = {
    "linear": nn.Dense,
    "conv": PointwiseConv,
}
