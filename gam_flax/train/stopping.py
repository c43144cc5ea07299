"""Ctrl-C and a machine's shutdown: the step ends and is saved first."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """As a context: the first SIGINT or SIGTERM sets `asked`, the second does what it always did.

    Outside the main thread, where no signals are seen, it does nothing.
    """

    def __init__(self):
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def at(self, step: int) -> bool:
        """Whether to stop after this step."""
        return self.asked

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self.__exit__()


class SharedStopRequest:
    """The same for several hosts: a SIGTERM to any of them stops all, after the same step.

    jax hears the signal, and the hosts agree on the step; Ctrl-C does what it always did.
    """

    def __enter__(self) -> SharedStopRequest:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def at(self, step: int) -> bool:
        """Whether to stop after this step; to be asked after each."""
        return multihost_utils.reached_preemption_sync_point(step)


def stop_request() -> StopRequest | SharedStopRequest:
    """What one process, or one of several, listens to."""
    return StopRequest() if jax.process_count() == 1 else SharedStopRequest()
