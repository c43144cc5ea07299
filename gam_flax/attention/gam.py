"""Global Attention Mechanism, arXiv 2112.05561: a channel gate, then a spatial gate; no pooling."""

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
    check_divides,
    check_odd,
    hidden_channels,
    variant_options,
)
from gam_flax.attention.variants import GAM_VARIANTS
from gam_flax.ops.batch_norm import BatchNorm
from gam_flax.ops.conv import channel_shuffle, conv2d, replicate_pad2d

SHUFFLE_GROUPS = 4
"""Every published rewrite shuffles channels in four groups, whatever its other numbers."""


class ChannelAttention(nnx.Module):
    """GAM's channel gate: a two-layer perceptron at every pixel.

        g = fc2(ReLU(fc1(x)))        C → C // ratio → C,   then σ(g) where gate = "sigmoid"

    Args:
        channels: C, the channels of the input.
        ratio: the bottleneck has `int(channels / ratio)` channels.
        gate: "sigmoid" as in the paper, or "identity" as in most code that circulates.
        use_bias: whether `fc1` and `fc2` have biases.

    Raises:
        ValueError: the ratio leaves no channel; an unknown gate; an input of other channels.
    """

    def __init__(
        self,
        channels: int,
        *,
        ratio: float = 4,
        gate: Literal["identity", "sigmoid"] = "identity",
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_choice("gate", gate, ("identity", "sigmoid"))
        hidden = hidden_channels(channels, ratio)
        self.channels = channels
        self.ratio = ratio
        self.gate = gate
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        linear = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.fc1 = nnx.Linear(channels, hidden, **linear)
        self.fc2 = nnx.Linear(hidden, channels, **linear)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """The gate itself, to be multiplied with `x`."""
        check_channels("ChannelAttention", x.shape, self.channels)
        g = self.fc2(jax.nn.relu(self.fc1(x)))
        return jax.nn.sigmoid(g) if self.gate == "sigmoid" else g


class SpatialAttention(nnx.Module):
    """GAM's spatial gate: two k×k convolutions over all channels.

        s = σ(norm2(conv2(ReLU(norm1(conv1(x))))))        C → C // ratio → C,   padding k // 2

    Args:
        channels: C, the channels of the input.
        ratio: the bottleneck has `int(channels / ratio)` channels.
        kernel_size: k, odd; 7 in the paper.
        groups: groups of both convolutions.
        padding_mode: what the convolutions see beyond the border, "zeros" or "replicate".
        use_bias: whether the convolutions have biases; in training the norms cancel them.
        norm_eps: added to the variance; 1e-5 as in torch, 1e-3 in YOLO.
        norm_momentum: weight of the new value in the running statistics.

    Raises:
        ValueError: the ratio leaves no channel; `groups` does not divide; an even kernel;
            an input of other channels.
    """

    NORMS: ClassVar[dict[str, str]] = {"conv1": "norm1", "conv2": "norm2"}
    """Which norm follows which convolution."""

    def __init__(
        self,
        channels: int,
        *,
        ratio: float = 4,
        kernel_size: int = 7,
        groups: int = 1,
        padding_mode: Literal["zeros", "replicate"] = "zeros",
        use_bias: bool = True,
        norm_eps: float = 1e-5,
        norm_momentum: float | None = 0.1,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_choice("padding_mode", padding_mode, ("zeros", "replicate"))
        check_odd(kernel_size)
        hidden = hidden_channels(channels, ratio)
        check_divides("groups", groups, channels=channels, hidden_channels=hidden)
        self.channels = channels
        self.ratio = ratio
        self.kernel_size = kernel_size
        self.groups = groups
        self.padding_mode: Literal["zeros", "replicate"] = padding_mode
        self.use_bias = use_bias
        self.norm_eps = norm_eps
        self.norm_momentum = norm_momentum
        self.dtype = dtype
        self.param_dtype = param_dtype
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        padding = kernel_size // 2 if padding_mode == "zeros" else 0
        conv: dict[str, Any] = {"kernel_size": kernel_size, "padding": padding, "groups": groups}
        conv |= {"use_bias": use_bias, **types}
        norm = {"eps": norm_eps, "momentum": norm_momentum, **types}
        self.conv1 = conv2d(channels, hidden, **conv)
        self.norm1 = BatchNorm(hidden, **norm)
        self.conv2 = conv2d(hidden, channels, **conv)
        self.norm2 = BatchNorm(channels, **norm)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """The gate itself, in (0, 1), to be multiplied with `x`."""
        check_channels("SpatialAttention", x.shape, self.channels)
        s = jax.nn.relu(self.norm1(self.conv1(self._pad(x))))
        return jax.nn.sigmoid(self.norm2(self.conv2(self._pad(s))))

    def _pad(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        """What the convolutions do not pad themselves, as they pad with zeros."""
        if self.padding_mode == "zeros":
            return x
        return replicate_pad2d(x, self.kernel_size // 2)


class GAM(nnx.Module):
    """Global Attention Mechanism: nothing is pooled, each gate is as large as its input.

        x₁ = x · channel_attention(x)
        y  = x₁ · spatial_attention(x₁)

    The paper puts a sigmoid on the channel gate and uses ratio 16; most code that circulates
    has no sigmoid there and ratio 4. `from_variant` names the families:

    | variant   | channel gate | convolutions      | shuffled, 4 groups      |
    |-----------|--------------|-------------------|-------------------------|
    | reference | identity     |                   |                         |
    | gated     | sigmoid      |                   |                         |
    | grouped   | identity     | `ratio` groups    | the spatial gate        |
    | replicate | identity     | replicate padding |                         |
    | shuffled  | sigmoid      |                   | x₁, before spatial gate |
    | paper     | sigmoid      | ratio 16          |                         |

    Args:
        channels: C, the channels of the input and of the output.
        ratio: both bottlenecks have `int(channels / ratio)` channels.
        kernel_size: of the two convolutions, odd.
        groups: of the two convolutions; must divide C and the bottleneck.
        channel_gate: "identity" or "sigmoid".
        shuffle: None, "features" (x₁ is channel-shuffled) or "gate" (the spatial gate is,
            after its sigmoid).
        padding_mode: of the two convolutions, "zeros" or "replicate".
        use_bias: of the linear layers and the convolutions.
        norm_eps: of the two norms; YOLO uses 1e-3.
        norm_momentum: of the two norms, weight of the new value; YOLO uses 0.03.
        dtype: of the computation; None for the wider of the input's and the parameters' type.
        param_dtype: of the parameters.
        rngs: draws the parameters, as Flax does by default; see `torch_default_init`.

    Shapes: (B, H, W, C) → (B, H, W, C), any B, H and W.

    Raises:
        ValueError: sizes that do not divide, an unknown option, an input of other channels.

    Source: arXiv 2112.05561, section 3. No code of the authors is known.
    """

    def __init__(
        self,
        channels: int,
        *,
        ratio: float = 4,
        kernel_size: int = 7,
        groups: int = 1,
        channel_gate: Literal["identity", "sigmoid"] = "identity",
        shuffle: Literal["features", "gate"] | None = None,
        padding_mode: Literal["zeros", "replicate"] = "zeros",
        use_bias: bool = True,
        norm_eps: float = 1e-5,
        norm_momentum: float | None = 0.1,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_choice("channel_gate", channel_gate, ("identity", "sigmoid"))
        check_choice("shuffle", shuffle, (None, "features", "gate"))
        if shuffle is not None:
            check_divides("channel shuffle in groups of", SHUFFLE_GROUPS, channels=channels)
        self.channels = channels
        self.ratio = ratio
        self.kernel_size = kernel_size
        self.groups = groups
        self.channel_gate = channel_gate
        self.shuffle = shuffle
        self.padding_mode = padding_mode
        self.use_bias = use_bias
        self.norm_eps = norm_eps
        self.norm_momentum = norm_momentum
        self.dtype = dtype
        self.param_dtype = param_dtype
        types = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.channel_attention = ChannelAttention(
            channels, ratio=ratio, gate=channel_gate, use_bias=use_bias, **types
        )
        self.spatial_attention = SpatialAttention(
            channels,
            ratio=ratio,
            kernel_size=kernel_size,
            groups=groups,
            padding_mode=padding_mode,
            use_bias=use_bias,
            norm_eps=norm_eps,
            norm_momentum=norm_momentum,
            **types,
        )

    @classmethod
    def from_variant(cls, variant: str, channels: int, **overrides: Any) -> GAM:
        """The GAM of a named family, see above; `overrides` are constructor arguments."""
        if variant == "grouped" and "ratio" in overrides:
            overrides = {"groups": overrides["ratio"], **overrides}
        return cls(channels, **variant_options(GAM_VARIANTS, variant, overrides))

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        check_channels("GAM", x.shape, self.channels)
        x = x * self.channel_attention(x)
        if self.shuffle == "features":
            x = channel_shuffle(x, SHUFFLE_GROUPS)
        gate = self.spatial_attention(x)
        if self.shuffle == "gate":
            gate = channel_shuffle(gate, SHUFFLE_GROUPS)
        return x * gate
