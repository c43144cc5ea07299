"""Fits the cost model of `gam_flax.ops.convolution.choose`, and checks what it chooses.

    python -m benchmarks.convolution_model measure    # random convolutions; adds to what is there
    python -m benchmarks.convolution_model fit        # prints the coefficients for choose.py
    python -m benchmarks.convolution_model check      # random shapes: chosen against plain

`--machine` names the one that this runs on; choose.py has each by its name.

Random convolutions are timed on this machine, plain and by a few random tilings each: forward
and backward, and forward alone with the kernel's spectrum prepared. Coefficients are not
negative and minimize the squared relative error. Only shapes, tilings and seconds are kept, so
that another model is fitted without measuring again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from benchmarks import processes
from benchmarks.floor import rates
from gam_flax.ops.convolution import choose, direct, fourier
from gam_flax.ops.convolution.choose import Shape
from gam_flax.ops.convolution.fourier import Tiling

RESULTS = Path(__file__).parent / "results"


class Row(NamedTuple):
    """One measurement: kind is the name of one of the models in `choose.py`, in lower case."""

    kind: str
    seconds: float
    shape: Shape
    tiling: Tiling | None = None

    @property
    def features(self) -> tuple[float, ...]:
        if self.tiling is None:
            return choose.plain_features(self.shape)
        return features(self.shape, self.tiling, self.kind == "prepared")

    @classmethod
    def read(cls, kind: str, seconds: float, shape: list[Any], tiling: list[Any] | None) -> Row:
        batch, sizes, channels, outputs, kernel, strides, padding, *rest = shape
        top, left = map(tuple, padding)
        pairs = tuple(sizes), channels, outputs, tuple(kernel), tuple(strides), (top, left)
        read = None if tiling is None else Tiling(tuple(tiling[0]), *tiling[1:])
        return cls(kind, seconds, Shape(batch, *pairs, *rest), read)


def measured(machine: str) -> Path:
    return RESULTS / f"convolution_measured_{machine}.json"


def recorded(machine: str) -> tuple[dict[str, Any], list[Row]]:
    """The machine, and what was measured on it."""
    if not measured(machine).exists():
        products, memory = rates()
        return {**processes.machine(), "products": products, "memory": memory}, []
    kept = json.loads(measured(machine).read_text())
    return kept["machine"], [Row.read(*row) for row in kept["rows"]]


def record(path: Path, head: dict[str, Any], rows: Sequence[Any]) -> None:
    """JSON, a row a line."""
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{json.dumps(head)[:-1]}, "rows": [\n{lines}\n]}}\n')


def random_shape(rng: np.random.Generator, most: float) -> Shape:
    """A convolution as networks have them, of at most `most` FLOP."""
    while True:
        k = int(rng.choice([3, 5, 7, 7, 7, 9]))
        half = k // 2
        side = int(rng.choice([4, 7, 8, 14, 16, 20, 28, 32, 40, 56, 64]))
        exponents = rng.uniform(3, 10, 2)
        if rng.random() < 0.5:  # most networks have powers of two
            exponents = exponents.round()
        channels, outputs = (int(2**exponent) for exponent in exponents)
        batch = int(2 ** rng.uniform(0, 6))
        shape = Shape(
            batch, (side, side), channels, outputs, (k, k), padding=((half, half), (half, half))
        )
        cost = choose.plain_features(shape)
        flops = 2 * (cost.products + cost.naive)
        numbers = cost.numbers + cost.kernel
        if 1e7 < flops < most and numbers < 3e7:
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


def median(run: Callable[..., Any], *args: Any, rounds: int = 3) -> float:
    """Seconds of a call that is compiled already."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        jax.block_until_ready(run(*args))
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))


def with_gradients(way: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The result and both gradients, as a step of training wants them."""

    @jax.jit
    def run(x: jax.Array, kernel: jax.Array, g: jax.Array) -> Any:
        y, back = jax.vjp(way, x, kernel)
        return y, back(g)

    return run


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


def measure(shape: Shape, rng: np.random.Generator, tries: int) -> list[Row]:
    x, kernel, g = arrays(shape, rng)
    rows = [
        Row("plain_forward", median(jax.jit(plain(shape)), x, kernel), shape),
        Row("plain", median(with_gradients(plain(shape)), x, kernel, g), shape),
    ]
    for tiling in promising(shape, rng, tries, is_prepared=False):
        seconds = median(with_gradients(by_fourier(shape, tiling)), x, kernel, g)
        rows.append(Row("fourier", seconds, shape, tiling))
    for tiling in promising(shape, rng, tries, is_prepared=True):
        rows.append(Row("prepared", in_use(shape, tiling, kernel, x), shape, tiling))
    return rows


def promising(
    shape: Shape, rng: np.random.Generator, tries: int, *, is_prepared: bool
) -> list[Tiling]:
    """Some of the half that the model likes best, so that it is best where it is asked."""
    costs = {
        t: features(shape, t, is_prepared) for t in choose.tilings(shape, prepared=is_prepared)
    }
    some = [
        tiling
        for tiling, cost in costs.items()
        if cost.products < 2e10 and cost.spectrum < 3e8 and cost.transforms < 2e10
    ]
    some.sort(key=lambda tiling: choose.share(shape, tiling, prepared=is_prepared))
    order = rng.permutation(max(tries, len(some) // 2))
    return [some[index] for index in order if index < len(some)][:tries]


def features(shape: Shape, tiling: Tiling, is_prepared: bool) -> choose.Cost:
    return choose.fourier_features(shape, tiling, prepared=is_prepared)


def fit(rows: list[Row]) -> dict[str, dict[str, Any]]:
    from scipy.optimize import nnls

    models = {}
    for kind in ("plain_forward", "plain", "fourier", "prepared"):
        some = [row for row in rows if row.kind == kind]
        matrix = np.array([row.features for row in some], float)
        seconds = np.array([row.seconds for row in some])
        relative = matrix / seconds[:, None]
        scale = relative.max(0)
        scale[scale == 0] = 1
        solution, _ = nnls(relative / scale, np.ones(len(some)))
        model = solution / scale
        models[kind] = {
            "model": [float(f"{number:.3g}") for number in model],
            "predicted over measured, 10/50/90 %": [
                round(float(ratio), 2) for ratio in np.quantile(relative @ model, [0.1, 0.5, 0.9])
            ],
            "measurements": len(some),
        }
    return models


def check(shape: Shape, rng: np.random.Generator) -> dict[str, Any]:
    """Chosen against plain, where they differ."""
    tiling = choose.cheapest_tiling(shape)
    periods = min(choose.preparations(shape), key=lambda one: one.seconds).periods
    ready = periods and choose.best_tiling(shape, prepared=True, periods=periods)
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


def measure_more(shapes: list[Shape], rng: np.random.Generator, tries: int, machine: str) -> None:
    on, rows = recorded(machine)
    for shape in track(shapes, "measuring"):
        rows += measure(shape, rng, tries)
        record(measured(machine), {"machine": on}, rows)


def check_all(shapes: list[Shape], rng: np.random.Generator, machine: str) -> None:
    on = processes.machine()
    rows = [check(shape, rng) for shape in track(shapes, "checking")]
    record(RESULTS / f"convolution_check_{machine}.json", {"machine": on}, rows)
    for kind in ("training", "forward", "prepared"):
        some = [row for row in rows if kind in row]
        if some:
            worst = max(some, key=lambda row: row[kind])
            print(
                f"{kind}: {len(some)} of {len(rows)} shapes not plain, median "
                f"{np.median([row[kind] for row in some]):.2f} of plain's time, "
                f"worst {worst[kind]:.2f}: {worst}"
            )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["measure", "fit", "check"])
    parser.add_argument("--machine", default="here", help="a word for it, in names of files")
    parser.add_argument("--shapes", type=int, default=200)
    parser.add_argument("--most", type=float, default=2e10, help="FLOP of the largest")
    parser.add_argument("--tries", type=int, default=2, help="tilings a shape")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    shapes = [random_shape(rng, args.most) for _ in range(args.shapes)]
    if args.what == "measure":
        measure_more(shapes, rng, args.tries, args.machine)
    elif args.what == "check":
        check_all(shapes, rng, args.machine)
    else:
        print(json.dumps(fit(recorded(args.machine)[1]), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
