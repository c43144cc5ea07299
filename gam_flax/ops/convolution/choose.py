"""Which way to compute a convolution on a CPU: a cost model, fitted to measurements of machines
that differ. A way is taken only where it is the faster one on each of them."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gam_flax.ops.convolution.fourier import Padding, Tiling, cut

SLAB = 15e6
"""Bytes of the spectra that a step makes, of pictures, kernel and products: what stays in a cache
while it is used. Half of it and twice as much were measured to be slower."""

NEAR = 16e6
"""Bytes of what a step makes for the next. More of it leaves the caches, and what glibc keeps for
a process: memory from the kernel was measured to cost 0.3 s a GB."""

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

    @property
    def pointwise(self) -> bool:
        bare = self.padding == ((0, 0), (0, 0)) and self.kernel_size == (1, 1)
        return bare and self.groups == 1 and self.known

    @property
    def pixels(self) -> int:
        """Of all outputs."""
        return self.batch * math.prod(
            size + sum(pads) - k + 1
            for size, pads, k in zip(self.sizes, self.padding, self.kernel_size, strict=True)
        )


def _is_whole(sizes: list[Any]) -> bool:
    return all(isinstance(size, int) and size > 0 for size in sizes)


class PlainCost(NamedTuple):
    """What `lax.conv_general_dilated` has to do: multiplications, as products of matrices or in a
    loop; numbers of the patches around all pixels, of inputs and (going backward) of outputs;
    numbers of pictures; numbers of the kernel."""

    products: float
    naive: float
    patches: float
    output_patches: float
    numbers: float
    kernel: float


class Cost(NamedTuple):
    """What Fourier tiles have to do: multiplications of the transforms and between spectra; numbers
    of spectra made or read; numbers of pictures moved; steps of loops; numbers moved beyond what
    is near."""

    transforms: float
    products: float
    spectrum: float
    moved: float
    steps: float
    far: float


class Machine(NamedTuple):
    """Seconds for each of what is counted, on one machine: `plain` and `fourier` forward and
    backward, `plain_forward` and `prepared` forward alone. Only their ratios matter."""

    name: str
    plain_forward: PlainCost
    plain: PlainCost
    fourier: Cost
    prepared: Cost


MACHINES = (
    Machine(
        "epyc-9005",
        PlainCost(5.05e-12, 4.94e-11, 9e-11, 1.88e-11, 2.42e-10, 4.35e-10),
        PlainCost(1.15e-11, 6.94e-11, 2.69e-10, 5.57e-11, 1.91e-9, 1.81e-9),
        Cost(9.78e-12, 1.89e-11, 2.42e-9, 7.6e-10, 6.38e-6, 1.36e-9),
        Cost(1.26e-11, 6.61e-12, 5.89e-11, 1.82e-10, 6e-6, 4.16e-10),
    ),
)
"""Two cores of an AMD EPYC 9005 (536 GFLOP/s of products, 73 GB/s of memory) with jax 0.10.2.
`python -m benchmarks.convolution_model` measured random convolutions there and fitted these;
plain's gradients were measured as XLA makes them, not in pieces."""


def plain_features(shape: Shape) -> PlainCost:
    taps = math.prod(shape.kernel_size)
    pairs = shape.channels * shape.outputs // shape.groups
    products = shape.pixels * taps * pairs
    # XLA has a loop of its own for a kernel that is larger than the picture.
    naive = any(k > size for k, size in zip(shape.kernel_size, shape.sizes, strict=True))
    return PlainCost(
        0 if naive else products,
        products if naive else 0,
        shape.pixels * taps * shape.channels,
        shape.pixels * taps * shape.outputs,
        shape.pixels * (shape.channels + shape.outputs),
        taps * pairs,
    )


def fourier_features(shape: Shape, tiling: Tiling, *, prepared: bool = False) -> Cost:
    (high, wide), (n, m) = _cuts(shape, tiling.periods), tiling.periods
    images = tiling.images or shape.batch
    chunks = -(-shape.batch // images)
    tiles = high.count * wide.count * images
    half = n // 2 + 1
    into = half * 2 * (high.inputs * wide.inputs + m * 2 * wide.inputs)
    back = half * 2 * (high.outputs * wide.outputs + m * 2 * wide.outputs)
    pairs = shape.channels * shape.outputs // shape.groups
    steps = 1 if prepared else -(-half // tiling.rows)
    rows = half / steps
    across = wide.inputs + m  # points of a row of frequencies before and after its transform
    moved = 2 * half * (across * shape.channels + (2 * m + wide.outputs) * shape.outputs)
    moved += 2 * high.inputs * wide.inputs * shape.channels
    numbers = shape.channels + 2 * shape.outputs
    temporary = 2 * tiles * (half * wide.inputs * shape.channels + rows * m * numbers)
    temporary += 0 if prepared else 2 * rows * m * pairs
    return Cost(
        chunks * tiles * (into * shape.channels + back * shape.outputs),
        chunks * tiles * 4 * half * m * pairs,
        chunks * 2 * half * m * pairs,
        chunks * tiles * moved,
        chunks * steps,
        chunks * tiles * moved * max(0.0, 1 - NEAR / (temporary * shape.bytes)),
    )


def _cuts(shape: Shape, periods: tuple[int, int]):
    return [cut(shape.sizes[i], shape.kernel_size[i], shape.padding[i], periods[i]) for i in (0, 1)]


def seconds(cost: tuple[float, ...], model: tuple[float, ...]) -> float:
    return float(np.dot(cost, model))


def share(shape: Shape, tiling: Tiling, *, prepared: bool = False) -> float:
    """The part of plain's time that tiles take: the largest that a machine of `MACHINES` says."""
    plain, tiles = plain_features(shape), fourier_features(shape, tiling, prepared=prepared)
    if prepared:
        return max(seconds(tiles, m.prepared) / seconds(plain, m.plain_forward) for m in MACHINES)
    return max(seconds(tiles, m.fourier) / seconds(plain, m.plain) for m in MACHINES)


@lru_cache(maxsize=4096)
def best_tiling(
    shape: Shape, *, prepared: bool = False, periods: tuple[int, int] | None = None
) -> Tiling | None:
    """The cheapest of the tilings worth trying; None where none fits.

    periods: of a spectrum that is there already.
    """
    return min(
        tilings(shape, prepared=prepared, periods=periods),
        key=lambda tiling: share(shape, tiling, prepared=prepared),
        default=None,
    )


def cheapest_tiling(shape: Shape) -> Tiling | None:
    """`best_tiling` where it is cheaper than the plain convolution."""
    tiling = best_tiling(shape)
    return None if tiling is None or share(shape, tiling) > MARGIN else tiling


class Preparation(NamedTuple):
    """How a kernel may be kept for inference: as it is (None), or as its spectrum.

    seconds: of a call on the first of `MACHINES`. bytes: of the spectrum.
    """

    periods: tuple[int, int] | None
    seconds: float
    bytes: int


def preparations(shape: Shape) -> list[Preparation]:
    """As it is, and each period whose spectrum makes the convolution cheaper."""
    plain = seconds(plain_features(shape), MACHINES[0].plain_forward)
    found = [Preparation(None, plain, 0)]
    for periods in {tiling.periods for tiling in tilings(shape, prepared=True)}:
        tiling = best_tiling(shape, prepared=True, periods=periods)
        assert tiling is not None
        part = share(shape, tiling, prepared=True)
        pairs = shape.channels * shape.outputs // shape.groups
        numbers = 2 * (periods[0] // 2 + 1) * periods[1] * pairs
        if part < MARGIN:
            found.append(Preparation(periods, part * plain, numbers * shape.bytes))
    return found


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
        for images in (0, *(size for size in (1, 2, 4, 8, 16) if size < shape.batch)):
            rows = half if prepared else _rows_at_a_time(shape, Tiling(some, half, images))
            found.append(Tiling(some, rows, images))
    return found


def _rows_at_a_time(shape: Shape, tiling: Tiling) -> int:
    """As many rows of frequencies as fit into `SLAB`, or a few less that fill the steps evenly."""
    high, wide = _cuts(shape, tiling.periods)
    tiles = high.count * wide.count * (tiling.images or shape.batch)
    pairs = shape.channels * shape.outputs // shape.groups
    row = tiling.periods[1] * 2 * (pairs + tiles * (shape.channels + 2 * shape.outputs))
    rows = min(tiling.rows, max(1, int(SLAB // (row * shape.bytes))))
    return -(-tiling.rows // -(-tiling.rows // rows))


def _period(shape: Shape, axis: int, count: int) -> int:
    size, k, padding = shape.sizes[axis], shape.kernel_size[axis], shape.padding[axis]
    if count == 1:
        return max(size + max(padding), k)
    return -(-(size + sum(padding) - k + 1) // count) + k - 1
