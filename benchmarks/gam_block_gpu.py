"""A GAM block on a GPU: Flax under jit against torch.compile, channels last.

    python -m benchmarks.gam_block_gpu [--rounds 7]      one line where there is no GPU

In float32, in float32 with TF32 products, and in bfloat16; inference and training steps. The
processes are those of gam_block_inside.py, see there.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from benchmarks import processes
from benchmarks.gam_block_inside import WORKS
from benchmarks.load_resnet50 import PACKAGES, ROOT, positive, surroundings
from benchmarks.processes import Contestant

TITLE = "A GAM block on a GPU, Flax against torch"
PRECISIONS = {"float32": "highest", "TF32": "tensorfloat32", "bfloat16": "bfloat16"}
"""Name → `jax.default_matmul_precision`."""
ROLES = ("flax", "compile")


def contestants(work: str, precision: str, cache: Path) -> list[Contestant]:
    environment = {**surroundings(), "JAX_PLATFORMS": "cuda", "GAM_DEVICE": "cuda"}
    environment |= {
        "JAX_DEFAULT_MATMUL_PRECISION": PRECISIONS[precision],
        "GAM_PRECISION": precision,
    }
    module = "benchmarks.gam_block_inside"
    shapes = WORKS[work].shapes
    return [
        Contestant(
            role, [sys.executable, "-m", module, role, work, str(cache), *shapes], environment
        )
        for role in ROLES
    ]


def markdown(records: Mapping[str, Any]) -> str:
    first = next(iter(records.values()))
    parts = [processes.heading({**first, "title": TITLE})]
    for name, record in records.items():
        rows = []
        for shape in WORKS[name.partition(", ")[0]].shapes:
            ours, theirs = (record["results"][role][shape]["median"] for role in ROLES)
            rows.append(
                [f"({shape})", f"{1e3 * ours:.2f}", f"{1e3 * theirs:.2f}", f"{theirs / ours:.2f}"]
            )
        heads = ["batch, channels, side", "flax, ms", "torch.compile, ms", "speed"]
        parts += [f"## {name[:1].upper()}{name[1:]}", processes.markdown_table(heads, rows)]
    return "\n\n".join(parts)


def measure(rounds: int, console: Console) -> dict[str, Any]:
    on = processes.machine()
    tasks = [(work, precision) for work in ("inference", "training") for precision in PRECISIONS]
    records = {}
    with (
        tempfile.TemporaryDirectory(prefix="gam-block-gpu-") as cache,
        Progress(console=console) as bar,
    ):
        for work, precision in tasks:
            every = contestants(work, precision, Path(cache))
            task = bar.add_task(f"{work}, {precision}", total=processes.count_runs(every, rounds))
            runs = processes.take_turns(
                every, rounds, on_run=lambda label, task=task: bar.advance(task)
            )
            records[f"{work}, {precision}"] = processes.make_record(
                TITLE, runs, on=on, settings={"rounds": rounds}, packages=PACKAGES
            )
    return records


@processes.ends_in_a_line
def main() -> int:
    parser = argparse.ArgumentParser(description=TITLE)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "gam_block_gpu"
    )
    args = parser.parse_args()
    console = Console()
    if shutil.which("nvidia-smi") is None:
        console.print("no GPU here: nothing was measured on one")
        return 0
    records = measure(args.rounds, console)
    for path in processes.write(args.out, {"records": records}, markdown(records)):
        console.print(f"Written     {path}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
