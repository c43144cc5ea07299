"""What a long comparison is doing, on a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

Show = Callable[[str, float], None]
"""(what is being done, which part of the whole is done before it)"""

_STAGES = 5  # of a run, about


class Progress:
    """Where a comparison is: run, stage, layer. Each is told when it begins."""

    def __init__(self, show: Show):
        self._show = show
        self._run, self._runs, self._stages = 0, 1, 0
        self._stage = ""

    def run(self, number: int, of: int) -> None:
        """One more run begins: 0, 1, … of so many."""
        self._run, self._runs, self._stages = number, of, 0

    def stage(self, what: str) -> None:
        """A part of the run begins."""
        self._stage = what
        self._stages = min(self._stages + 1, _STAGES)
        self._tell(what)

    def layer(self, path: str) -> None:
        """The layer that is looked at now."""
        self._tell(f"{self._stage}: {path}" if path else self._stage)

    def _tell(self, what: str) -> None:
        done = (self._run + (self._stages - 1) / _STAGES) / self._runs
        self._show(f"{self._run + 1} of {self._runs}  {what}", min(done, 1.0))


@contextmanager
def progress_bar(wanted: bool) -> Iterator[Progress]:
    """A bar on the standard error while it is a terminal; gone when the work is done."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (BarColumn(24), TimeElapsedColumn(), TextColumn("{task.description}"))
    hidden = not (wanted and console.is_terminal)
    with Bar(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("", total=1.0)
        yield Progress(lambda what, done: bar.update(task, description=what, completed=done))
