"""Which way to compute a convolution on a CPU: a cost model, fitted to measurements of machines
that differ. A way is taken only where it is the faster one on each of them."""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import product
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from gam_flax.ops.convolution.direct import merged_groups
from gam_flax.ops.convolution.tiles import (
    Cut,
    Padding,
    Side,
    Tiling,
    adjoint_padding,
    cuts,
    output_sizes,
)

SLAB = 15e6
"""Bytes of the spectra that a step makes, of pictures, kernel and products: what stays in a cache
while it is used. Half of it and twice as much were measured to be slower."""

NEAR = 16e6
"""Bytes of what a step makes for the next. More of it leaves the caches, and what glibc keeps for
a process: memory from the kernel was measured to cost 0.3 s a GB."""

LARGE = 8e6
"""Numbers of a kernel that is taken in parts. A step for some rows of frequencies reads all of the
kernel, or adds to all of its gradient: of 2048 × 128 channels, 7 × 7, and 8 pictures of 7 × 7 the
gradients take 88 and 67 ms so, and 50 and 43 in parts. With smaller kernels it was slower."""

LONGEST = 64
"""Points of the longest period. The transforms, products with n × n matrices, grow with n."""

USUAL_BATCH = 8
"""Taken for a batch whose size is not known yet, as in an export."""


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
    def merged(self) -> Shape:
        """With as many groups as are computed where there are no tiles."""
        return self._replace(groups=merged_groups(self.channels, self.outputs, self.groups))

    @property
    def adjoint(self) -> Shape | None:
        """The convolution that is the gradient by the pictures; None where that is none."""
        padding = adjoint_padding(self.kernel_size, self.padding)
        if self.strides != (1, 1) or min(*padding[0], *padding[1]) < 0:
            return None
        return self._replace(
            sizes=self.output_sizes, channels=self.outputs, outputs=self.channels, padding=padding
        )

    @property
    def output_sizes(self) -> tuple[int, int]:
        """Of stride 1."""
        return output_sizes(self.sizes, self.kernel_size, self.padding)

    @property
    def pairs(self) -> int:
        """Of channels and outputs that see each other."""
        return self.channels * self.outputs // self.groups

    @property
    def pixels(self) -> int:
        """Of all outputs."""
        return self.batch * math.prod(self.output_sizes)


def _is_whole(sizes: list[Any]) -> bool:
    return all(isinstance(size, int) and size > 0 for size in sizes)


class PlainCost(NamedTuple):
    """What XLA's convolution has to do: multiplications; numbers of the patches around all pixels,
    of inputs and (going backward) of outputs; numbers of pictures; numbers of the kernel."""

    products: float
    patches: float
    output_patches: float
    numbers: float
    kernel: float


class Cost(NamedTuple):
    """What Fourier tiles have to do: multiplications of the transforms and between spectra; numbers
    of spectra made or read; numbers of pictures moved; steps of loops; numbers moved, and of
    spectra read, beyond what is near; numbers of tiles that do not divide the picture."""

    transforms: float
    products: float
    spectrum: float
    moved: float
    steps: float
    far: float
    far_spectrum: float
    uneven: float


Way = Literal["fourier", "fourier_by_kernel", "prepared"]
"""Of tiles: a convolution (the gradient by the pictures is one), the gradient by the kernel, and
a convolution whose kernel's spectrum is there."""

FEW = 8

MARGINS: dict[Way, tuple[float, float]] = {
    "fourier": (0.65, 0.9),
    "fourier_by_kernel": (0.9, 0.9),
    "prepared": (0.8, 0.8),
}
"""Tiles are taken where they promise to take this part of the time without them: of fewer than
`FEW` pictures, and of more. With few a kernel's transform is most of what a convolution takes, and
there the model is further off."""


def functions(shape: Shape) -> dict[str, tuple[Shape, Way]]:
    """Those of a convolution of stride 1 that may have tiles, by their names in a `Plan`."""
    found: dict[str, tuple[Shape, Way]] = {
        "result": (shape, "fourier"),
        "by_kernel": (shape, "fourier_by_kernel"),
    }
    return found if shape.adjoint is None else {**found, "by_pictures": (shape.adjoint, "fourier")}


class Machine(NamedTuple):
    """Seconds for each of what is counted, on one machine. Only their ratios matter."""

    name: str
    plain: PlainCost
    plain_by_kernel: PlainCost
    fourier: Cost
    fourier_by_kernel: Cost
    prepared: Cost


MACHINES = (
    Machine(
        "epyc-9005",
        PlainCost(5.9e-12, 7.84e-11, 1.18e-11, 5.18e-10, 5.24e-10),
        PlainCost(8.08e-12, 1.54e-10, 0, 1.54e-09, 9.71e-10),
        Cost(7.86e-12, 4.11e-12, 3.91e-10, 2.34e-10, 2.75e-06, 5.4e-10, 0, 1.31e-10),
        Cost(5.03e-12, 1.11e-11, 9.75e-10, 2.33e-10, 3.93e-05, 4.95e-10, 0, 6.71e-10),
        Cost(1.44e-11, 7.12e-12, 3.79e-11, 1.84e-10, 1.26e-05, 2.86e-10, 9.93e-11, 9.77e-11),
    ),
    Machine(
        "epyc-9004",
        PlainCost(1.38e-11, 7.88e-11, 2.22e-11, 5.12e-10, 2.5e-10),
        PlainCost(9.19e-12, 5.35e-10, 1.87e-11, 3.5e-10, 1.44e-09),
        Cost(2.8e-11, 1.78e-11, 1.54e-10, 3.77e-10, 2.27e-06, 3.4e-10, 0, 7.57e-10),
        Cost(1.33e-11, 1.47e-11, 8.28e-10, 4.47e-10, 4.92e-05, 5.25e-10, 0, 2.14e-09),
        Cost(2.19e-11, 8.2e-12, 7.58e-11, 3.96e-10, 1.27e-05, 1.09e-10, 2.08e-10, 1.27e-09),
    ),
    Machine(
        "xeon-5",
        PlainCost(1.14e-11, 5.63e-11, 3.62e-12, 1.01e-09, 9.11e-10),
        PlainCost(7.55e-12, 5.36e-10, 2.13e-11, 7.22e-10, 1.29e-09),
        Cost(1.77e-11, 8.67e-12, 4.6e-10, 6.22e-10, 1.79e-05, 6.51e-10, 0, 7.6e-10),
        Cost(8.66e-12, 1.27e-11, 9.4e-10, 7.16e-10, 0.000142, 1.9e-10, 0, 1.29e-09),
        Cost(2.07e-11, 8.63e-12, 1.56e-10, 5.75e-10, 2.17e-07, 2.79e-10, 3.07e-11, 8.1e-10),
    ),
)
"""Two cores each, with jax 0.10.2: an AMD EPYC 9005 (450 GFLOP/s of products, 43 GB/s of memory), a
9004 (200 and 49), and an Intel Xeon of the fifth generation (300 and 30).
`python -m benchmarks.convolution_model` measured random convolutions there and fitted these; on the
9005 before overlap-add and before products kept their order, so that promises rather too little."""


def plain_features(shape: Shape) -> PlainCost:
    taps = math.prod(shape.kernel_size)
    pairs = shape.pairs
    return PlainCost(
        shape.pixels * taps * pairs,
        shape.pixels * taps * shape.channels,
        shape.pixels * taps * shape.outputs,
        shape.pixels * (shape.channels + shape.outputs),
        taps * pairs,
    )


def fourier_features(shape: Shape, tiling: Tiling, way: Way) -> Cost:
    both, (n, m) = _cuts(shape, tiling), tiling.periods
    high, wide = (one.inputs.width for one in both)
    high_out, wide_out = (one.outputs.width for one in both)
    images = tiling.images or shape.batch
    chunks = -(-shape.batch // images)
    tiles, half = math.prod(one.count for one in both) * images, n // 2 + 1
    channels, outputs = shape.channels, shape.outputs
    pairs = shape.pairs
    steps = 1 if way == "prepared" else -(-half // tiling.rows)
    rows = half / steps
    into = half * 2 * (high * wide + m * 2 * wide)
    back = half * 2 * (high_out * wide_out + m * 2 * wide_out)
    transforms = tiles * (into * channels + back * outputs)
    twice = _twice(shape, way)
    moved = 2 * half * ((wide + m) * channels + (wide_out + m) * outputs + m * twice)
    pixels = high * wide * channels + high_out * wide_out * outputs
    moved += 2 * pixels
    uneven = any(
        one.count > 1 and size % one.step for one, size in zip(both, shape.sizes, strict=True)
    )
    temporary = 2 * tiles * half * (wide * channels + wide_out * outputs)
    temporary += 2 * rows * m * tiles * (channels + outputs + twice)
    if way == "fourier_by_kernel":
        down, along = shape.kernel_size
        transforms += half * 2 * along * (2 * m + down) * pairs
    if way != "prepared":
        temporary += 2 * rows * m * pairs / tiling.parts
    spectrum = _spectrum(shape, tiling.periods)
    return Cost(
        chunks * transforms,
        chunks * tiles * 2 * spectrum,
        chunks * spectrum,
        chunks * tiles * moved,
        chunks * steps,
        chunks * tiles * moved * _far(temporary * shape.bytes),
        chunks * spectrum * _far(spectrum * shape.bytes) if way == "prepared" else 0.0,
        chunks * tiles * pixels * uneven,
    )


def _spectrum(shape: Shape, periods: tuple[int, int]) -> int:
    """Numbers of the kernel's spectrum, each counted once."""
    return 2 * (periods[0] // 2 + 1) * periods[1] * shape.pairs


def _twice(shape: Shape, way: Way) -> int:
    """The channels whose real and imaginary parts a product has twice."""
    return shape.channels if way == "fourier_by_kernel" else min(shape.channels, shape.outputs)


def _far(size: float) -> float:
    """The part of so many bytes that is not near."""
    return max(0.0, 1 - NEAR / size)


def _cuts(shape: Shape, tiling: Tiling) -> tuple[Cut, Cut]:
    return cuts(shape.sizes, shape.kernel_size, shape.padding, tiling)


def seconds(cost: tuple[float, ...], model: tuple[float, ...]) -> float:
    return float(np.dot(cost, model))


Plain = Literal["plain", "plain_by_kernel"]
"""Of what there is without tiles: a convolution, and the gradient by the kernel."""

PLAIN: dict[Way, Plain] = {
    "fourier": "plain",
    "fourier_by_kernel": "plain_by_kernel",
    "prepared": "plain",
}
"""What tiles are compared with: what there is without them."""


def without_tiles(shape: Shape, plain: Plain) -> PlainCost:
    return plain_features(shape.merged if plain == "plain" else shape)


def share(shape: Shape, tiling: Tiling, way: Way) -> float:
    """The part of plain's time that tiles take: the largest that a machine of `MACHINES` says."""
    plain, tiles = without_tiles(shape, PLAIN[way]), fourier_features(shape, tiling, way)
    return max(
        seconds(tiles, getattr(machine, way)) / seconds(plain, getattr(machine, PLAIN[way]))
        for machine in MACHINES
    )


@lru_cache(maxsize=4096)
def best_tiling(
    shape: Shape, way: Way = "fourier", *, periods: tuple[int, int] | None = None
) -> Tiling | None:
    """The cheapest of the tilings worth trying; None where none fits.

    periods: of a spectrum that is there already.
    """
    return min(
        tilings(shape, way, periods=periods),
        key=lambda tiling: share(shape, tiling, way),
        default=None,
    )


def cheapest_tiling(shape: Shape, way: Way = "fourier") -> Tiling | None:
    """`best_tiling` where it is cheaper than the plain convolution."""
    tiling = best_tiling(shape, way)
    return tiling if tiling and share(shape, tiling, way) <= margin(shape, way) else None


def margin(shape: Shape, way: Way) -> float:
    return MARGINS[way][shape.batch >= FEW]


MAKING = 1.1
"""At least so much more time is taken where a spectrum must be made first."""


class Preparation(NamedTuple):
    """How a kernel may be kept for inference: as it is (None), or as its spectrum.

    seconds: of a call on the first of `MACHINES`. bytes: of the spectrum.
    """

    periods: tuple[int, int] | None
    seconds: float
    bytes: int


def preparations(shape: Shape) -> list[Preparation]:
    """As it is, and each period whose spectrum makes the convolution cheaper."""
    plain = seconds(without_tiles(shape, "plain"), MACHINES[0].plain)
    found = []
    for periods in {tiling.periods for tiling in tilings(shape, "prepared")}:
        tiling = best_tiling(shape, "prepared", periods=periods)
        assert tiling is not None
        part = share(shape, tiling, "prepared")
        if part <= margin(shape, "prepared"):
            size = _spectrum(shape, periods) * shape.bytes
            found.append(Preparation(periods, part * plain, size))
    # The models are of measurements apart, but no spectrum is made sooner than it is read.
    tiling = cheapest_tiling(shape)
    made = share(shape, tiling, "fourier") * plain if tiling else plain
    soonest = min((one.seconds for one in found), default=0.0)
    return [Preparation(None, max(made, soonest * MAKING), 0), *found]


def tilings(
    shape: Shape, way: Way = "fourier", *, periods: tuple[int, int] | None = None
) -> list[Tiling]:
    """One tile for the whole picture, or two, three, … along each axis."""
    found = []
    counts = range(1, 9)
    choices = [(_period(shape, 0, count), _period(shape, 1, count)) for count in counts]
    # The narrow side overlaps: it is the shorter one to copy, and to transform.
    overlap: Side = "inputs" if shape.channels <= shape.outputs else "outputs"
    sizes = 0, *(size for size in (1, 2, 4, 8, 16) if size < shape.batch)
    for some, images in product([periods] if periods else choices, sizes):
        if max(some) > LONGEST and not periods:
            continue
        half = some[0] // 2 + 1
        tiling = Tiling(some, half, images, overlap)
        found.append(tiling if way == "prepared" else _in_steps(shape, tiling, way))
    return found


def _in_steps(shape: Shape, tiling: Tiling, way: Way) -> Tiling:
    if shape.groups == 1 and math.prod(shape.kernel_size) * shape.pairs > LARGE:
        return tiling._replace(parts=_parts(shape, tiling))
    return tiling._replace(rows=_rows_at_a_time(shape, tiling, way))


def _parts(shape: Shape, tiling: Tiling) -> int:
    """So many that the spectrum of one fits into `SLAB`."""
    wide = max(shape.channels, shape.outputs)
    size = _spectrum(shape, tiling.periods) * shape.bytes
    return min(n for n in range(1, wide + 1) if wide % n == 0 and (size <= n * SLAB or n == wide))


def _rows_at_a_time(shape: Shape, tiling: Tiling, way: Way) -> int:
    """As many rows of frequencies as fit into `SLAB`, or a few less that fill the steps evenly."""
    high, wide = _cuts(shape, tiling)
    tiles = high.count * wide.count * (tiling.images or shape.batch)
    channels, outputs = shape.channels, shape.outputs
    twice = _twice(shape, way)
    pairs = shape.pairs
    row = tiling.periods[1] * 2 * (pairs + tiles * (channels + outputs + twice))
    rows = min(tiling.rows, max(1, int(SLAB // (row * shape.bytes))))
    return -(-tiling.rows // -(-tiling.rows // rows))


def _period(shape: Shape, axis: int, count: int) -> int:
    size, k, padding = shape.sizes[axis], shape.kernel_size[axis], shape.padding[axis]
    if count == 1:
        return max(size + max(padding), k)
    return -(-(size + sum(padding) - k + 1) // count) + k - 1
