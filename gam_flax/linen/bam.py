"""BAM, arXiv 1807.06514, as Linen modules; see `gam_flax.attention.bam`."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gam_flax.attention.common import check_choice, hidden_channels, variant_options
from gam_flax.attention.variants import BAM_VARIANTS
from gam_flax.linen.batch_norm import BatchNorm
from gam_flax.linen.common import channels_of, conv2d


class ChannelGate(nn.Module):
    """BAM's channel gate, before the sigmoid: fc2(ReLU(norm(fc1(mean_HW(x)))))."""

    ratio: float = 16
    use_bias: bool = True
    norm_eps: float = 1e-5
    norm_momentum: float | None = 0.1
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B 1 1 C"]:
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        linear = {"use_bias": self.use_bias, **types}
        norm = BatchNorm(eps=self.norm_eps, momentum=self.norm_momentum, name="norm", **types)
        with channels_of("ChannelGate", x) as channels:
            hidden = hidden_channels(channels, self.ratio)
            g = norm(nn.Dense(hidden, name="fc1", **linear)(x.mean((1, 2))), train)
            g = nn.Dense(channels, name="fc2", **linear)(jax.nn.relu(g))
        return g[:, None, None, :]


class SpatialGate(nn.Module):
    """BAM's spatial gate, before the sigmoid: 1×1, two dilated 3×3 and 1×1 convolutions."""

    ratio: float = 16
    dilation: int = 4
    use_bias: bool = True
    norm_eps: float = 1e-5
    norm_momentum: float | None = 0.1
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B H W 1"]:
        if self.dilation < 1:
            raise ValueError(f"dilation must be positive, got {self.dilation}")
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = {"use_bias": self.use_bias, **types}
        wide = {"padding": self.dilation, "dilation": self.dilation, **conv}
        norm = {"eps": self.norm_eps, "momentum": self.norm_momentum, **types}
        with channels_of("SpatialGate", x) as channels:
            hidden = hidden_channels(channels, self.ratio)
            s = conv2d(hidden, 1, name="conv1", **conv)(x)
            s = jax.nn.relu(BatchNorm(name="norm1", **norm)(s, train))
            s = conv2d(hidden, 3, name="conv2", **wide)(s)
            s = jax.nn.relu(BatchNorm(name="norm2", **norm)(s, train))
            s = conv2d(hidden, 3, name="conv3", **wide)(s)
            s = jax.nn.relu(BatchNorm(name="norm3", **norm)(s, train))
            return conv2d(1, 1, name="conv4", **conv)(s)


class BAM(nn.Module):
    """Bottleneck Attention Module, `gam_flax.BAM` without `channels` and `rngs`.

    y = x · (1 + σ(channel_attention(x) ∘ spatial_attention(x))), ∘ the product or the sum.
    """

    ratio: float = 16
    dilation: int = 4
    combine: Literal["product", "sum"] = "product"
    use_bias: bool = True
    norm_eps: float = 1e-5
    norm_momentum: float | None = 0.1
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @classmethod
    def from_variant(cls, variant: str, **overrides: Any) -> BAM:
        """The block of a named source, see `gam_flax.BAM`; `overrides` are fields."""
        return cls(**variant_options(BAM_VARIANTS, variant, overrides))

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B H W C"]:
        check_choice("combine", self.combine, ("product", "sum"))
        shared = {
            "ratio": self.ratio,
            "use_bias": self.use_bias,
            "norm_eps": self.norm_eps,
            "norm_momentum": self.norm_momentum,
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
        }
        channel = ChannelGate(name="channel_attention", **shared)(x, train)
        spatial = SpatialGate(dilation=self.dilation, name="spatial_attention", **shared)(x, train)
        both = channel * spatial if self.combine == "product" else channel + spatial
        return x * (1 + jax.nn.sigmoid(both))
