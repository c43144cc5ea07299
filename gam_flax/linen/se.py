"""Squeeze-and-Excitation, arXiv 1709.01507, as a Linen module; see `gam_flax.attention.se`."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gam_flax.attention.common import check_choice, hidden_channels, variant_options
from gam_flax.attention.se import GATES
from gam_flax.attention.variants import SE_VARIANTS
from gam_flax.linen.common import PROJECTIONS, channels_of


class SqueezeExcitation(nn.Module):
    """One gate a channel, `gam_flax.SqueezeExcitation` without `channels` and `rngs`.

        y = x · σ(fc2(ReLU(fc1(mean_HW(x)))))        C → C // ratio → C

    `train` changes nothing; every block takes it.
    """

    ratio: float = 16
    projection: Literal["linear", "conv"] = "linear"
    use_bias: bool = False
    gate: Literal["sigmoid", "hard_sigmoid"] = "sigmoid"
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32

    @classmethod
    def from_variant(cls, variant: str, **overrides: Any) -> SqueezeExcitation:
        """The block of a named source, see `gam_flax.SqueezeExcitation`; `overrides` are fields."""
        return cls(**variant_options(SE_VARIANTS, variant, overrides))

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], train: bool = False) -> Float[Array, "B H W C"]:
        check_choice("projection", self.projection, PROJECTIONS)
        check_choice("gate", self.gate, GATES)
        dense = PROJECTIONS[self.projection]
        layer = {"use_bias": self.use_bias, "dtype": self.dtype, "param_dtype": self.param_dtype}
        with channels_of("SqueezeExcitation", x) as channels:
            g = dense(hidden_channels(channels, self.ratio), name="fc1", **layer)(x.mean((1, 2)))
            g = dense(channels, name="fc2", **layer)(jax.nn.relu(g))
        return x * GATES[self.gate](g)[:, None, None, :]
