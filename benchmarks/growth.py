"""How time and memory of a GAM block grow with batch, channels, side and kernel size.

    python -m benchmarks.growth [--rounds 3]

From one middle, one size at a time is changed; a line through the logarithms gives the exponent:
time ~ size^exponent. Each point is a process of its own, Flax and torch (eager) by turns; memory
is its peak above that of the smallest point, so that the libraries do not count.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks import processes
from benchmarks.gam_block import surroundings
from benchmarks.load_resnet50 import PACKAGES, ROOT, positive
from benchmarks.processes import Contestant

TITLE = "How a GAM block's time and memory grow"
MIDDLE = {"batch": 8, "channels": 128, "side": 28, "kernel": 7}
SIZES = {
    "batch": (2, 4, 8, 16, 32),
    "channels": (64, 128, 256, 512),
    "side": (14, 28, 56),
    "kernel": (3, 5, 7, 9, 11),
}
ROLES = ("flax", "eager")
WORKS = ("inference", "training")
SMALLEST = {"batch": 1, "channels": 16, "side": 7, "kernel": 3}


def contestant(role: str, work: str, sizes: dict[str, int], cache: Path) -> Contestant:
    shape = ",".join(str(sizes[name]) for name in ("batch", "channels", "side"))
    module = "benchmarks.gam_block_inside"
    environment = {**surroundings(), "GAM_KERNEL_SIZE": str(sizes["kernel"])}
    command = [sys.executable, "-m", module, role, work, str(cache), shape]
    return Contestant(f"{role} {work} {shape},{sizes['kernel']}", command, environment)


def measured(role: str, work: str, sizes: dict[str, int], cache: Path, rounds: int) -> list[float]:
    """Seconds of a call, and the peak of memory in MB.

    One more process goes first: what it compiles is in the cache then, and takes no memory.
    """
    one = contestant(role, work, sizes, cache)
    _, *runs = [processes.run_alone(one) for _ in range(1 + rounds)]
    name = next(key for key in runs[0] if key[0].isdigit())
    return [statistics.median(run[key] for run in runs) for key in (name, "peak memory")]


def exponent(sizes: tuple[int, ...], values: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def measure(rounds: int) -> dict[str, Any]:
    """work → size → role → seconds and MB at each, and their exponents."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="growth-") as cache:
        tasks = [(w, n, r) for w in WORKS for n in SIZES for r in ROLES]
        idle = {
            (work, role): measured(role, work, SMALLEST, Path(cache), 1)[1]
            for work in WORKS
            for role in ROLES
        }
        for work, name, role in track(tasks, "growth"):
            points = [
                measured(role, work, {**MIDDLE, name: size}, Path(cache), rounds)
                for size in SIZES[name]
            ]
            seconds = [point[0] for point in points]
            above = [max(1.0, point[1] - idle[work, role]) for point in points]
            found.setdefault(work, {}).setdefault(name, {})[role] = {
                "seconds": seconds,
                "MB above the smallest": above,
                "time": exponent(SIZES[name], seconds),
                "memory": exponent(SIZES[name], above),
            }
    return found


def markdown(record: dict[str, Any]) -> str:
    parts = [processes.heading(record), f"In the middle: {MIDDLE}. Sizes: {SIZES}."]
    for work, some in record["results"].items():
        rows = [
            [
                name,
                *(f"{some[name][role][what]:.2f}" for what in ("time", "memory") for role in ROLES),
            ]
            for name in some
        ]
        heads = ["size", *(f"{what}, {role}" for what in ("time", "memory") for role in ROLES)]
        parts += [f"## {work.capitalize()}: exponents", processes.markdown_table(heads, rows)]
    return "\n\n".join(parts)


@processes.ends_in_a_line
def main() -> int:
    parser = argparse.ArgumentParser(description=TITLE)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--threads", type=positive, default=2, help="cores for each framework")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "growth")
    args = parser.parse_args()
    threads = processes.use_cores(args.threads)
    settings = {"rounds": args.rounds, "threads": threads}
    on = processes.machine()
    record = processes.make_record(TITLE, {}, on=on, settings=settings, packages=PACKAGES)
    record["results"] = measure(args.rounds)
    console = Console()
    for path in processes.write(args.out, record, markdown(record)):
        console.print(f"Written     {path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
