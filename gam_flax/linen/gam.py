"""Global Attention Mechanism, arXiv 2112.05561, as Linen modules; see `gam_flax.attention.gam`."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gam_flax.attention.common import (
    check_choice,
    check_divides,
    check_odd,
    hidden_channels,
    variant_options,
)
from gam_flax.attention.gam import SHUFFLE_GROUPS
from gam_flax.attention.variants import GAM_VARIANTS
from gam_flax.linen.batch_norm import BatchNorm
from gam_flax.linen.common import channels_of, conv2d
from gam_flax.ops.conv import channel_shuffle, replicate_pad2d


class ChannelAttention(nn.Module):
    """GAM's channel gate, `gam_flax.ChannelAttention` without `channels` and `rngs`."""

    ratio: float = 4
    gate: Literal["identity", "sigmoid"] = "identity"
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B H W C"]:
        """The gate itself, to be multiplied with `x`."""
        check_choice("gate", self.gate, ("identity", "sigmoid"))
        linear = {
            "use_bias": self.use_bias,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        with channels_of("ChannelAttention", x) as channels:
            hidden = hidden_channels(channels, self.ratio)
            g = nn.Dense(hidden, name="fc1", **linear)(x)
            g = nn.Dense(channels, name="fc2", **linear)(jax.nn.relu(g))
        return jax.nn.sigmoid(g) if self.gate == "sigmoid" else g


class SpatialAttention(nn.Module):
    """GAM's spatial gate, `gam_flax.SpatialAttention` without `channels` and `rngs`."""

    ratio: float = 4
    kernel_size: int = 7
    groups: int = 1
    padding_mode: Literal["zeros", "replicate"] = "zeros"
    use_bias: bool = True
    norm_eps: float = 1e-5
    norm_momentum: float | None = 0.1
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B H W C"]:
        """The gate itself, in (0, 1), to be multiplied with `x`."""
        check_choice("padding_mode", self.padding_mode, ("zeros", "replicate"))
        check_odd(self.kernel_size)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        padding = self.kernel_size // 2 if self.padding_mode == "zeros" else 0
        conv = {"padding": padding, "groups": self.groups, "use_bias": self.use_bias, **types}
        norm = {"eps": self.norm_eps, "momentum": self.norm_momentum, **types}
        with channels_of("SpatialAttention", x) as channels:
            hidden = hidden_channels(channels, self.ratio)
            check_divides("groups", self.groups, channels=channels, hidden_channels=hidden)
            s = conv2d(hidden, self.kernel_size, name="conv1", **conv)(self._pad(x))
            s = jax.nn.relu(BatchNorm(name="norm1", **norm)(s, train))
            s = conv2d(channels, self.kernel_size, name="conv2", **conv)(self._pad(s))
            return jax.nn.sigmoid(BatchNorm(name="norm2", **norm)(s, train))

    def _pad(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
        """What the convolutions do not pad themselves, as they pad with zeros."""
        if self.padding_mode == "zeros":
            return x
        return replicate_pad2d(x, self.kernel_size // 2)


class GAM(nn.Module):
    """Global Attention Mechanism, `gam_flax.GAM` without `channels` and `rngs`.

        x₁ = x · channel_attention(x)
        y  = x₁ · spatial_attention(x₁)

    The variables have the paths of `gam_flax.GAM` and of `gam_torch.GAM`.

    Args: as `gam_flax.GAM`; C is read from the input. `train` makes the norms use the batch's
        statistics and update `batch_stats`, which is to be mutable then.

    Shapes: (B, H, W, C) → (B, H, W, C), any B, H and W.

    Raises:
        ValueError: at the first call: sizes that do not divide, an unknown option, variables of
            other channels.
    """

    ratio: float = 4
    kernel_size: int = 7
    groups: int = 1
    channel_gate: Literal["identity", "sigmoid"] = "identity"
    shuffle: Literal["features", "gate"] | None = None
    padding_mode: Literal["zeros", "replicate"] = "zeros"
    use_bias: bool = True
    norm_eps: float = 1e-5
    norm_momentum: float | None = 0.1
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @classmethod
    def from_variant(cls, variant: str, **overrides: Any) -> GAM:
        """The GAM of a named family, see `gam_flax.GAM`; `overrides` are fields."""
        if variant == "grouped" and "ratio" in overrides:
            overrides = {"groups": overrides["ratio"], **overrides}
        return cls(**variant_options(GAM_VARIANTS, variant, overrides))

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B H W C"]:
        check_choice("channel_gate", self.channel_gate, ("identity", "sigmoid"))
        check_choice("shuffle", self.shuffle, (None, "features", "gate"))
        if self.shuffle is not None:
            check_divides("channel shuffle in groups of", SHUFFLE_GROUPS, channels=x.shape[-1])
        shared = {
            "ratio": self.ratio,
            "use_bias": self.use_bias,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        channel_attention = ChannelAttention(
            gate=self.channel_gate, name="channel_attention", **shared
        )
        spatial_attention = SpatialAttention(
            kernel_size=self.kernel_size,
            groups=self.groups,
            padding_mode=self.padding_mode,
            norm_eps=self.norm_eps,
            norm_momentum=self.norm_momentum,
            name="spatial_attention",
            **shared,
        )
        x = x * channel_attention(x, train)
        if self.shuffle == "features":
            x = channel_shuffle(x, SHUFFLE_GROUPS)
        gate = spatial_attention(x, train)
        if self.shuffle == "gate":
            gate = channel_shuffle(gate, SHUFFLE_GROUPS)
        return x * gate
