"""Fits the cost model of `gam_flax.ops.convolution.choose`, and checks what it chooses.

    python -m benchmarks.convolution_model measure    # random convolutions; adds to what is there
    python -m benchmarks.convolution_model fit        # prints the coefficients for choose.py
    python -m benchmarks.convolution_model check      # random shapes: chosen against plain

`--machine` names the one that this runs on; choose.py has each by its name.

Random convolutions, half of them grouped, are timed on this machine, without tiles and by a few
random tilings each: the result, the gradient by the kernel, and the result with the kernel's
spectrum prepared. The gradient by the pictures is a convolution again. Coefficients are not
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
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from rich.progress import track

from benchmarks import processes
from benchmarks.floor import rates
from gam_flax.ops.convolution import choose, fourier, planned
from gam_flax.ops.convolution.choose import Shape
from gam_flax.ops.convolution.convolve import convolve
from gam_flax.ops.convolution.planned import Plan
from gam_flax.ops.convolution.tiles import Tiling

RESULTS = Path(__file__).parent / "results"


class Row(NamedTuple):
    """One measurement; kind is the name of a model of `choose.Machine`."""

    kind: str
    seconds: float
    shape: Shape
    tiling: Tiling | None = None

    @property
    def features(self) -> tuple[float, ...]:
        if self.tiling is None:
            return choose.without_tiles(self.shape, cast("choose.Plain", self.kind))
        return choose.fourier_features(self.shape, self.tiling, cast("choose.Way", self.kind))

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
        groups = int(rng.choice([1, 1, 1, 2, 4, 8]))
        channels, outputs = (number - number % groups for number in (channels, outputs))
        padding = ((half, half), (half, half))
        sizes, window = (side, side), (k, k)
        shape = Shape(batch, sizes, channels, outputs, window, padding=padding, groups=groups)
        cost = choose.plain_features(shape)
        flops = 2 * cost.products
        numbers = cost.numbers + cost.kernel
        if 1e7 < flops < most and numbers < 3e7 and min(channels, outputs) >= 2 * groups:
            return shape


def arrays(shape: Shape, rng: np.random.Generator) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pictures, a kernel, and a cotangent of the outputs."""
    sizes = [
        (shape.batch, *shape.sizes, shape.channels),
        (*shape.kernel_size, shape.channels // shape.groups, shape.outputs),
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


def plan(shape: Shape, **tilings: Tiling | None) -> Plan:
    return Plan(
        shape.sizes, shape.kernel_size, shape.strides, shape.padding, shape.groups, **tilings
    )


def result(shape: Shape, tiling: Tiling | None) -> Callable[..., jax.Array]:
    """The convolution, of pictures and kernel."""
    return jax.jit(partial(planned.correlate, plan=plan(shape, result=tiling)))


def by_kernel(shape: Shape, tiling: Tiling | None) -> Callable[..., jax.Array]:
    """The gradient by the kernel, of pictures, kernel and the outputs' gradient."""
    way = partial(planned.correlate, plan=plan(shape, by_kernel=tiling))

    @jax.jit
    def run(x: jax.Array, kernel: jax.Array, g: jax.Array) -> jax.Array:
        return jax.vjp(partial(way, x), kernel)[1](g)[0]

    return run


def prepared(shape: Shape, tiling: Tiling, kernel: jax.Array) -> tuple[Callable[..., Any], Any]:
    transform = jax.jit(fourier.kernel_spectra, static_argnums=(1, 2))
    spectra = transform(kernel, tiling.periods, shape.groups)
    way = partial(
        fourier.correlate_spectra,
        kernel_size=shape.kernel_size,
        padding=shape.padding,
        tiling=tiling,
    )
    return jax.jit(way), spectra


def measure(shape: Shape, rng: np.random.Generator, tries: int) -> list[Row]:
    x, kernel, g = arrays(shape, rng)
    rows = [
        Row("plain", median(result(shape, None), x, kernel), shape),
        Row("plain_by_kernel", median(by_kernel(shape, None), x, kernel, g), shape),
    ]
    for tiling in promising(shape, rng, tries, "fourier"):
        rows.append(Row("fourier", median(result(shape, tiling), x, kernel), shape, tiling))
    for tiling in promising(shape, rng, tries, "fourier_by_kernel"):
        taken = median(by_kernel(shape, tiling), x, kernel, g)
        rows.append(Row("fourier_by_kernel", taken, shape, tiling))
    for tiling in promising(shape, rng, tries, "prepared"):
        run, spectra = prepared(shape, tiling, kernel)
        rows.append(Row("prepared", median(run, x, spectra), shape, tiling))
    return rows


def promising(shape: Shape, rng: np.random.Generator, tries: int, way: choose.Way) -> list[Tiling]:
    """Some of the half that the model likes best, so that it is best where it is asked."""
    costs = {t: choose.fourier_features(shape, t, way) for t in choose.tilings(shape, way)}
    some = [
        tiling
        for tiling, cost in costs.items()
        if cost.products < 2e10 and cost.spectrum < 3e8 and cost.transforms < 2e10
    ]
    some.sort(key=lambda tiling: choose.share(shape, tiling, way))
    order = rng.permutation(max(tries, len(some) // 2))
    return [some[index] for index in order if index < len(some)][:tries]


def fit(rows: list[Row]) -> dict[str, dict[str, Any]]:
    from scipy.optimize import nnls

    models = {}
    for kind in choose.Machine._fields[1:]:
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
    """What "auto" takes, over what XLA's own convolution takes: a training step's three functions;
    and where there are tiles the same over pieces, forward alone, and with the kernel prepared."""
    x, kernel, g = arrays(shape, rng)
    auto, plain, pieces = (
        partial(convolve, padding=shape.padding, groups=shape.groups, algorithm=algorithm)
        for algorithm in ("auto", "plain", "piecewise")
    )
    row: dict[str, Any] = {"shape": shape, "tilings": chosen(shape)}
    step = with_gradients(auto)
    row["training"] = turns(step, with_gradients(plain), x, kernel, g)
    if any(row["tilings"].values()):
        row["training over pieces"] = turns(step, with_gradients(pieces), x, kernel, g)
    if row["tilings"]["result"]:
        row["forward"] = turns(jax.jit(auto), jax.jit(plain), x, kernel)
    periods = min(choose.preparations(shape), key=lambda one: one.seconds).periods
    ready = periods and choose.best_tiling(shape, "prepared", periods=periods)
    if ready:
        row["prepared tiling"] = ready
        run, spectra = prepared(shape, ready, kernel)
        standing = jax.jit(plain)
        row["prepared"] = turns(lambda: run(x, spectra), lambda: standing(x, kernel))
    return row


def chosen(shape: Shape) -> dict[str, Tiling | None]:
    """Function → its tiles."""
    functions = choose.functions(shape)
    return {name: choose.cheapest_tiling(*function) for name, function in functions.items()}


def with_gradients(way: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The result and both gradients, as a step of training wants them."""

    @jax.jit
    def run(x: jax.Array, kernel: jax.Array, g: jax.Array) -> Any:
        y, back = jax.vjp(way, x, kernel)
        return y, back(g)

    return run


ENOUGH = 1.0
"""Seconds to time a pair for."""


def turns(one: Callable[..., Any], other: Callable[..., Any], *args: Any, rounds: int = 5) -> float:
    """The time of `one` over that of `other`, medians, turn by turn; of slow ones fewer rounds."""
    times: dict[int, list[float]] = {0: [], 1: []}
    for turn in range(rounds + 1):
        if turn > 1 and sum(times[0] + times[1]) > ENOUGH:
            break
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
    rows = []
    for shape in track(shapes, "checking"):
        rows.append(check(shape, rng))
        record(RESULTS / f"convolution_check_{machine}.json", {"machine": on}, rows)
    for kind in ("training", "training over pieces", "forward", "prepared"):
        ratios = np.array([row[kind] for row in rows if kind in row])
        if ratios.size:
            worst = max((row for row in rows if kind in row), key=lambda row: row[kind])
            print(
                f"{kind}: {len(ratios)} of {len(rows)} shapes, median {np.median(ratios):.2f}, "
                f"{np.mean(ratios > 1.1):.0%} above 1.1, worst {worst[kind]:.2f}: {worst}"
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
