"""Bottleneck Attention Module, arXiv 1807.06514: both gates side by side, then one sigmoid."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gam_flax.attention.common import (
    check_channels,
    check_choice,
    hidden_channels,
    variant_options,
)
from gam_flax.attention.variants import BAM_VARIANTS
from gam_flax.ops.batch_norm import BatchNorm
from gam_flax.ops.conv import conv2d


class ChannelGate(nnx.Module):
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
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        hidden = hidden_channels(channels, ratio)
        self.channels = channels
        self.ratio = ratio
        self.use_bias = use_bias
        self.norm_eps = norm_eps
        self.norm_momentum = norm_momentum
        self.dtype = dtype
        self.param_dtype = param_dtype
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.fc1 = nnx.Linear(channels, hidden, use_bias=use_bias, **types)
        self.norm = BatchNorm(hidden, eps=norm_eps, momentum=norm_momentum, **types)
        self.fc2 = nnx.Linear(hidden, channels, use_bias=use_bias, **types)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B 1 1 C"]:
        check_channels("ChannelGate", x.shape, self.channels)
        g = self.fc2(jax.nn.relu(self.norm(self.fc1(x.mean((1, 2))))))
        return g[:, None, None, :]


class SpatialGate(nnx.Module):
    """BAM's spatial gate, before the sigmoid.

        s = conv4(h₃),  hᵢ = ReLU(normᵢ(convᵢ(hᵢ₋₁))),  h₀ = x

    conv1 1×1 C → C // ratio; conv2, conv3 3×3, dilated; conv4 1×1 to one channel.
    Arguments as in `BAM`.
    """

    NORMS: ClassVar[dict[str, str]] = {"conv1": "norm1", "conv2": "norm2", "conv3": "norm3"}
    """Which norm follows which convolution."""

    def __init__(
        self,
        channels: int,
        *,
        ratio: float = 16,
        dilation: int = 4,
        use_bias: bool = True,
        norm_eps: float = 1e-5,
        norm_momentum: float | None = 0.1,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if dilation < 1:
            raise ValueError(f"dilation must be positive, got {dilation}")
        hidden = hidden_channels(channels, ratio)
        self.channels = channels
        self.ratio = ratio
        self.dilation = dilation
        self.use_bias = use_bias
        self.norm_eps = norm_eps
        self.norm_momentum = norm_momentum
        self.dtype = dtype
        self.param_dtype = param_dtype
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        conv = {"use_bias": use_bias, **types}
        wide = {"kernel_size": 3, "padding": dilation, "dilation": dilation, **conv}
        norm = {"eps": norm_eps, "momentum": norm_momentum, **types}
        self.conv1 = conv2d(channels, hidden, 1, **conv)
        self.norm1 = BatchNorm(hidden, **norm)
        self.conv2 = conv2d(hidden, hidden, **wide)
        self.norm2 = BatchNorm(hidden, **norm)
        self.conv3 = conv2d(hidden, hidden, **wide)
        self.norm3 = BatchNorm(hidden, **norm)
        self.conv4 = conv2d(hidden, 1, 1, **conv)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W 1"]:
        check_channels("SpatialGate", x.shape, self.channels)
        s = jax.nn.relu(self.norm1(self.conv1(x)))
        s = jax.nn.relu(self.norm2(self.conv2(s)))
        s = jax.nn.relu(self.norm3(self.conv3(s)))
        return self.conv4(s)


class BAM(nnx.Module):
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
        dtype: of the computation; None for the wider of the input's and the parameters' type.
        param_dtype: of the parameters.
        rngs: draws the parameters, as Flax does by default; see `torch_default_init`.

    Shapes: (B, H, W, C) → (B, H, W, C), any B, H and W; training wants B ≥ 2.

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
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_choice("combine", combine, ("product", "sum"))
        self.channels = channels
        self.ratio = ratio
        self.dilation = dilation
        self.combine = combine
        self.use_bias = use_bias
        self.norm_eps = norm_eps
        self.norm_momentum = norm_momentum
        self.dtype = dtype
        self.param_dtype = param_dtype
        shared = {
            "ratio": ratio,
            "use_bias": use_bias,
            "norm_eps": norm_eps,
            "norm_momentum": norm_momentum,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        self.channel_attention = ChannelGate(channels, **shared)
        self.spatial_attention = SpatialGate(channels, dilation=dilation, **shared)

    @classmethod
    def from_variant(cls, variant: str, channels: int, **overrides: Any) -> BAM:
        """The block of a named source, see above; `overrides` are constructor arguments."""
        return cls(channels, **variant_options(BAM_VARIANTS, variant, overrides))

    def gate(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Both gates as one, in (0, 1): what is added to 1, and multiplied with `x`."""
        check_channels("BAM", x.shape, self.channels)
        channel, spatial = self.channel_attention(x), self.spatial_attention(x)
        both = channel * spatial if self.combine == "product" else channel + spatial
        return jax.nn.sigmoid(both)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return x * (1 + self.gate(x))
