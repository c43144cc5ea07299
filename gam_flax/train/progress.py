"""The progress bar of a run."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.progress import Progress as Bar
from rich.progress import TextColumn

UNTOLD = ("gradient_norm", "learning_rate")
"""What the file of metrics has and the bar has no room for."""


class Progress:
    """Steps done, loss and the like, images per second; nothing where nobody looks.

    Args:
        console: where it is drawn; lines said while it runs stay above it.
        total: steps of the run.
        done: of them, already made.
    """

    def __init__(self, console: Console, total: int, done: int):
        columns = (*Bar.get_default_columns(), TextColumn("{task.fields[note]}"))
        self._bar = Bar(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("training", total=total, completed=done, note="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def show(self, done: int, values: Mapping[str, float], speed: float) -> None:
        """After a step, with what `MetricLines` writes of it."""
        told = [f"{name} {values[name]:.3f}" for name in values if name not in UNTOLD]
        note = "  ".join([*told, f"{speed:,.0f} images/s"])
        self._bar.update(self._task, completed=done, note=note)
