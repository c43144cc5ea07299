"""What jax's runtime prints when it ends a process because another host is gone: as one line.

The runtime ends a process from within, by abort, after a page of C++: no Python runs any more that
could say it better. So a small process of its own, which `joining` starts, has the standard error
of the one that trains, and hands on all but that. It needs the standard library alone.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

FATAL = b"Terminating process because the JAX distributed service detected fatal errors"

SERVICE = re.compile(rb"[EW]\d+ .*(coordination_service|preemption_sync_manager)")
"""How its source files say on several lines before what they will end the process for."""

HARMLESS = re.compile(rb"\[Gloo\]|W\d+ .*preemption_notifier")
"""The collectives of CPUs greet each other; a SIGTERM that stops the run in good order is noted."""


def hand_on(lines: Iterable[bytes], write: Callable[[bytes], Any]) -> None:
    """Writes the lines; the end, from the service's first complaint on, becomes `in_short`."""
    end = b""
    for line in lines:
        if end or SERVICE.match(line) or FATAL in line:
            end += line
        elif not HARMLESS.match(line):
            write(line)
    if FATAL in end:
        end = f"{in_short(end.decode('utf-8', 'replace'))}\n".encode()
    write(end)


def in_short(fatal: str) -> str:
    """One line: who is gone, and what to do."""
    return (
        f"gam-flax: {_gone(fatal)}: killed, out of memory, or stopped by an error that stands in "
        "its own output; this host stops too; start all of them again, the run goes on from its "
        "last checkpoint"
    )


def _gone(fatal: str) -> str:
    if "leader task" in fatal:
        return "host 0 is gone"
    silent = re.search(r"stopped sending heartbeats\):\s*(\d[\d,\s]*)", fatal)
    if silent is None:
        return "another host is gone"
    numbers = re.findall(r"\d+", silent[1])
    if len(numbers) == 1:
        return f"host {numbers[0]} is gone"
    return f"hosts {' and '.join(numbers)} are gone"


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the other one, and that this one
    hand_on(sys.stdin.buffer, partial(os.write, 2))
