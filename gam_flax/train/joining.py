"""One process on each host, joined by jax.distributed into one run."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from gam_flax.convert.errors import shorten
from gam_flax.train import last_words
from gam_flax.train.errors import TrainingError

HEARTBEAT = 45
"""Seconds of silence after which a host counts as gone, and the others end."""

FAREWELL = 5
"""Seconds that a host which failed waits for the others to end with it: most errors are of all."""


@contextmanager
def joined(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None
) -> Iterator[bool]:
    """The hosts as one: whether this is the first of them. Before jax touches a device.

    What is None is taken from Slurm, Open MPI, Kubernetes or the TPU's own metadata, as
    `jax.distributed.initialize` does. Where a host is gone the others end within a minute, with
    one line and a status that is not 0.

    Args:
        coordinator_address: HOST:PORT of process 0; any free port.
        num_processes: how many there are.
        process_id: which this is, from 0.

    Raises:
        TrainingError: what is not given cannot be found either, or the hosts do not find together.
    """
    _interpret_errors()
    import jax

    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        raise TrainingError(
            f"the hosts do not find together: {shorten(error, 160)}; say --coordinator-address, "
            "--num-processes and --process-id"
        ) from error
    try:
        yield jax.process_index() == 0
    except TrainingError:
        _end_soon(status=2)
        raise
    except (ValueError, RuntimeError):  # so collectives fail whose other side is gone
        time.sleep(2 * HEARTBEAT)  # in which the runtime ends this process, and says who it is
        _end_soon(status=1)
        raise


def _interpret_errors() -> None:
    """Standard error goes through `last_words`, and so does what C++ prints on standard output."""
    reader, writer = os.pipe()
    subprocess.Popen(
        [sys.executable, "-I", last_words.__file__], stdin=reader, start_new_session=True
    )
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding)
    for descriptor in (1, 2):
        os.dup2(writer, descriptor)
    os.close(reader)
    os.close(writer)


def _end_soon(status: int) -> None:
    """jax's own end waits for all hosts; one that failed alone would wait for minutes."""
    end = threading.Timer(FAREWELL, os._exit, (status,))
    end.daemon = True
    end.start()
