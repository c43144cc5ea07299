"""Which variant a block is, decided by one saved pair of its input and output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from gam_flax.convert.blocks import Block, alone
from gam_flax.convert.checkpoint import Checkpoint
from gam_flax.convert.errors import CheckpointError, shorten
from gam_flax.convert.into_flax import load_torch

KNOWN_EPS = (1e-5, 1e-3)
"""torch's default and YOLO's: what a norm may have where the file does not tell."""

FITS = 1e-2
CLEAR = 10.0
"""A candidate is the truth when its distance is below FITS, as even a half-precision network's
is, and CLEAR times smaller than any other's."""


@dataclass(frozen=True)
class Candidate:
    """One way to read a block, and how far its output is from the saved one.

    distance: max|y − saved| / max|saved|, computed in float64.
    """

    variant: str
    eps: float | None
    distance: float


def rank_variants(
    checkpoint: Checkpoint, block: Block, x: np.ndarray, y: np.ndarray
) -> list[Candidate]:
    """Every variant that the weights allow, nearest first.

    The block runs in evaluation mode in float64, with the eps that the file tells, or with
    torch's default and YOLO's where it tells none.

    Args:
        checkpoint: what holds the block, in torch's layout.
        block: one of `identify(checkpoint)`.
        x, y: a saved input and the output that the true block gave, both (B, C, H, W) or both
            (B, H, W, C).

    Raises:
        CheckpointError: the arrays do not fit the block.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from gam_flax.attention.registry import create_attention

    x, y = (_channels_last(array, block, name) for array, name in ((x, "input"), (y, "output")))
    if x.shape != y.shape:
        raise CheckpointError(f"input {x.shape} and output {y.shape} of a block differ in shape")
    has_norm = any(layer.rpartition(".")[2].startswith("norm") for layer in block.layers.values())
    known = block.options.get("norm_eps")
    settings = (known,) if known is not None or not has_norm else KNOWN_EPS
    scale = float(np.abs(y).max()) or 1.0
    ranked = []
    with jax.enable_x64(True):
        for variant, eps in product(block.variants, settings):
            options: Mapping[str, Any] = {**block.arguments(variant)}
            if eps is not None:
                options = {**options, "norm_eps": eps}
            model = create_attention(
                block.kind, **options, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
            )
            load_torch(model, alone(checkpoint, block, variant))
            model.eval()
            error = np.abs(np.asarray(model(jnp.asarray(x, jnp.float64))) - y).max()
            distance = float(error) / scale if np.isfinite(error) else float("inf")
            ranked.append(Candidate(variant, eps, distance))
    return sorted(ranked, key=lambda candidate: candidate.distance)


def settled(ranked: list[Candidate]) -> Candidate | None:
    """The candidate that is the truth, or None where none fits or two fit alike."""
    best, *others = ranked
    clear = all(other.distance > CLEAR * best.distance for other in others)
    return best if best.distance < FITS and clear else None


def _channels_last(array: np.ndarray, block: Block, name: str) -> np.ndarray:
    if array.ndim == 4 and array.shape[1] == block.channels:
        return array.transpose(0, 2, 3, 1).astype(np.float64)
    if array.ndim == 4 and array.shape[3] == block.channels:
        return array.astype(np.float64)
    raise CheckpointError(
        f"the {name} is {array.shape}; {shorten(block.prefix) or 'the block'} wants "
        f"(batch, {block.channels}, height, width)"
    )
