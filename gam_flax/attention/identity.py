"""Attention blocks that start as the identity, so that a trained backbone computes what it did."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx

from gam_flax.attention.bam import BAM
from gam_flax.attention.cbam import CBAM
from gam_flax.attention.gam import GAM
from gam_flax.attention.se import SqueezeExcitation
from gam_flax.ops.batch_norm import BatchNorm

Module = TypeVar("Module", bound=nnx.Module)


def start_as_identity(model: Module, *, gate: float = 0.999) -> Module:
    """Sets the last layer of each gate of each GAM, CBAM, SE and BAM in `model` to a constant.

    A gate without a sigmoid becomes 1, and y = x exactly: that is GAM's channel gate where
    `channel_gate="identity"`. A sigmoid never is 1: it starts at `gate`, and its gradient at
    gate · (1 − gate), so that the nearer to the identity, the slower it is to move. With g = gate:

    | block                    | y starts as | the layers that are set                           |
    |--------------------------|-------------|---------------------------------------------------|
    | GAM, identity + sigmoid  | x · g       | channel fc2: 0, bias 1; spatial norm2: scale 0    |
    | GAM, two sigmoids        | x · g²      | channel fc2 and spatial norm2                     |
    | CBAM                     | x · g²      | fc2, whose bias counts twice; norm, or conv       |
    | SE                       | x · g       | fc2; a hard sigmoid keeps its full gradient, 1/6  |
    | BAM, product or sum      | x · (2 − g) | fc2 and conv4                                     |

    Kernels and scales of those layers become 0, all other layers keep what they have, and a block
    computes the same in training as in evaluation until a step is taken. Behind a residual
    addition the factor holds for the branch alone.

    Args:
        model: a block or a network, changed in place.
        gate: at what value sigmoids start, in (0.5, 1).

    Returns:
        `model`.

    Raises:
        ValueError: no block in `model`; a gate outside of (0.5, 1); a block that cannot be the
            identity: a gate without bias and norm can open to 1/2 at most, and GAM with
            `shuffle="features"` permutes the channels.
    """
    if not 0.5 < gate < 1:
        raise ValueError(f"gate must lie between 0.5 and 1, got {gate}")
    constants = [
        (kind.__name__, layer, value)
        for _, block in nnx.iter_modules(model)
        for kind, constants in CONSTANTS.items()
        if isinstance(block, kind)
        for layer, value in constants(block, gate)
    ]
    if not constants:
        raise ValueError(f"no attention block of this package in {type(model).__name__}")
    for name, layer, _ in constants:
        if layer.bias is None:
            raise ValueError(f"{name} has a gate without bias or norm, which cannot start open")
    for _, layer, value in constants:
        _make_constant(layer, value)
    return model


def _logit(gate: float) -> float:
    """Where a sigmoid is `gate`."""
    return math.log(gate / (1 - gate))


def _gam(block: GAM, gate: float) -> Iterator[tuple[Any, float]]:
    if block.shuffle == "features":
        raise ValueError("GAM with shuffle='features' permutes the channels: never the identity")
    yield block.channel_attention.fc2, _logit(gate) if block.channel_gate == "sigmoid" else 1.0
    yield block.spatial_attention.norm2, _logit(gate)


def _cbam(block: CBAM, gate: float) -> Iterator[tuple[Any, float]]:
    spatial = block.spatial_attention
    yield block.channel_attention.fc2, _logit(gate) / 2  # of the average and of the maximum
    yield spatial.conv if spatial.norm is None else spatial.norm, _logit(gate)


def _se(block: SqueezeExcitation, gate: float) -> Iterator[tuple[Any, float]]:
    yield block.fc2, 6 * gate - 3 if block.gate == "hard_sigmoid" else _logit(gate)


def _bam(block: BAM, gate: float) -> Iterator[tuple[Any, float]]:
    root, half = math.sqrt(_logit(gate)), _logit(gate) / 2
    yield block.channel_attention.fc2, root if block.combine == "product" else -half
    yield block.spatial_attention.conv4, -root if block.combine == "product" else -half


CONSTANTS: dict[type[nnx.Module], Callable[[Any, float], Iterator[tuple[Any, float]]]] = {
    GAM: _gam,
    CBAM: _cbam,
    SqueezeExcitation: _se,
    BAM: _bam,
}
"""Of each block, the layers that are to return a constant, and which."""


def _make_constant(layer: Any, value: float) -> None:
    weight = layer.scale if isinstance(layer, BatchNorm) else layer.kernel
    weight[...] = jnp.zeros_like(weight[...])
    layer.bias[...] = jnp.full_like(layer.bias[...], value)
