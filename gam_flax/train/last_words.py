"""What jax's runtime prints when it ends a process because another host is gone: as one line.

The runtime ends a process from within, by abort, after a page of C++: no Python runs any more that
could say it better. So a small process of its own, which `joining` starts, has the standard error
of the one that trains, and hands on all but that. It needs the standard library alone.
"""

from __future__ import annotations

import re
import signal
import sys
from typing import BinaryIO

FATAL = b"Terminating process because the JAX distributed service detected fatal errors"

GREETING = b"[Gloo]"
"""How the collectives of CPUs begin a line that says nothing is wrong."""


def hand_on(source: BinaryIO, target: BinaryIO) -> None:
    """Copies line by line; what begins with `FATAL` becomes `in_short`."""
    fatal = b""
    for line in source:
        if fatal or FATAL in line:
            fatal += line
        elif not line.startswith(GREETING):
            target.write(line)
            target.flush()
    if fatal:
        target.write(f"{in_short(fatal.decode('utf-8', 'replace'))}\n".encode())
        target.flush()


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
    return f"host {numbers[0]} is gone" if len(numbers) == 1 else f"hosts {numbers} are gone"


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the other one, and that this one
    hand_on(sys.stdin.buffer, sys.stderr.buffer)
