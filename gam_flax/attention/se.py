"""Squeeze-and-Excitation, arXiv 1709.01507."""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gam_flax.attention.common import (
    PROJECTIONS,
    check_channels,
    check_choice,
    hidden_channels,
    variant_options,
)
from gam_flax.attention.variants import SE_VARIANTS

GATES = {"sigmoid": jax.nn.sigmoid, "hard_sigmoid": jax.nn.hard_sigmoid}


class SqueezeExcitation(nnx.Module):
    """One gate a channel, from the global average.

        y = x · σ(fc2(ReLU(fc1(mean_HW(x)))))        C → C // ratio → C

    | variant      | weights             | gate         | found in                            |
    |--------------|---------------------|--------------|-------------------------------------|
    | reference    | linear, no bias     | sigmoid      | moskomule/senet.pytorch             |
    | torchvision  | 1×1 conv, with bias | sigmoid      | torchvision (EfficientNet), timm    |
    | mobilenet_v3 | 1×1 conv, with bias | hard sigmoid | torchvision MobileNetV3             |

    Args:
        channels: C, the channels of the input and of the output.
        ratio: the bottleneck has `int(channels / ratio)` channels.
        projection: how the weights are stored, "linear" (out, in) or "conv" (out, in, 1, 1).
        use_bias: whether both layers have biases.
        gate: "sigmoid", or "hard_sigmoid" = clip(x / 6 + 1 / 2, 0, 1).
        dtype: of the computation; None for the wider of the input's and the parameters' type.
        param_dtype: of the parameters.
        rngs: draws the parameters, as Flax does by default; see `torch_default_init`.

    Shapes: (B, H, W, C) → (B, H, W, C), any B, H and W.

    Raises:
        ValueError: the ratio leaves no channel; an unknown option; an input of other channels.

    Source: arXiv 1709.01507, section 3.
    """

    def __init__(
        self,
        channels: int,
        *,
        ratio: float = 16,
        projection: Literal["linear", "conv"] = "linear",
        use_bias: bool = False,
        gate: Literal["sigmoid", "hard_sigmoid"] = "sigmoid",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_choice("projection", projection, PROJECTIONS)
        check_choice("gate", gate, GATES)
        hidden = hidden_channels(channels, ratio)
        self.channels = channels
        self.ratio = ratio
        self.projection = projection
        self.use_bias = use_bias
        self.gate = gate
        self.dtype = dtype
        self.param_dtype = param_dtype
        layer = {"use_bias": use_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        self.fc1 = PROJECTIONS[projection](channels, hidden, **layer)
        self.fc2 = PROJECTIONS[projection](hidden, channels, **layer)

    @classmethod
    def from_variant(cls, variant: str, channels: int, **overrides: Any) -> SqueezeExcitation:
        """The block of a named source, see above; `overrides` are constructor arguments."""
        return cls(channels, **variant_options(SE_VARIANTS, variant, overrides))

    def channel_attention(self, x: Float[Array, "B H W C"]) -> Float[Array, "B 1 1 C"]:
        """The gate itself, in [0, 1], to be multiplied with `x`."""
        check_channels("SqueezeExcitation", x.shape, self.channels)
        gate = GATES[self.gate](self.fc2(jax.nn.relu(self.fc1(x.mean((1, 2))))))
        return gate[:, None, None, :]

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        return x * self.channel_attention(x)
