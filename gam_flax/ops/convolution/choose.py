"""Which way to compute a convolution on a CPU: a cost model, fitted to measurements."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gam_flax.ops.convolution.fourier import Padding, Tiling, cut

SLAB = 20e6
"""Bytes of a kernel's spectrum at a time: what stays in a cache while it is used."""

ARENA = 32e6
"""Bytes that glibc keeps for a process. Beyond it every call gets its memory from the kernel
page by page, which was measured to cost 0.3 s a GB."""

LONGEST = 64
"""Points of the longest period. The transforms, products with n × n matrices, grow with n."""

USUAL_BATCH = 8
"""Taken for a batch whose size is not known yet, as in an export."""

MARGIN = 0.7
"""Another way is taken where it promises to take this part of the plain one's time."""


class Shape(NamedTuple):
    """All that the choice depends on."""

    batch: int
    sizes: tuple[int, int]
    channels: int
    outputs: int
    kernel_size: tuple[int, int]
    strides: tuple[int, int] = (1, 1)
    padding: Padding = ((0, 0), (0, 0))
    groups: int = 1
    bytes: int = 4
    known: bool = True

    @classmethod
    def of(
        cls,
        x: Array | jax.ShapeDtypeStruct,
        kernel: Array | jax.ShapeDtypeStruct,
        strides: tuple[int, int],
        padding: Padding,
        groups: int,
    ) -> Shape:
        batch, high, wide, channels = x.shape
        return cls(
            batch if isinstance(batch, int) else USUAL_BATCH,
            (high, wide),
            channels,
            kernel.shape[-1],
            (kernel.shape[0], kernel.shape[1]),
            strides,
            padding,
            groups,
            x.dtype.itemsize,
            x.dtype in (jnp.float32, jnp.float64)
            and _is_whole([high, wide, channels])
            and batch != 0,
        )

    @property
    def depthwise(self) -> bool:
        return self.groups > 1 and self.groups == self.channels == self.outputs

    def one_group(self) -> Shape:
        channels, outputs = self.channels // self.groups, self.outputs // self.groups
        return self._replace(channels=channels, outputs=outputs, groups=1)

    @property
    def pixels(self) -> int:
        """Of all outputs."""
        return self.batch * math.prod(
            size + sum(pads) - k + 1
            for size, pads, k in zip(self.sizes, self.padding, self.kernel_size, strict=True)
        )


def _is_whole(sizes: list[Any]) -> bool:
    return all(isinstance(size, int) and size > 0 for size in sizes)


class Cost(NamedTuple):
    """What a model's coefficients are multiplied with."""

    transforms: float
    products: float
    spectrum: float
    moved: float
    steps: float
    spill: float


PLAIN_FORWARD = (6.9e-12, 8.0e-10)
PLAIN = (1.83e-11, 5.0e-9)
FOURIER = Cost(4.96e-11, 2.51e-11, 2.76e-9, 1.62e-10, 4.1e-5, 3.9e-10)
PREPARED = Cost(1.9e-11, 7.8e-12, 6.4e-11, 2.4e-10, 3.1e-5, 4.6e-10)
"""Seconds for each of what the features count: forward and backward, but for PLAIN_FORWARD and
PREPARED, which are forward alone. `python -m benchmarks.convolution_model fit` found them, from
100 random convolutions on two cores of an AMD EPYC 9005 with jax 0.10.2; only their ratios
matter."""


def plain_features(shape: Shape) -> tuple[float, float]:
    """Multiplications, and numbers read and written."""
    taps = math.prod(shape.kernel_size)
    numbers = shape.pixels * (shape.channels + shape.outputs)
    return shape.pixels * taps * shape.channels * shape.outputs, numbers


def fourier_features(shape: Shape, tiling: Tiling, *, prepared: bool = False) -> Cost:
    """Multiplications of both kinds, numbers of spectra made or read, numbers of pictures moved,
    steps of loops, bytes beyond the arena."""
    (high, wide), (n, m) = _cuts(shape, tiling.periods), tiling.periods
    images = tiling.images or shape.batch
    chunks = -(-shape.batch // images)
    tiles = high.count * wide.count * images
    half = n // 2 + 1
    into = half * 2 * (high.inputs * wide.inputs + m * 2 * wide.inputs)
    back = half * 2 * (high.outputs * wide.outputs + m * 2 * wide.outputs)
    pair = shape.channels * shape.outputs
    steps = 1 if prepared else -(-half // tiling.rows)
    rows = half / steps
    across = wide.inputs + m  # points of a row of frequencies before and after its transform
    moved = 2 * half * (across * shape.channels + (2 * m + wide.outputs) * shape.outputs)
    moved += 2 * high.inputs * wide.inputs * shape.channels
    numbers = shape.channels + 2 * shape.outputs
    temporary = 2 * tiles * (half * wide.inputs * shape.channels + rows * m * numbers)
    temporary += 0 if prepared else 2 * rows * m * pair
    return Cost(
        chunks * tiles * (into * shape.channels + back * shape.outputs),
        chunks * tiles * 4 * half * m * pair,
        chunks * 2 * half * m * pair,
        chunks * tiles * moved,
        chunks * steps,
        chunks * max(0.0, temporary * shape.bytes - ARENA),
    )


def _cuts(shape: Shape, periods: tuple[int, int]):
    return [cut(shape.sizes[i], shape.kernel_size[i], shape.padding[i], periods[i]) for i in (0, 1)]


def seconds(cost: tuple[float, ...], model: tuple[float, ...]) -> float:
    return float(np.dot(cost, model))


@lru_cache(maxsize=4096)
def best_tiling(
    shape: Shape, *, prepared: bool = False, periods: tuple[int, int] | None = None
) -> Tiling | None:
    """The cheapest of the tilings worth trying; None where none fits.

    periods: of a spectrum that is there already.
    """
    return min(
        tilings(shape, prepared=prepared, periods=periods),
        key=lambda tiling: _fourier_seconds(shape, tiling, prepared),
        default=None,
    )


def cheapest_tiling(shape: Shape, *, prepared: bool = False) -> Tiling | None:
    """`best_tiling` where it is cheaper than the plain convolution."""
    tiling = best_tiling(shape, prepared=prepared)
    if tiling is None:
        return None
    plain = seconds(plain_features(shape), PLAIN_FORWARD if prepared else PLAIN)
    return tiling if _fourier_seconds(shape, tiling, prepared) < MARGIN * plain else None


def _fourier_seconds(shape: Shape, tiling: Tiling, prepared: bool) -> float:
    cost = fourier_features(shape, tiling, prepared=prepared)
    return seconds(cost, PREPARED if prepared else FOURIER)


def tilings(
    shape: Shape, *, prepared: bool = False, periods: tuple[int, int] | None = None
) -> list[Tiling]:
    """One tile for the whole picture, or two, three, … along each axis."""
    found = []
    counts = range(1, 9)
    choices = [(_period(shape, 0, count), _period(shape, 1, count)) for count in counts]
    for some in [periods] if periods else choices:
        if max(some) > LONGEST and not periods:
            continue
        half = some[0] // 2 + 1
        row = some[1] * 2 * shape.channels * shape.outputs * shape.bytes
        rows = half if prepared else min(half, max(1, int(SLAB // row)))
        rows = -(-half // -(-half // rows))  # as many steps, evenly filled
        images = {0, *(size for size in (1, 2, 4, 8, 16) if size < shape.batch)}
        found += [Tiling(some, rows, few) for few in sorted(images)]
    return found


def _period(shape: Shape, axis: int, count: int) -> int:
    size, k, padding = shape.sizes[axis], shape.kernel_size[axis], shape.padding[axis]
    if count == 1:
        return max(size + max(padding), k)
    return -(-(size + sum(padding) - k + 1) // count) + k - 1
