"""What the machine could do at best: a process that measures two rates and counts operations.

    python -m benchmarks.floor WORK...

prints, as the last line, {"products": FLOP/s of a large matrix product, "memory": bytes/s of a
large sum, "WORK SHAPE": seconds in which those would do the chosen algorithm's multiplications, or
read its kernels (or spectra) and read and write its pictures once, whichever takes longer}.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx

import gam_flax
from benchmarks.gam_block_inside import WORKS, Work, build
from benchmarks.inside import Stages, report
from gam_flax.ops.convolution import choose
from gam_flax.ops.convolution.choose import Shape
from gam_flax.ops.convolution.prepared import PreparedConv
from gam_flax.ops.convolution.tiles import Tiling

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


def counted(work: Work, shape: tuple[int, int, int]) -> tuple[float, float]:
    """Operations and bytes of a GAM block, its elementwise part left out."""
    batch, channels, side = shape
    model = build(gam_flax, work, channels, rngs=nnx.Rngs(0))
    linear = 2 * channels * model.channel_attention.fc1.out_features
    if not work.training:
        model = gam_flax.optimize_for_inference(model, (batch, side, side, channels))
    times = BACKWARD if work.training else 1
    flops, moved = 2.0 * times * batch * side**2 * linear, 8.0 * batch * side**2 * channels
    for conv, one in _convolutions(model, shape):
        for part, tiling, way in _functions(conv, one, training=work.training):
            some = _flops(part, tiling, way)
            flops, moved = flops + some[0], moved + some[1]
    return flops, moved


def _convolutions(
    model: nnx.Module, shape: tuple[int, int, int]
) -> Iterator[tuple[nnx.Conv | PreparedConv, Shape]]:
    batch, _, side = shape
    for _, conv in nnx.iter_modules(model):
        if isinstance(conv, PreparedConv):
            features, groups = conv.features, conv.groups
        elif isinstance(conv, nnx.Conv):
            features, groups = (conv.in_features, conv.out_features), conv.feature_group_count
        else:
            continue
        pads = (3, 3), (3, 3)
        yield conv, Shape(batch, (side, side), *features, (7, 7), padding=pads, groups=groups)


def _functions(
    conv: nnx.Conv | PreparedConv, shape: Shape, *, training: bool
) -> list[tuple[Shape, Tiling | None, choose.Way]]:
    """What is computed, and how: the result and, in training, the gradients by both arguments."""
    if isinstance(conv, PreparedConv):
        return [(shape, choose.best_tiling(shape, "prepared", periods=conv.periods), "prepared")]
    functions = choose.functions(shape)
    some = functions.values() if training else [functions["result"]]
    return [(one, choose.cheapest_tiling(one, way), way) for one, way in some]


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
