"""What the machine could do at best: a process that measures two rates and counts operations.

    python -m benchmarks.floor WORK...

prints, as the last line, {"products": FLOP/s of a large matrix product, "memory": bytes/s of a
large sum, "WORK SHAPE": seconds in which those would do the chosen algorithm's multiplications, or
read its kernels (or spectra) and read and write its pictures once, whichever takes longer}.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import gam_flax
from benchmarks.gam_block_inside import WORKS, Work, build
from benchmarks.inside import Stages, report
from gam_flax.ops.convolution import choose
from gam_flax.ops.convolution.choose import Shape
from gam_flax.ops.convolution.prepared import PreparedConv
from gam_flax.ops.convolution.tiles import Tiling
from gam_flax.optimize import get, shape_of, shapes_given

SIDE = 2048
NUMBERS = 100_000_000
BACKWARD = 3
"""A training step has two products for each forward: by the inputs and by the kernel."""


def rates() -> tuple[float, float]:
    """FLOP/s of products, bytes/s of reading."""
    square = jnp.ones((SIDE, SIDE), jnp.float32)
    long = jnp.ones(NUMBERS, jnp.float32)
    product = _seconds(jax.jit(jnp.matmul), square, square)
    return 2 * SIDE**3 / product, 4 * NUMBERS / _seconds(jax.jit(jnp.sum), long)


def _seconds(run: Callable[..., jax.Array], *args: jax.Array) -> float:
    run(*args).block_until_ready()
    stages = Stages()
    stages.repeat("call", lambda: run(*args).block_until_ready(), 9)
    return stages.seconds["call"]


Layer = nnx.Conv | PreparedConv | nnx.Linear


def counted(work: Work, shape: tuple[int, int, int]) -> tuple[float, float]:
    """Operations and bytes of a model's layers; norms and what is elementwise are left out."""
    batch, channels, side = shape
    pictures = batch, side, side, channels
    model = build(gam_flax, work, channels, rngs=nnx.Rngs(0))
    if not work.training:
        model = gam_flax.optimize_for_inference(model, pictures, **work.options)
    flops = moved = 0.0
    for path, calls in shapes_given(model, lambda one: isinstance(one, Layer), pictures).items():
        for given in calls:
            some = _of_layer(get(model, path), given, work.training)
            flops, moved = flops + some[0], moved + some[1]
    return flops, moved


def _of_layer(layer: Layer, given: tuple[int, ...], training: bool) -> tuple[float, float]:
    """What one layer has to do where it is given pictures, or features, of that shape."""
    if isinstance(layer, nnx.Linear):
        pixels, features = math.prod(given[:-1]), (layer.in_features, layer.out_features)
        one = 2 * pixels * math.prod(features), 4 * (pixels * sum(features) + math.prod(features))
        return _times(BACKWARD if training else 1, one)
    if isinstance(layer, PreparedConv):
        batch, high, wide, _ = given
        window, pads = layer.kernel_size, layer.padding
        shape = Shape(
            batch, (high, wide), *layer.features, window, padding=pads, groups=layer.groups
        )
        tiling = choose.best_tiling(shape, "prepared", periods=layer.periods)
        return _flops(shape, tiling, "prepared")
    shape = shape_of(layer, given)
    fewer = np.broadcast_to(np.asarray(layer.strides), 2).prod()
    if fewer > 1:
        plain = choose.plain_features(shape)
        numbers = shape.pixels * (shape.channels + shape.outputs / fewer)
        one = 2 * plain.products / fewer, 4 * (numbers + plain.kernel)
        return _times(BACKWARD if training else 1, one)
    functions = choose.functions(shape)
    some = functions.values() if training else [functions["result"]]
    each = [_flops(one, choose.cheapest_tiling(one, way), way) for one, way in some]
    return sum(flops for flops, _ in each), sum(moved for _, moved in each)


def _times(count: int, one: tuple[float, float]) -> tuple[float, float]:
    return count * one[0], count * one[1]


def _flops(shape: Shape, tiling: Tiling | None, way: choose.Way) -> tuple[float, float]:
    plain = choose.plain_features(shape)
    if tiling is None:
        return 2 * plain.products, 4 * (plain.numbers + plain.kernel)
    cost = choose.fourier_features(shape, tiling, way)
    kernel = cost.spectrum if way == "prepared" else plain.kernel
    return 2 * (cost.transforms + cost.products), 4 * (plain.numbers + kernel)


def main() -> None:
    products, memory = rates()
    found = {"products": products, "memory": memory}
    for name in sys.argv[1:]:
        for shape in WORKS[name].shapes:
            batch, channels, side = map(int, shape.split(","))
            flops, moved = counted(WORKS[name], (batch, channels, side))
            found[f"{name} {shape}"] = max(flops / products, moved / memory)
    report(found)


if __name__ == "__main__":
    main()
