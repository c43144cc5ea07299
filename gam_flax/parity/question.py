"""What is asked of a comparison, and on which inputs it is looked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from gam_flax.convert.rename import Rename
from gam_flax.parity.align import Layout
from gam_flax.parity.masks import Masks
from gam_flax.parity.optimizers import Optimizer

_NEIGHBOURS = 7  # runs beside the given one, over which a narrow dtype's errors are collected


@dataclass(frozen=True)
class Question:
    """The arguments of `compare`."""

    torch_model: Any
    flax_model: Any
    inputs: np.ndarray
    train: bool
    gradients: bool
    dtype: str
    steps: int
    optimizer: Optimizer
    loss: tuple[Callable[[Any], Any] | None, Callable[[Any], Any] | None]
    rename: Rename
    layout: Mapping[str, Layout]
    masks: Masks
    multiple: float

    @property
    def exact(self) -> bool:
        return self.dtype == "float64"


def samples(
    x: np.ndarray, keys: Iterable[str], dtype: str, count: int = _NEIGHBOURS, near: bool = False
) -> Iterator[tuple[np.ndarray, dict[str, float]]]:
    """The input and no factors; in a narrow dtype also neighbours, with factors for the tensors;
    `near`: neighbours alone, in any.

    A tensor of few numbers may be right by luck, and its error then is no measure of what the
    dtype can do. A neighbour has input and weights a few units off, which deals all roundings
    anew and changes nothing else.
    """
    floating = x.dtype.kind in "fV"  # numpy files bfloat16 under V
    kept = np.dtype(np.float64) if dtype == "float64" else ml_dtypes.finfo(dtype).dtype
    step = 8 * float(ml_dtypes.finfo(kept).eps)
    rng = np.random.default_rng(0)
    if not near:
        yield x.astype(kept).astype(np.float64) if floating else x, {}
    for _ in range(count if near or dtype != "float64" else 0):
        factors = {key: float(1 + step * rng.uniform(-1, 1)) for key in keys}
        moved = x.astype(np.float64) * (1 + step * rng.uniform(-1, 1, x.shape)) if floating else x
        yield moved.astype(kept).astype(np.float64) if floating else x, factors
