"""The file of metrics: JSON lines that a killed run's next process goes on writing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gam_flax.convert.errors import shorten
from gam_flax.convert.files import whole_file
from gam_flax.train.errors import TrainingError


class MetricLines:
    """The file of metrics, a JSON object a line.

    Args:
        path: of the file.
        until: the step that the run goes on from; what was written after it is cut off, for it
            will be written again.
    """

    def __init__(self, path: Path, until: int):
        kept = [line for line in read_metrics(path) if line["step"] <= until]
        with whole_file(path, force=True) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, **values: Any) -> None:
        """One line, given to the system at once, so that a killed process loses none.

        Raises:
            TrainingError: the disk is full, or gone.
        """
        with self._said():
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()

    def to_disk(self) -> None:
        """Before a checkpoint that stands for these lines."""
        with self._said():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file; what could not be written was said when it was to be."""
        with suppress(OSError):
            self._file.close()

    @contextmanager
    def _said(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TrainingError(
                f"{shorten(self._file.name)}: cannot be written: {error.strerror}; make room, "
                "then the same call goes on from the last checkpoint"
            ) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines; what a killed process left of its last one is no object.

    Each has "step", "epoch" and "part". part "train": loss, accuracy, gradient_norm and
    learning_rate of one step. part "test": loss and accuracy over all test pictures, and
    images_per_second of the training until then, the only number that two runs do not share.
    """
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found
