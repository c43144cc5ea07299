"""Loading ResNet-50 from a safetensors file and answering the first batch: time and memory.

    python -m benchmarks.load_resnet50              seven rounds, benchmarks/results/load_resnet50.*
    python -m benchmarks.load_resnet50 --rounds 1   to see that it works

The same weights, 102 MB of float32, and the same pictures for every contestant; each answer is
checked against torch in float64. Flax comes from `gam_flax.convert.load`, torch from
`load_state_dict`. What a framework keeps on disk between two starts (compiled programs) is
measured both without, in an empty folder, and with.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import processes
from benchmarks.processes import BenchmarkError, Column, Contestant

ROOT = Path(__file__).resolve().parents[1]

TITLE = "ResNet-50: from a safetensors file to the first answer"
PACKAGES = ("gam-attention", "jax", "jaxlib", "flax", "torch", "safetensors", "numpy")

FLAX, FLAX_CACHED = "Flax, jit", "Flax, jit, cached"
EAGER, META = "torch, eager", "torch, eager, meta device"
COMPILED, COMPILED_CACHED = "torch.compile", "torch.compile, cached"

IMPORT, LOAD = Column("import", "import, s"), Column("load", "load, s")
ANSWER = Column("until the first answer", "until the first answer, s")
NEXT = Column("next batch", "next batch, s", "{:.3f}")
PEAK = Column("peak memory", "peak, MB", "{:.0f}")
ABOVE = Column("memory above idle", "peak above idle, MB", "{:.0f}")

TIMES = (
    IMPORT,
    LOAD,
    Column("trace", "trace, s"),
    Column("compile", "compile, s"),
    Column("first batch", "first batch, s"),
    ANSWER,
    NEXT,
)
MEMORY = (
    Column("idle memory", "idle, MB", "{:.0f}"),
    Column("memory of the load", "load above idle, MB", "{:.0f}"),
    ABOVE,
    PEAK,
)
SHORT = (LOAD, ANSWER, NEXT, ABOVE, PEAK)

PAIRS = (
    (FLAX, EAGER),
    (FLAX, META),
    (FLAX, COMPILED),
    (FLAX_CACHED, EAGER),
    (FLAX_CACHED, META),
    (FLAX_CACHED, COMPILED_CACHED),
)
"""What is set against what: with programs on disk only against the like, or what needs none."""

NOTES = (
    "Seconds and MB (10⁶ bytes): medians, below them the lowest and the highest. Each run is a "
    "process of its own; files are in the disk's cache, `.pyc` files are there.",
    "Only a quiet machine measures torch: where other processes want the same cores, two threads "
    "of torch were seen to take 80 times as long as one.",
    "Import includes the start of the framework. The memory of the process after it is “idle”. "
    "Pages of the file that a process has mapped count as its memory.",
    "torch.compile compiles in its first batch. The C++ compiler runs in processes of its own, "
    "whose memory is not in the peak; the largest of them is in the JSON.",
    "“Cached”: compiled programs of an earlier process are found on disk, by "
    "`jax_compilation_cache_dir` (all of them, however short) or `TORCHINDUCTOR_CACHE_DIR`; "
    "without, there are none.",
    "“Meta device”: the torch model is built without weights, and takes over the tensors of the "
    "file (`assign=True`), as `gam_flax.convert.load` builds a model of shapes alone.",
)

ENOUGH = 1e-3
"""A relative error above this is another network, not rounding, which comes to some 2e-5."""


def contestants(folder: Path, batch: int, side: int) -> list[Contestant]:
    """All six; those that compile C++ are marked where there is no compiler."""
    compiler = cpp_compiler()
    missing = None if compiler else "torch.compile needs a C++ compiler, and none is here"

    def one(name: str, role: str, *cache: str, missing: str | None = None) -> Contestant:
        places = [folder / name for name in cache]
        return Contestant(
            name, command(role, folder, batch, side, *places), surroundings(), missing
        )

    return [
        one(FLAX, "flax"),
        one(FLAX_CACHED, "flax", "jax-cache"),
        one(EAGER, "eager"),
        one(META, "meta"),
        one(COMPILED, "compile", missing=missing),
        one(COMPILED_CACHED, "compile", "inductor-cache", missing=missing),
    ]


def command(role: str, folder: Path, batch: int, side: int, *cache: Path) -> list[str]:
    module = "benchmarks.load_resnet50_inside"
    return [sys.executable, "-m", module, role, *map(str, (folder, batch, side, *cache))]


def surroundings() -> dict[str, str]:
    """The processes run elsewhere and find this checkout; torch and XLA keep to our cores."""
    cores = str(processes.cores_in_use())
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": cores,
        "NPROC": cores,  # what XLA reads
        "JAX_PLATFORMS": "cpu",
    }


def cpp_compiler() -> str | None:
    """The first line that torch.compile's C++ compiler says of itself; None where there is none."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    for name in names:
        if found := shutil.which(name):
            said = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
            return said.partition("\n")[0]
    return None


def check(runs: processes.Runs) -> None:
    """Raises BenchmarkError where an answer is not the network's."""
    for name, all_runs in runs.items():
        for run in all_runs:
            error = run["relative error"]
            if not error <= ENOUGH:  # nor NaN
                raise BenchmarkError(f"{name}: its answer is off by {error:.1e}, so it is wrong")


def markdown(record: dict[str, Any]) -> str:
    """The tables and all that is to be known of them."""
    results = record["results"]
    worst = max(result["relative error"]["highest"] for result in results.values())
    missing = [f"{name} is missing: {why}." for name, why in record["missing"].items()]
    parts = [
        processes.heading(record),
        processes.table(results, TIMES),
        processes.table(results, MEMORY),
        "Flax over torch, medians; below 1 is faster or smaller:",
        processes.ratios(results, SHORT, PAIRS),
        f"Largest error of any answer against float64: {worst:.1e} of the largest logit.",
        "\n".join(f"- {note}" for note in [*record["notes"], *missing]),
    ]
    return "\n\n".join(parts)


def measure(args: argparse.Namespace, console: Console) -> dict[str, Any]:
    """The record of all rounds, with a progress bar."""
    threads = processes.use_cores(args.threads)
    on = processes.machine()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    with tempfile.TemporaryDirectory(prefix="load-resnet50-") as name, bar:
        folder = Path(name)
        every = contestants(folder, args.batch, args.side)
        total = 1 + processes.count_runs(every, args.rounds)
        task = bar.add_task("the files", total=total)
        # This process stays small: a child's peak of memory begins at its parent's.
        preparing = command("prepare", folder, args.batch, args.side)
        processes.run_alone(Contestant("the files", preparing, surroundings()))

        def on_run(label: str) -> None:
            bar.update(task, advance=1, description=label)

        runs = processes.take_turns(every, args.rounds, on_run=on_run)
        bar.update(task, completed=total, description="done")
    check(runs)
    return processes.make_record(
        TITLE,
        runs,
        on=on,
        settings={
            "batch": args.batch,
            "side": args.side,
            "threads": threads,
            "rounds": args.rounds,
            "C++ compiler": cpp_compiler() or "none",
        },
        packages=PACKAGES,
        contestants=every,
        notes=NOTES,
    )


def positive(word: str) -> int:
    number = int(word)
    if number < 1:
        raise ValueError
    return number


@processes.ends_in_a_line
def main() -> int:
    parser = argparse.ArgumentParser(description="Load ResNet-50, Flax against torch.")
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--batch", type=positive, default=8)
    parser.add_argument("--side", type=positive, default=224, help="of a picture, in pixels")
    parser.add_argument("--threads", type=positive, default=2, help="cores for each framework")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "benchmarks" / "results" / "load_resnet50",
        help="where the results go; .json and .md are added",
    )
    args = parser.parse_args()
    console = Console()
    record = measure(args, console)
    text = markdown(record)
    written = processes.write(args.out, record, text)
    console.print(Markdown(processes.table(record["results"], SHORT, spread=False)))
    console.print(Markdown(processes.ratios(record["results"], SHORT, PAIRS)))
    for path in written:
        console.print(f"Written     {path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
