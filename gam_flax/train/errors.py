"""What training says when it cannot start or go on."""

from __future__ import annotations

from importlib.util import find_spec

from gam_flax.convert.errors import CheckpointError

LIBRARIES = ("optax", "orbax", "grain")


class TrainingError(CheckpointError):
    """A run cannot start or go on. One line: what, where, what to do."""


class DataError(TrainingError):
    """Pictures cannot be read. One line: the file, what was found, what was expected."""


def require_libraries() -> None:
    """Raises ModuleNotFoundError, with what to install, where the extra `train` is missing."""
    for name in LIBRARIES:
        if find_spec(name) is None:
            raise ModuleNotFoundError(
                f"training needs {name}, which is not installed: pip install "
                "'gam-attention[train]'",
                name=name,
            )
