"""What a model does with one input, as numpy arrays under the paths of its layers.

torch's layers stay in torch's layout; inputs, outputs and the input's gradient are in Flax's.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Place = tuple[str, str]
"""A layer's path, and which of its outputs: "" for the only one, "#2" for the second call,
"[0]" for the first of a tuple, "[key]" for one of a dictionary."""


@dataclass
class Trace:
    """One run of one model, in float64 or complex128 whatever it was computed in.

    layers: the output of every call of every layer but the model itself, in the order of return.
    outputs: the model's own, "" for the only one.
    input_gradient, gradients: of Σ output · cotangent; None and empty where none was wanted.
    statistics: the buffers after the run.
    error: what the forward raised; `layers` holds what came before it.
    """

    layers: dict[Place, np.ndarray] = field(default_factory=dict)
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    input_gradient: np.ndarray | None = None
    gradients: dict[str, np.ndarray] = field(default_factory=dict)
    statistics: dict[str, np.ndarray] = field(default_factory=dict)
    error: Exception | None = None


class Calls:
    """Collects what layers return. `keep` is applied to each tensor at once."""

    def __init__(self, keep: Callable[[Any], Any] = lambda tensor: tensor):
        self.outputs: dict[Place, Any] = {}
        self._keep = keep
        self._counts: Counter[str] = Counter()

    def add(self, path: str, output: Any) -> None:
        """Notes the output of one more call of the layer at `path`."""
        self._counts[path] += 1
        call = self._counts[path]
        mark = f"#{call}" if call > 1 else ""
        for part, tensor in tensors(output):
            self.outputs[path, mark + part] = self._keep(tensor)


def tensors(value: Any, part: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors in nested tuples, lists and dictionaries, each with the way to it."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        yield part, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, f"{part}[{key}]")
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from tensors(item, f"{part}[{i}]")


def wide(array: Any) -> np.ndarray:
    """As float64, or complex128 where it is complex."""
    array = np.asarray(array)
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def cotangent(part: str, shape: tuple[int, ...]) -> np.ndarray:
    """What an output is multiplied with in the loss: fixed, between -1 and 1, and in steps of
    1/8, which every dtype holds exactly."""
    rng = np.random.default_rng(zlib.crc32(part.encode()))
    return rng.integers(-8, 9, shape) / 8


def channels_last(array: np.ndarray) -> np.ndarray:
    """(B, C, *space) → (B, *space, C); arrays of three axes and fewer have the same order in both
    frameworks."""
    return np.moveaxis(array, 1, -1) if array.ndim >= 4 else array


def channels_first(array: np.ndarray) -> np.ndarray:
    """(B, *space, C) → (B, C, *space), the opposite of `channels_last`."""
    return np.moveaxis(array, -1, 1) if array.ndim >= 4 else array
