"""A GAM block in Flax against torch, eager in both memory formats and compiled.

    python -m benchmarks.gam_block [--rounds 7] [--works inference training …]

Each framework has a process of its own and they take turns, see `processes.py`. In Flax the
model for inference is what `optimize_for_inference` makes of it. Memory is measured apart, one
shape a process.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import processes
from benchmarks.gam_block_inside import WORKS
from benchmarks.load_resnet50 import PACKAGES, ROOT, cpp_compiler, positive, surroundings
from benchmarks.processes import Contestant

TITLE = "A GAM block, Flax against torch"
FLAX = "flax"
TORCH = ("eager", "channels_last", "compile")

INFERENCE = [
    *("8,256,28", "8,512,14", "32,512,7", "16,1024,14"),
    *("1,256,28", "1,512,14", "1,64,56", "8,64,56"),
]
TRAINING = ["32,64,56", "32,256,28", "32,512,14", "64,512,7"]

NOTES = (
    "Seconds are medians over the rounds of the median of seven calls, float32. “torch” is the "
    "fastest of eager, eager in channels_last and torch.compile, shape by shape.",
    "Above 1 Flax is faster. Peak memory is that of a process that does one shape alone.",
)


def shapes(work: str) -> list[str]:
    return TRAINING if "training" in work else INFERENCE


def contestants(work: str, some: list[str], cache: Path) -> list[Contestant]:
    compiler = cpp_compiler()
    missing = None if compiler else "torch.compile needs a C++ compiler, and none is here"
    module = "benchmarks.gam_block_inside"
    return [
        Contestant(
            role,
            [sys.executable, "-m", module, role, work, str(cache), *some],
            surroundings(),
            missing if role == "compile" else None,
        )
        for role in (FLAX, *TORCH)
    ]


def compared(results: dict[str, Any], name: str) -> dict[str, float]:
    """The medians of one shape, and how many times faster Flax is than the best of torch."""
    medians = {role: result[name]["median"] for role, result in results.items() if name in result}
    best = min(seconds for role, seconds in medians.items() if role != FLAX)
    return {**medians, "speed": best / medians[FLAX]}


def markdown(records: dict[str, dict[str, Any]], memory: dict[str, Any]) -> str:
    first = next(iter(records.values()))
    parts = [processes.heading({**first, "title": TITLE})]
    for work, record in records.items():
        rows = []
        speeds = []
        for name in shapes(work):
            row = compared(record["results"], name)
            speeds.append(row["speed"])
            cells = [f"{1e3 * row[role]:.2f}" if role in row else "–" for role in (FLAX, *TORCH)]
            used = memory.get(work, {}).get(name)
            cells.append("–" if used is None else f"{used[FLAX] / used['eager']:.2f}")
            rows.append([f"({name})", *cells, f"{row['speed']:.2f}"])
        mean = math.exp(sum(map(math.log, speeds)) / len(speeds))
        rows.append(["geometric mean", *[""] * 5, f"{mean:.2f}"])
        heads = ["batch, channels, side", *(f"{role}, ms" for role in (FLAX, *TORCH))]
        parts += [
            f"## {work.capitalize()}",
            processes.markdown_table([*heads, "memory ÷ eager's", "times as fast"], rows),
        ]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in NOTES)])


def measure(args: argparse.Namespace, console: Console) -> tuple[dict[str, Any], dict[str, Any]]:
    threads = processes.use_cores(args.threads)
    on = processes.machine()
    records: dict[str, Any] = {}
    memory: dict[str, Any] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        tempfile.TemporaryDirectory(prefix="gam-block-") as cache,
        Progress(*columns, TimeElapsedColumn(), console=console) as bar,
    ):
        for work in args.works:
            every = contestants(work, shapes(work), Path(cache))
            alone = 2 * len(shapes(work)) * args.memory
            total = processes.count_runs(every, args.rounds) + alone
            task = bar.add_task(work, total=total)

            def on_run(label: str, task: Any = task, work: str = work) -> None:
                bar.update(task, advance=1, description=f"{work}, {label}")

            runs = processes.take_turns(every, args.rounds, on_run=on_run)
            if args.memory:
                memory[work] = {
                    name: peaks(work, name, Path(cache), on_run) for name in shapes(work)
                }
            records[work] = processes.make_record(
                f"{TITLE}: {work}",
                runs,
                on=on,
                settings={"rounds": args.rounds, "threads": threads},
                packages=PACKAGES,
                contestants=every,
                notes=NOTES,
            )
    return records, memory


def peaks(work: str, name: str, cache: Path, on_run: Any) -> dict[str, float]:
    """MB, of a process that does this shape alone."""
    found = {}
    for one in contestants(work, [name], cache)[:2]:
        on_run(f"memory: {one.name}")
        found[one.name] = processes.run_alone(one)["peak memory"]
    return found


@processes.ends_in_a_line
def main() -> int:
    parser = argparse.ArgumentParser(description="A GAM block, Flax against torch.")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--threads", type=positive, default=2, help="cores for each framework")
    parser.add_argument("--works", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "gam_block",
        help="where the results go; .json and .md are added",
    )
    args = parser.parse_args()
    console = Console()
    records, memory = measure(args, console)
    text = markdown(records, memory)
    written = processes.write(args.out, {"records": records, "memory": memory}, text)
    print(text)
    for path in written:
        console.print(f"Written     {path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
