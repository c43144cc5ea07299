"""Contestants measured in processes of their own, turn by turn, and what came of it, written.

    runs = take_turns([Contestant("a", [...]), Contestant("b", [...])], rounds=7)
    record = make_record("what this is", runs, on=..., settings={...}, packages=["jax"])
    write(out, record, markdown)

Each run is a fresh process in a fresh, empty folder; it prints one JSON object of numbers as its
last line. A round runs every contestant once, and each round begins with another one, so that a
machine that slows down or wakes up does so for all alike.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import date
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

Runs = dict[str, list[dict[str, float]]]


class BenchmarkError(Exception):
    """A contestant failed; the text says which, how, and what it printed on stderr."""


@dataclass(frozen=True)
class Contestant:
    """A command to be measured.

    environment: added to that of this process.
    missing: why it cannot run here; the record then says so instead of its numbers.
    """

    name: str
    command: Sequence[str | os.PathLike]
    environment: Mapping[str, str] = field(default_factory=dict)
    missing: str | None = None


def take_turns(
    contestants: Sequence[Contestant],
    rounds: int,
    *,
    warm_up: bool = True,
    on_run: Callable[[str], None] = lambda name: None,
) -> Runs:
    """Runs every contestant that can run once a round.

    Args:
        warm_up: one round before the first that does not count: it fills the disk's cache and
            whatever the contestants keep between runs.
        on_run: called before each run with what is run, say for a progress bar.

    Raises:
        BenchmarkError: a contestant failed, or printed no numbers.
    """
    able = [contestant for contestant in contestants if contestant.missing is None]
    if len({contestant.name for contestant in able}) < len(able):
        raise ValueError("two contestants have the same name")
    runs: Runs = {contestant.name: [] for contestant in able}
    for turn in range(-int(warm_up), rounds):
        for place in range(len(able)):
            contestant = able[(max(turn, 0) + place) % len(able)]
            label = f"round {turn + 1}" if turn >= 0 else "warm-up"
            on_run(f"{label}: {contestant.name}")
            numbers = run_alone(contestant, label)
            if turn >= 0:
                runs[contestant.name].append(numbers)
    return runs


def count_runs(contestants: Sequence[Contestant], rounds: int, *, warm_up: bool = True) -> int:
    """How many processes `take_turns` starts."""
    return (rounds + warm_up) * sum(contestant.missing is None for contestant in contestants)


def run_alone(contestant: Contestant, label: str = "run") -> dict[str, float]:
    """The numbers of one process. Whatever it started ends with it, also on Ctrl-C."""
    with ExitStack() as stack:
        # A helper that was just ended may still have left a file there.
        fresh = tempfile.TemporaryDirectory(prefix="benchmark-", ignore_cleanup_errors=True)
        folder = stack.enter_context(fresh)
        process = subprocess.Popen(
            [str(word) for word in contestant.command],
            cwd=folder,
            env={**os.environ, **contestant.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        stack.enter_context(process)
        stack.callback(_end_group, process)
        printed, complaints = process.communicate()
    where = f"{contestant.name}, {label}"
    if process.returncode:
        said = complaints.strip() or "nothing on stderr"
        raise BenchmarkError(f"{where}: exit status {process.returncode}\n{said}")
    try:
        numbers = json.loads(printed.strip().rpartition("\n")[2])
    except json.JSONDecodeError:
        numbers = None
    if not isinstance(numbers, dict) or not all(
        isinstance(number, int | float) for number in numbers.values()
    ):
        raise BenchmarkError(f"{where}: its last line is no JSON object of numbers\n{printed}")
    return numbers


def _end_group(process: subprocess.Popen) -> None:
    """Ends what is left of a contestant and its helpers, which share a process group."""
    with suppress(ProcessLookupError, PermissionError):  # macOS: the latter where all have ended
        os.killpg(process.pid, signal.SIGKILL)


def ends_in_a_line(main: Callable[[], int]) -> Callable[[], int]:
    """A benchmark's `main` whose failure, or Ctrl-C, is a line on stderr and an exit status."""

    @wraps(main)
    def ended() -> int:
        try:
            return main()
        except BenchmarkError as error:
            print(error, file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130

    return ended


# The record


def summary(runs: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Number → its median, lowest and highest over the runs."""
    return {
        name: {
            "median": statistics.median(values),
            "lowest": min(values),
            "highest": max(values),
        }
        for name in runs[0]
        if (values := [run[name] for run in runs])
    }


def make_record(
    title: str,
    runs: Runs,
    *,
    on: Mapping[str, Any],
    settings: Mapping[str, Any],
    packages: Sequence[str],
    contestants: Sequence[Contestant] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """All that a reader needs to judge the numbers; no path, no host's name.

    Args:
        on: what `machine` said before the first run: afterwards the load is the benchmark's own.
    """
    return {
        "title": title,
        "date": date.today().isoformat(),
        "machine": dict(on),
        "versions": {"python": platform.python_version(), **versions(packages)},
        "settings": dict(settings),
        "notes": list(notes),
        "missing": {one.name: one.missing for one in contestants if one.missing is not None},
        "results": {name: summary(all_runs) for name, all_runs in runs.items()},
        "runs": runs,
    }


def machine() -> dict[str, Any]:
    """The processor, its cores, those in use here, the memory, and how busy it is."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "cores_in_use": cores_in_use(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    pairs = [line.partition(":")[::2] for line in lines]
    said = {name.strip(): value.strip() for name, value in reversed(pairs)}
    if "model name" not in said:
        return platform.processor() or platform.machine()
    # A virtual machine's name says little.
    numbers = [f"{name} {said[name]}" for name in ("cpu family", "model") if name in said]
    return f"{said['model name']} ({', '.join(numbers)})" if numbers else said["model name"]


def cores_in_use() -> int:
    """How many cores this process and its children may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def use_cores(count: int) -> int:
    """Keeps this process and its children to so many cores, where the system can; says how many.

    Both frameworks start a thread for each core that they may use.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    return cores_in_use()


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Package → its version, where it is installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


# The table


@dataclass(frozen=True)
class Column:
    """A number of the results: its name there, its heading, and how it is shown."""

    name: str
    heading: str
    shown: str = "{:.2f}"

    @property
    def plain(self) -> str:
        """The heading without the unit, for ratios."""
        return self.heading.partition(",")[0]


def table(
    results: Mapping[str, Mapping[str, Any]], columns: Sequence[Column], *, spread: bool = True
) -> str:
    """Markdown: a row a contestant, medians; with `spread` the lowest and highest below."""

    def cell(result: Mapping[str, Any], column: Column) -> str:
        if column.name not in result:
            return "–"
        show, number = column.shown.format, result[column.name]
        ends = f"<br><sub>{show(number['lowest'])} – {show(number['highest'])}</sub>"
        return show(number["median"]) + (ends if spread else "")

    rows = [[name, *(cell(result, c) for c in columns)] for name, result in results.items()]
    return markdown_table(["", *(column.heading for column in columns)], rows)


def ratios(
    results: Mapping[str, Mapping[str, Any]],
    columns: Sequence[Column],
    pairs: Sequence[tuple[str, str]],
) -> str:
    """Markdown: of each pair the first's medians over the second's; below 1 is less."""

    def cell(name: str, other: str, column: Column) -> str:
        ours, theirs = results[name].get(column.name), results[other].get(column.name)
        if ours is None or theirs is None or not theirs["median"]:
            return "–"
        return f"{ours['median'] / theirs['median']:.2f}"

    lines = [
        [f"{name} ÷ {other}", *(cell(name, other, column) for column in columns)]
        for name, other in pairs
        if name in results and other in results
    ]
    return markdown_table(["", *(column.plain for column in columns)], lines)


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---", *("---:" for _ in headings[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def heading(record: Mapping[str, Any]) -> str:
    """Markdown: the title, and on what machine, when and with which versions it was measured."""
    on = record["machine"]
    settings = ", ".join(f"{name} {value}" for name, value in record["settings"].items())
    used = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    busy = on["load_average"] > on["cores_in_use"] / 4
    lines = [
        f"# {record['title']}",
        *(["**The machine was busy: do not trust the times.**"] if busy else []),
        f"{record['date']}. {on['processor']}, {on['cores_in_use']} of {on['cores']} cores in use, "
        f"{on['memory_gb']} GB, {on['system']}; load average before {on['load_average']}.",
        f"{settings[:1].upper()}{settings[1:]}.",
        f"Versions: {used}.",
    ]
    return "\n\n".join(lines)


def write(out: Path, record: Mapping[str, Any], markdown: str) -> tuple[Path, Path]:
    """Writes `out`.json and `out`.md in place of older ones; each is whole or not there."""
    out.parent.mkdir(parents=True, exist_ok=True)
    texts = {
        out.with_name(out.name + ".json"): json.dumps(record, indent=1, ensure_ascii=False) + "\n",
        out.with_name(out.name + ".md"): markdown.rstrip() + "\n",
    }
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=out.parent) as folder:
        for path, text in texts.items():
            (Path(folder) / path.name).write_text(text, encoding="utf-8")
        for path in texts:
            os.replace(Path(folder) / path.name, path)
    json_path, markdown_path = texts
    return json_path, markdown_path
