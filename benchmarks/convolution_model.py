"""Fits the cost model of `gam_flax.ops.convolution.choose`, and checks what it chooses.

    python -m benchmarks.convolution_model fit      # prints the coefficients for choose.py
    python -m benchmarks.convolution_model check    # random shapes: chosen against plain

Random convolutions are timed on this machine, plain and by a few random tilings each: forward
and backward, and forward alone with the kernel's spectrum prepared. Coefficients are not
negative and minimize the squared relative error.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from benchmarks import processes
from gam_flax.ops.convolution import choose, direct, fourier
from gam_flax.ops.convolution.choose import Shape
from gam_flax.ops.convolution.fourier import Tiling

RESULTS = Path(__file__).parent / "results"
ENOUGH = 0.3
"""Seconds of a plain convolution, estimated, beyond which a shape is not worth its time."""


def random_shape(rng: np.random.Generator) -> Shape:
    """A convolution as networks have them, of at most some 10 GFLOP."""
    while True:
        k = int(rng.choice([3, 5, 7, 7, 7, 9]))
        half = k // 2
        side = int(rng.choice([4, 7, 8, 14, 16, 20, 28, 32, 40, 56, 64]))
        channels, outputs = (int(2 ** rng.uniform(3, 10)) for _ in range(2))
        batch = int(2 ** rng.uniform(0, 6))
        shape = Shape(
            batch, (side, side), channels, outputs, (k, k), padding=((half, half), (half, half))
        )
        flops = 2 * choose.plain_features(shape)[0]
        numbers = choose.plain_features(shape)[1] + channels * outputs * k * k
        if 1e7 < flops < 2e10 and numbers < 3e7:
            return shape


def arrays(shape: Shape, rng: np.random.Generator) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pictures, a kernel, and a cotangent of the outputs."""
    sizes = [
        (shape.batch, *shape.sizes, shape.channels),
        (*shape.kernel_size, shape.channels, shape.outputs),
        (shape.batch, *shape.sizes, shape.outputs),
    ]
    x, kernel, g = (jnp.asarray(rng.standard_normal(size, np.float32)) for size in sizes)
    return x, kernel, g


def median(run: Callable[..., Any], *args: Any, rounds: int = 5) -> float:
    """Seconds of a call that is compiled already."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def with_gradients(way: Callable[..., jax.Array]) -> Callable[..., Any]:
    return jax.jit(lambda x, kernel, g: jax.vjp(way, x, kernel)[1](g))


def plain(shape: Shape) -> Callable[..., jax.Array]:
    return partial(direct.plain, strides=(1, 1), padding=shape.padding)


def by_fourier(shape: Shape, tiling: Tiling) -> Callable[..., jax.Array]:
    return partial(fourier.correlate, padding=shape.padding, tiling=tiling)


def prepared(shape: Shape, tiling: Tiling, kernel: jax.Array) -> tuple[Callable[..., Any], Any]:
    spectrum = jax.jit(fourier.kernel_spectrum, static_argnums=1)(kernel, tiling.periods)
    way = partial(
        fourier.correlate_spectrum,
        kernel_size=shape.kernel_size,
        padding=shape.padding,
        tiling=tiling,
    )
    return jax.jit(way), spectrum


def in_use(shape: Shape, tiling: Tiling, kernel: jax.Array, x: jax.Array) -> float:
    run, spectrum = prepared(shape, tiling, kernel)
    return median(run, x, spectrum)


def measure(shape: Shape, rng: np.random.Generator, tries: int) -> list[dict[str, Any]]:
    """The rows of one shape: kind, features, seconds."""
    x, kernel, g = arrays(shape, rng)
    features = choose.plain_features(shape)
    rows = [
        {
            "kind": "plain_forward",
            "features": features,
            "seconds": median(jax.jit(plain(shape)), x, kernel),
        },
        {
            "kind": "plain",
            "features": features,
            "seconds": median(with_gradients(plain(shape)), x, kernel, g),
        },
    ]
    for kind, model in (("fourier", choose.FOURIER), ("prepared", choose.PREPARED)):
        every = choose.tilings(shape, prepared=kind == "prepared")
        every = [t for t in every if fits(shape, t, kind == "prepared")]
        # The promising half, so that the model is best where it is asked.
        costs = [choose.fourier_features(shape, t, prepared=kind == "prepared") for t in every]
        order = np.argsort([choose.seconds(cost, model) for cost in costs])
        for index in rng.permutation(order[: max(tries, len(order) // 2)])[:tries]:
            tiling = every[index]
            if kind == "fourier":
                seconds = median(with_gradients(by_fourier(shape, tiling)), x, kernel, g)
            else:
                seconds = in_use(shape, tiling, kernel, x)
            rows.append(
                {"kind": kind, "tiling": tiling, "features": costs[index], "seconds": seconds}
            )
    return [{**row, "shape": shape} for row in rows]


def fits(shape: Shape, tiling: Tiling, is_prepared: bool) -> bool:
    cost = choose.fourier_features(shape, tiling, prepared=is_prepared)
    return cost.products < 2e10 and cost.spectrum < 3e8 and cost.transforms < 2e10


def fit(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    from scipy.optimize import nnls

    models = {}
    for kind in ("plain_forward", "plain", "fourier", "prepared"):
        some = [row for row in rows if row["kind"] == kind]
        features = np.array([row["features"] for row in some], float)
        seconds = np.array([row["seconds"] for row in some])
        matrix = features / seconds[:, None]
        scale = matrix.max(0)
        scale[scale == 0] = 1
        solution, _ = nnls(matrix / scale, np.ones(len(some)))
        model = solution / scale
        ratio = features @ model / seconds
        models[kind] = {
            "model": model.tolist(),
            "predicted over measured, 10/50/90 %": np.quantile(ratio, [0.1, 0.5, 0.9]).tolist(),
            "measurements": len(some),
        }
    return models


def check(shape: Shape, rng: np.random.Generator) -> dict[str, Any]:
    """Chosen against plain, where they differ."""
    tiling, ready = (choose.cheapest_tiling(shape, prepared=p) for p in (False, True))
    row: dict[str, Any] = {"shape": shape}
    if tiling is None and ready is None:
        return row
    x, kernel, g = arrays(shape, rng)
    if tiling is not None:
        row["tiling"] = tiling
        chosen = by_fourier(shape, tiling)
        row["training"] = turns(with_gradients(chosen), with_gradients(plain(shape)), x, kernel, g)
        row["forward"] = turns(jax.jit(chosen), jax.jit(plain(shape)), x, kernel)
    if ready is not None:
        row["prepared tiling"] = ready
        run, spectrum = prepared(shape, ready, kernel)
        standing = jax.jit(plain(shape))
        row["prepared"] = turns(lambda: run(x, spectrum), lambda: standing(x, kernel))
    return row


def turns(one: Callable[..., Any], other: Callable[..., Any], *args: Any, rounds: int = 5) -> float:
    """The time of `one` over that of `other`, medians, turn by turn."""
    times: dict[int, list[float]] = {0: [], 1: []}
    for turn in range(rounds + 1):
        for index, run in enumerate((one, other)):
            start = time.perf_counter()
            jax.block_until_ready(run(*args))
            if turn:
                times[index].append(time.perf_counter() - start)
    return float(np.median(times[0]) / np.median(times[1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["fit", "check"])
    parser.add_argument("--shapes", type=int, default=200)
    parser.add_argument("--tries", type=int, default=2, help="tilings a shape")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    on = processes.machine()
    rng = np.random.default_rng(args.seed)
    shapes = [random_shape(rng) for _ in range(args.shapes)]
    out = RESULTS / f"convolution_{args.what}.json"
    if args.what == "fit":
        rows = [
            row for shape in track(shapes, "fitting") for row in measure(shape, rng, args.tries)
        ]
        result: dict[str, Any] = {"machine": on, "models": fit(rows), "rows": rows}
        print(json.dumps(result["models"], indent=1))
    else:
        rows = [check(shape, rng) for shape in track(shapes, "checking")]
        result = {"machine": on, "rows": rows}
        for kind in ("training", "forward", "prepared"):
            ratios = [row[kind] for row in rows if kind in row]
            if ratios:
                worst = max((row for row in rows if kind in row), key=lambda row: row[kind])
                print(
                    f"{kind}: {len(ratios)} of {len(rows)} shapes not plain, median "
                    f"{np.median(ratios):.2f} of plain's time, worst {worst[kind]:.2f}: {worst}"
                )
    out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
