"""What a measured process does about itself: times its stages, watches its memory, reports.

Loads nothing but the standard library, so that the framework under test is all that is measured.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of ru_maxrss


def peak_memory(who: int = resource.RUSAGE_SELF) -> float:
    """The most memory that this process ever held, in MB.

    Linux hands the peak of the process that starts another one down to it: whoever starts a
    measured process must be small itself.
    """
    return resource.getrusage(who).ru_maxrss * _BYTES / 1e6


class Stages:
    """The seconds of each stage, in `seconds`, and the peak of memory after it, in `peaks`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        self.peaks[name] = peak_memory()

    def repeat(self, name: str, run: Callable[[], Any], times: int, seconds: float = 0.0) -> None:
        """A stage that is run several times; the median counts.

        seconds: to run it for before it counts, since the first calls of a process find no memory
            ready for them, and at least so long again.
        """
        if seconds:
            _run_for(run, 1, seconds)
        self.seconds[name] = statistics.median(_run_for(run, times, seconds))
        self.peaks[name] = peak_memory()


def _run_for(run: Callable[[], Any], times: int, seconds: float) -> list[float]:
    """The seconds of each call; at least so many, and so many seconds of them."""
    taken: list[float] = []
    while len(taken) < times or sum(taken) < seconds:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return taken


def report(numbers: dict[str, float]) -> None:
    """Hands the numbers to the process that measures; the last thing to be printed."""
    print(json.dumps(numbers), flush=True)
