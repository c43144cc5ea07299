"""CBAM, arXiv 1807.06521, as Linen modules; see `gam_flax.attention.cbam`."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gam_flax.attention.common import check_choice, check_odd, hidden_channels, variant_options
from gam_flax.attention.variants import CBAM_VARIANTS
from gam_flax.linen.batch_norm import BatchNorm
from gam_flax.linen.common import PROJECTIONS, channels_of, conv2d


class ChannelGate(nn.Module):
    """CBAM's channel gate: σ(mlp(mean_HW(x)) + mlp(max_HW(x)))."""

    ratio: float = 16
    projection: Literal["linear", "conv"] = "linear"
    use_bias: bool = True
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B 1 1 C"]:
        """The gate itself, in (0, 1), to be multiplied with `x`."""
        check_choice("projection", self.projection, PROJECTIONS)
        dense = PROJECTIONS[self.projection]
        layer = {"use_bias": self.use_bias, "dtype": self.dtype, "param_dtype": self.param_dtype}
        with channels_of("ChannelGate", x) as channels:
            fc1 = dense(hidden_channels(channels, self.ratio), name="fc1", **layer)
            fc2 = dense(channels, name="fc2", **layer)
            mean = fc2(jax.nn.relu(fc1(x.mean((1, 2)))))
            peak = fc2(jax.nn.relu(fc1(x.max((1, 2)))))
        return jax.nn.sigmoid(mean + peak)[:, None, None, :]


class SpatialGate(nn.Module):
    """CBAM's spatial gate: σ(norm(conv([max_C(x), mean_C(x)]))), the maps in `concat`'s order."""

    kernel_size: int = 7
    concat: Literal["max_mean", "mean_max"] = "max_mean"
    spatial_norm: bool = True
    spatial_bias: bool = False
    norm_eps: float = 1e-5
    norm_momentum: float | None = 0.01
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B H W 1"]:
        """The gate itself, in (0, 1), to be multiplied with `x`."""
        check_choice("concat", self.concat, ("max_mean", "mean_max"))
        check_odd(self.kernel_size)
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = conv2d(
            1,
            self.kernel_size,
            padding=self.kernel_size // 2,
            use_bias=self.spatial_bias,
            name="conv",
            **types,
        )
        maps = [x.max(-1, keepdims=True), x.mean(-1, keepdims=True)]
        s = conv(jnp.concatenate(maps if self.concat == "max_mean" else maps[::-1], axis=-1))
        if self.spatial_norm:
            norm = BatchNorm(eps=self.norm_eps, momentum=self.norm_momentum, name="norm", **types)
            s = norm(s, train)
        return jax.nn.sigmoid(s)


class CBAM(nn.Module):
    """Convolutional Block Attention Module, `gam_flax.CBAM` without `channels` and `rngs`.

    x₁ = x · σ(mlp(mean_HW(x)) + mlp(max_HW(x)))
    y  = x₁ · σ(norm(conv([max_C(x₁), mean_C(x₁)])))
    """

    ratio: float = 16
    kernel_size: int = 7
    concat: Literal["max_mean", "mean_max"] = "max_mean"
    projection: Literal["linear", "conv"] = "linear"
    use_bias: bool = True
    spatial_norm: bool = True
    spatial_bias: bool = False
    norm_eps: float = 1e-5
    norm_momentum: float | None = 0.01
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @classmethod
    def from_variant(cls, variant: str, **overrides: Any) -> CBAM:
        """The block of a named source, see `gam_flax.CBAM`; `overrides` are fields."""
        return cls(**variant_options(CBAM_VARIANTS, variant, overrides))

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B H W C"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        channel_attention = ChannelGate(
            ratio=self.ratio,
            projection=self.projection,
            use_bias=self.use_bias,
            name="channel_attention",
            **types,
        )
        spatial_attention = SpatialGate(
            kernel_size=self.kernel_size,
            concat=self.concat,
            spatial_norm=self.spatial_norm,
            spatial_bias=self.spatial_bias,
            norm_eps=self.norm_eps,
            norm_momentum=self.norm_momentum,
            name="spatial_attention",
            **types,
        )
        x = x * channel_attention(x, train)
        return x * spatial_attention(x, train)
