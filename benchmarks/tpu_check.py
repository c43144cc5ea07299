"""Compiles GAM and ResNet-50 + GAM for TPUs, without one, and checks what the compiler says.

    python -m benchmarks.tpu_check               benchmarks/results/tpu_check.*
    python -m benchmarks.tpu_check --effort 0    as the compiler does by itself, four times as long

Checked: the program fits the chip's memory; no activation is gathered from other chips; what only
changes a layout is a small part of all bytes read and written. Needs the extra `tpu-check`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import processes

RESULTS = Path(__file__).resolve().parent / "results" / "tpu_check"

MEMORY = {"v5e:2x2": 16 * 2**30, "v5p:2x2x1": 95 * 2**30}
"""Bytes of a chip, of the topologies that are compiled for."""

COPIES = 0.1
"""The part of all bytes that changes of layout may be."""


class Case(NamedTuple):
    """One program: what, for which topology, how its parameters lie, pictures of each chip."""

    program: str
    topology: str
    parameters: str
    batch: int

    def __str__(self) -> str:
        return f"{self.program}, {self.topology}, {self.parameters}, {self.batch} a chip"


CASES = [
    Case(program, topology, parameters, batch)
    for topology, batch in (("v5e:2x2", 32), ("v5p:2x2x1", 128))
    for program, parameters in (
        ("GAM, gradient", "replicated"),
        ("ResNet-50 + GAM, forward", "replicated"),
        ("ResNet-50 + GAM, training", "replicated"),
        ("ResNet-50 + GAM, training", "sharded"),
    )
]


def compiled(case: Case, effort: float) -> dict[str, Any]:
    """The figures of a case, and how long the compiler took."""
    from benchmarks import compiled_step as step

    mesh = step.tpu_topology(case.topology)
    began = time.perf_counter()
    common: dict[str, Any] = {"batch": case.batch, "effort": effort}
    network = {"model": "resnet50", "attention": "gam", "side": 224, "parameters": case.parameters}
    programs: dict[str, Callable[[], Any]] = {
        "GAM, gradient": lambda: step.compile_block(mesh, channels=256, side=56, **common),
        "ResNet-50 + GAM, forward": lambda: step.compile_forward(mesh, **network, **common),
        "ResNet-50 + GAM, training": lambda: step.compile_training(mesh, **network, **common),
    }
    found = step.figures(programs[case.program](), case.batch)
    return {**found, "seconds_to_compile": round(time.perf_counter() - began, 1)}


def complaints(case: Case, found: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    said = []
    if found["peak"] > MEMORY[case.topology]:
        said.append(f"needs {found['peak'] / 2**30:.1f} GiB, more than the chip has")
    if found["gathered_activations"]:
        said.append(f"activations are gathered: {found['gathered_activations'][0]}")
    if found["layout_copies"] > COPIES * found["accessed"]:
        said.append(f"{found['layout_copies'] / found['accessed']:.0%} of the bytes change layout")
    return said


def markdown(record: dict[str, Any]) -> str:
    """The record as a table."""
    head = ["", "peak, GiB", "of it state, GiB", "GFLOP", "GB accessed", "layout copies"]
    head += ["all-reduce, MB", "all-gather, MB", "reduce-scatter, MB", "verdict"]
    rows = []
    for name, found in record["results"].items():
        moved = [
            f"{found['collectives'].get(kind, {'bytes': 0})['bytes'] / 1e6:.1f}"
            for kind in ("all-reduce", "all-gather", "reduce-scatter")
        ]
        rows.append(
            [
                name,
                f"{found['peak'] / 2**30:.2f}",
                f"{found['arguments'] / 2**30:.2f}",
                f"{found['flops'] / 1e9:.0f}",
                f"{found['accessed'] / 1e9:.1f}",
                f"{found['layout_copies'] / found['accessed']:.1%}",
                *moved,
                "; ".join(found["complaints"]) or "ok",
            ]
        )
    used = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return "\n\n".join(
        [
            "# GAM and ResNet-50 + GAM, compiled for TPUs",
            f"{record['date']}. No TPU was there: libtpu compiled, nothing ran. bfloat16, pictures "
            f"of 224 pixels, effort {record['effort']:g}. Of one chip's program. {used}.",
            processes.markdown_table(head, rows),
            "- Layout copies: bytes written by copies and transposes, of all bytes accessed.\n"
            "- Collectives: bytes of their results. State: what goes in, batch included.",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="GAM compiled for TPUs that are not there")
    parser.add_argument("--effort", type=float, default=-1.0, help="of the compiler, -1 to 1")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if find_spec("libtpu") is None:
        print("skipped: libtpu is not installed: pip install 'gam-attention[tpu-check]'")
        return 0
    record: dict[str, Any] = {
        "date": date.today().isoformat(),
        "effort": given.effort,
        "versions": processes.versions(["gam-attention", "jax", "jaxlib", "libtpu", "flax"]),
        "results": {},
    }
    for case in CASES:
        if given.only not in str(case):
            continue
        found = compiled(case, given.effort)
        found["complaints"] = complaints(case, found)
        record["results"][str(case)] = found
        print(f"{case}: {'; '.join(found['complaints']) or 'ok'}", flush=True)
        processes.write(given.out, record, markdown(record))  # what is done is kept
    return int(any(found["complaints"] for found in record["results"].values()))


if __name__ == "__main__":
    sys.exit(main())
