"""Checkpoints made for the tests of reading."""

from __future__ import annotations

import contextlib
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason=".pt files are read through torch")
nn = torch.nn

REAL = Path(__file__).parents[2].parent / "shared" / "data"


def weights(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "conv.weight": torch.randn(3, 2, 1, 1, generator=generator),
        "conv.bias": torch.randn(3, generator=generator),
    }


def save(contents: Any, path: Path, *, legacy: bool = False) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch looks for the source of classes in vain
        torch.save(contents, path, _use_new_zipfile_serialization=not legacy)
    return path


def assert_holds(found: Any, expected: dict[str, Any]) -> None:
    assert list(found.tensors) == list(expected)
    for key, tensor in expected.items():
        array = found.tensors[key]
        assert array.shape == tuple(tensor.shape)
        stored = tensor.detach().clone().reshape(-1).view(torch.uint8)
        assert array.tobytes() == stored.numpy().tobytes()


@contextlib.contextmanager
def lost(*classes: type) -> Iterator[None]:
    """Gives classes a home in a module `models.common` that is gone when they are read."""
    names = ["models", "models.common"]
    home = types.ModuleType("models.common")
    sys.modules.update(zip(names, [types.ModuleType("models"), home], strict=True))
    for cls in classes:
        cls.__module__, cls.__qualname__ = "models.common", cls.__name__
        setattr(home, cls.__name__, cls)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
