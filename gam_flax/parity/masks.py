"""Dropout whose mask is given, so that two frameworks leave out the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np

from gam_flax.parity.align import check_names
from gam_flax.parity.trace import channels_first

Masks = Mapping[str, np.ndarray]
"""Path of a layer that drops numbers → what is kept, 1 or 0, in Flax's layout. Axes of length one
are broadcast, as for a layer that drops whole channels or examples."""

_RATES = ("p", "rate", "drop_prob", "drop_rate")  # what such layers call their probability

REFUSED = (
    "draws random numbers, which two frameworks cannot draw alike: compare with train=False, set "
    "its probability to 0, or give what its Dropout keeps (masks=)"
)


def rate(layer: Any) -> float | None:
    """The probability with which a layer drops a number; None for a layer of another kind."""
    found = (getattr(layer, name, None) for name in _RATES)
    return next((float(value) for value in found if isinstance(value, (int, float))), None)


def masked_torch(model: Any, masks: Masks) -> Any:
    """A copy of a torch model in which these layers compute x · mask / (1 − p) in training.

    Raises:
        ValueError: a path is of no layer, or of one without a probability.
    """
    from torch import nn

    class Masked(nn.Module):
        def __init__(self, p: float, mask: np.ndarray):
            super().__init__()
            self.p, self.mask = p, mask

        def forward(self, x: Any) -> Any:
            if not self.training:
                return x
            return x * x.new_tensor(_fitting(self.mask, tuple(x.shape))) / (1 - self.p)

    check_names("masks", masks, model)
    model = deepcopy(model)
    for path, mask in masks.items():
        p = rate(model.get_submodule(path))
        if p is None:
            raise ValueError(f"masks= names {path!r}, which has no probability ({_RATES})")
        model.set_submodule(path, Masked(p, np.asarray(mask, np.float64)))
    return model


def dropped(mask: np.ndarray, layer: Any, x: Any, *rest: Any) -> Any:
    """What a Flax layer that drops numbers gives, called with x and whatever else it takes.

    Raises:
        ValueError: the mask does not fit.
    """
    import jax.numpy as jnp

    if not _fits(mask.shape, x.shape):
        raise ValueError(f"a mask of shape {mask.shape} does not fit Flax's tensor, {x.shape}")
    return x * jnp.asarray(mask, x.dtype) / (1 - (rate(layer) or 0.0))


def _fitting(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The mask in the layout of a torch tensor: channels first, or as it is."""
    for moved in (channels_first(mask), mask):
        if _fits(moved.shape, shape):
            return moved
    raise ValueError(f"a mask of shape {mask.shape} does not fit torch's tensor, {shape}")


def _fits(mask: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(mask) == len(shape) and all(m in (1, n) for m, n in zip(mask, shape, strict=True))
