"""The metrics once more, for TensorBoard."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any


class Board:
    """Takes what `MetricLines` takes, and draws it in TensorBoard: train/loss, test/accuracy, ….

    Args:
        folder: for `tensorboard --logdir`.
        until: the step that the run goes on from; TensorBoard hides what came after it.

    Raises:
        ModuleNotFoundError: tensorboardX, the extra `tensorboard`, is not installed.
    """

    def __init__(self, folder: Path, until: int):
        writer = import_module("tensorboardX").SummaryWriter
        self._writer = writer(str(folder), purge_step=until + 1)

    def write(self, *, step: int, part: str, **values: Any) -> None:
        """A point of each curve."""
        for name, value in values.items():
            self._writer.add_scalar(f"{part}/{name}", value, step)

    def to_disk(self) -> None:
        """Before a checkpoint that stands for these points."""
        self._writer.flush()

    def close(self) -> None:
        """Writes what is left."""
        self._writer.close()
