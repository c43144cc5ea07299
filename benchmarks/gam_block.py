"""A GAM block in Flax against torch, eager in both memory formats and compiled.

    python -m benchmarks.gam_block [--rounds 7] [--works inference training …]

Each framework has a process of its own and they take turns, see `processes.py`. In Flax the
model for inference is what `optimize_for_inference` makes of it. Memory and first calls are
measured apart, one shape a process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import processes
from benchmarks.gam_block_inside import BLOCKS, WORKS, Work
from benchmarks.gam_block_picture import draw
from benchmarks.load_resnet50 import PACKAGES, ROOT, cpp_compiler, positive, surroundings
from benchmarks.processes import Contestant

FLAX = "flax"
TORCH = ("eager", "channels_last", "compile")

NOTES = (
    "Seconds are medians over the rounds of the median of a process's calls, float32, after 0.4 s "
    "of calls that do not count. Speed is "
    "the fastest of eager, eager in channels_last and torch.compile over Flax, shape by shape: "
    "above 1 Flax is faster.",
    "First call: until the first answer under jit, with an empty compilation cache and with the "
    "one that the first process left. Peak memory is that of a process that does one shape alone, "
    "over torch's, eager.",
    "Possible: the time in which this machine's matrix products and memory, measured in the same "
    "run, would do the chosen algorithm, over the time taken; see floor.py.",
)

SPEED = ("speed", "speed", 1, "**{:.2f}**")
TIMES = tuple((role, f"{role}, ms", 1e3, "{:.2f}") for role in (FLAX, *TORCH))
COLUMNS = (
    *TIMES,
    SPEED,
    ("first", "first call, s", 1, "{:.2f}"),
    ("cached", "cached, s", 1, "{:.2f}"),
    ("memory", "memory ÷ torch's", 1, "{:.2f}"),
    ("possible", "of the possible", 100, "{:.0f} %"),
)


class Suite(NamedTuple):
    """What one call measures: its works, the columns of the table, and what is to be known."""

    title: str
    works: Mapping[str, Work]
    columns: Sequence[tuple[str, str, float, str]]
    notes: Sequence[str]


SUITE = Suite("A GAM block on a CPU, Flax against torch", BLOCKS, COLUMNS, NOTES)


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


def compared(record: dict[str, Any], alone: dict[str, Any], name: str) -> dict[str, Any]:
    """One shape: the medians, how many times faster Flax is than the best of torch, and more."""
    results = record["results"]
    row: dict[str, Any] = {"name": name}
    row |= {role: result[name]["median"] for role, result in results.items() if name in result}
    row["images"] = int(name.partition(",")[0]) / row[FLAX]
    row["speed"] = min(row[role] for role in TORCH if role in row) / row[FLAX]
    return row | alone.get(name, {})


def by_work(kept: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    rows = {}
    for work, record in kept["records"].items():
        alone = kept["alone"].get(work, {})
        rows[work] = [compared(record, alone, name) for name in WORKS[work].shapes]
        for row in rows[work]:
            floor = kept["floor"].get(f"{work} {row['name']}")
            if floor is not None:
                row["possible"] = floor / row[FLAX]
    return rows


def markdown(kept: dict[str, Any], suite: Suite = SUITE) -> str:
    first = next(iter(kept["records"].values()))
    parts = [
        processes.heading(
            {**first, "title": suite.title, "settings": {"threads": first["settings"]["threads"]}}
        )
    ]
    parts.append(
        f"Measured in the same run: {kept['floor']['products'] / 1e9:.0f} GFLOP/s of products, "
        f"{kept['floor']['memory'] / 1e9:.0f} GB/s of memory."
    )
    for work, rows in by_work(kept).items():
        cells = [
            [
                f"({row['name']})",
                *(
                    shown.format(by * row[key]) if key in row else "–"
                    for key, _, by, shown in suite.columns
                ),
            ]
            for row in rows
        ]
        mean = statistics.geometric_mean([row["speed"] for row in rows])
        heads = ["batch, channels, side", *(head for _, head, _, _ in suite.columns)]
        title = f"## {work[:1].upper()}{work[1:]}: {mean:.2f} times as fast in the geometric mean"
        parts += [title, _when(kept["records"][work]), processes.markdown_table(heads, cells)]
    return "\n\n".join([*parts, "\n".join(f"- {note}" for note in suite.notes)])


def _when(record: Mapping[str, Any]) -> str:
    rounds, on = record["settings"]["rounds"], record["machine"]
    return (
        f"{record['date']}, {on['processor']}, {rounds} rounds, "
        f"load average before {on['load_average']}."
    )


def _machines(records: Mapping[str, Any]) -> list[str]:
    """Each machine once: that of most works first, the others with what was measured on them."""
    works: dict[str, list[str]] = {}
    for work, record in records.items():
        on = record["machine"]
        line = f"{record['date']}, {on['processor']}, {on['cores_in_use']} cores"
        works.setdefault(line, []).append(work)
    most, *others = sorted(works, key=lambda line: len(works[line]), reverse=True)
    return [most, *(f"{line}: {', '.join(works[line])}" for line in others)]


def measure(args: argparse.Namespace, suite: Suite, console: Console) -> dict[str, Any]:
    """The records of the works that `args` names; what else is to be kept is not touched."""
    threads = processes.use_cores(args.threads)
    on = processes.machine()
    kept: dict[str, Any] = {"records": {}, "alone": {}, "floor": {}}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        tempfile.TemporaryDirectory(prefix="gam-block-") as cache,
        Progress(*columns, TimeElapsedColumn(), console=console) as bar,
    ):
        command = [sys.executable, "-m", "benchmarks.floor", *args.works]
        kept["floor"] = processes.run_alone(Contestant("floor", command, surroundings()))
        for work in args.works:
            shapes = WORKS[work].shapes
            every = contestants(work, list(shapes), Path(cache))
            total = processes.count_runs(every, args.rounds) + 3 * len(shapes) * args.alone
            task = bar.add_task(work, total=total)

            def on_run(label: str, task: Any = task, work: str = work) -> None:
                bar.update(task, advance=1, description=f"{work}, {label}")

            if args.alone:
                kept["alone"][work] = {name: alone(work, name, on_run) for name in shapes}
            runs = processes.take_turns(every, args.rounds, on_run=on_run)
            kept["records"][work] = processes.make_record(
                f"{suite.title}: {work}",
                runs,
                on=on,
                settings={"rounds": args.rounds, "threads": threads},
                packages=PACKAGES,
                contestants=every,
                notes=suite.notes,
            )
    return kept


def with_older(out: Path, kept: dict[str, Any], suite: Suite) -> dict[str, Any]:
    """The works that were not measured now stay as an earlier call wrote them."""
    try:
        older = json.loads(out.with_name(out.name + ".json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return kept
    joined = {part: {**older[part], **kept[part]} for part in kept}
    for part in ("records", "alone"):
        joined[part] = {work: joined[part][work] for work in suite.works if work in joined[part]}
    return joined


def alone(work: str, name: str, on_run: Any) -> dict[str, float]:
    """One shape in processes of its own: Flax with an empty cache, Flax again, torch."""
    with tempfile.TemporaryDirectory(prefix="gam-block-") as cache:
        ours, eager, *_ = contestants(work, [name], Path(cache))
        found = []
        for label, one in (("alone", ours), ("alone, cached", ours), ("alone", eager)):
            on_run(f"{one.name} {label}: {name}")
            found.append(processes.run_alone(one))
    first, again, torch = found
    return {
        "first": first[f"first {name}"],
        "cached": again[f"first {name}"],
        "memory": first["peak memory"] / torch["peak memory"],
    }


def run(suite: Suite, name: str) -> int:
    """Measures, and writes results/`name`.json, .md and .png."""
    parser = argparse.ArgumentParser(description=suite.title)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--threads", type=positive, default=2, help="cores for each framework")
    parser.add_argument(
        "--works",
        nargs="+",
        choices=list(suite.works),
        default=list(suite.works),
        help="the results of the others stay as they are",
    )
    parser.add_argument(
        "--alone",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="first calls and peaks of memory, each shape in processes of its own",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "results" / name,
        help="where the results go; .json, .md and .png are added",
    )
    args = parser.parse_args()
    console = Console()
    kept = with_older(args.out, measure(args, suite, console), suite)
    text = markdown(kept, suite)
    picture = args.out.with_name(args.out.name + ".png")
    written = (*processes.write(args.out, kept, text), picture)
    draw(by_work(kept), picture, said="\n".join([suite.title, *_machines(kept["records"])]))
    print(text)
    for path in written:
        console.print(f"Written     {path}", soft_wrap=True)
    return 0


@processes.ends_in_a_line
def main() -> int:
    return run(SUITE, "gam_block")


if __name__ == "__main__":
    sys.exit(main())
