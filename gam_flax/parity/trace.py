"""What a model does with one input, as numpy arrays under the paths of its layers.

torch's layers stay in torch's layout; inputs, outputs and the input's gradient are in Flax's.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np

Place = tuple[str, str]
"""A layer's path, and which of its outputs: "" for the only one, "#2" for the second call,
"[0]" for the first of a tuple, "[key]" for one of a dictionary."""


@dataclass
class Trace:
    """One run of one model, floating tensors in the dtype that they were computed in, all others in
    float64. A tensor that is handed on unchanged is one array under all its names.

    inputs: what every call of every layer was given, but the model itself, in the order of entry.
    layers: what every such call returned, in the order of return.
    order: both, as they came: True with the place of an input, False with that of an output.
    outputs: the model's own, "" for the only one.
    loss: Σ output · cotangent, or the user's own; None where no gradients were wanted.
    input_gradient, gradients: of the loss; None and empty where none was wanted.
    statistics: the buffers after the run.
    error: what the forward raised; `layers` holds what came before it.
    """

    inputs: dict[Place, np.ndarray] = field(default_factory=dict)
    layers: dict[Place, np.ndarray] = field(default_factory=dict)
    order: list[tuple[bool, Place]] = field(default_factory=list)
    outputs: dict[str, np.ndarray] = field(default_factory=dict)
    loss: np.ndarray | None = None
    input_gradient: np.ndarray | None = None
    gradients: dict[str, np.ndarray] = field(default_factory=dict)
    statistics: dict[str, np.ndarray] = field(default_factory=dict)
    error: Exception | None = None

    def forget_layers(self) -> None:
        """Lets go of what the layers took and gave, which is most of the memory."""
        self.inputs, self.layers, self.order = {}, {}, []


See = Callable[[bool, Place, Any], None]
"""Is told of each tensor that a layer takes (True) or gives (False), as it comes."""


class Calls:
    """Watches the calls of layers.

    Around every call stand `enter`, which returns the arguments to call with, and `leave`, which
    returns what the caller is to get.

    Args:
        keep: is applied to each tensor at once.
        see: takes each tensor, which is not stored then.
        tell: hears the path of each layer that is entered.
    """

    def __init__(
        self,
        keep: Callable[[Any], Any] = lambda tensor: tensor,
        *,
        see: See | None = None,
        tell: Callable[[str], None] = lambda path: None,
    ):
        self.inputs: dict[Place, Any] = {}
        self.outputs: dict[Place, Any] = {}
        self.order: list[tuple[bool, Place]] = []
        self._keep, self._see, self._tell = keep, see or self._store, tell
        self._counts: Counter[str] = Counter()
        self._running: dict[str, list[str]] = {}

    def enter(self, path: str, args: tuple) -> tuple:
        """Notes the arguments of one more call of the layer at `path`."""
        self._tell(path)
        self._counts[path] += 1
        call = self._counts[path]
        mark = f"#{call}" if call > 1 else ""
        self._running.setdefault(path, []).append(mark)
        for part, tensor in arguments(args):
            self._see(True, (path, mark + part), self._keep(tensor))
        return args

    def leave(self, path: str, output: Any) -> Any:
        """Notes the output of the call that was entered last."""
        mark = self._running[path].pop()
        for part, tensor in results(output):
            self._see(False, (path, mark + part), self._keep(tensor))
        return output

    def through(self, path: str, args: tuple, call: Callable[..., Any]) -> Any:
        """What call(*args) returns, the call being watched."""
        args = self.enter(path, args)
        try:
            output = call(*args)
        except Exception as error:
            return self.rescue(path, error)
        return self.leave(path, output)

    def rescue(self, path: str, error: Exception) -> Any:
        """What is used for the output of a call that raised."""
        raise error

    @property
    def innermost(self) -> str:
        """The path of the layer that was entered last and has not returned, "" for none."""
        running = [path for path, marks in self._running.items() if marks]
        return running[-1] if running else ""

    def _store(self, is_input: bool, place: Place, tensor: Any) -> None:
        (self.inputs if is_input else self.outputs)[place] = tensor
        self.order.append((is_input, place))


class Fed(Calls):
    """The same, but each layer is given, and its caller gets, what another model had there.

    What is noted is the model's own: what it would have given the layer, and what the layer makes
    of the other model's input. An error stays where it arises; a layer that raises gives what the
    other model's gave, and is not noted.

    Args:
        inputs, outputs: place → tensor of the other model, in this one's layout.
        adopt: (the other's tensor, this one's) → what is used instead of this one's.
        keep, watched: as for `Calls`.
    """

    def __init__(
        self,
        inputs: Mapping[Place, Any],
        outputs: Mapping[Place, Any],
        adopt: Callable[[Any, Any], Any],
        keep: Callable[[Any], Any] = lambda tensor: tensor,
        **watched: Any,
    ):
        super().__init__(keep, **watched)
        self._inputs, self._outputs, self._adopt = inputs, outputs, adopt

    def enter(self, path: str, args: tuple) -> tuple:
        super().enter(path, args)
        return self._given(self._inputs, (path, self._running[path][-1]), args, arguments)

    def leave(self, path: str, output: Any) -> Any:
        call = path, self._running[path][-1]
        super().leave(path, output)
        return self._given(self._outputs, call, output, results)

    def rescue(self, path: str, error: Exception) -> Any:
        call = path, self._running[path][-1]
        if call not in self._outputs:
            raise error
        self._running[path].pop()
        return self._outputs[call]

    def _given(self, given: Mapping[Place, Any], call: Place, value: Any, names: Naming) -> Any:
        """`value` with the other model's tensors."""
        (path, mark), parts = call, zip(tensors(value), names(value), strict=True)
        short = {full: part for (full, _), (part, _) in parts}

        def swap(part: str, own: Any) -> Any:
            place = path, mark + short[part]
            return self._adopt(given[place], own) if place in given else own

        return exchanged(value, swap)


Naming = Callable[[Any], Iterator[tuple[str, Any]]]
"""The tensors in a value, each under its name."""


def arguments(args: tuple) -> Iterator[tuple[str, Any]]:
    """The tensors among the arguments of a call; the only one is called ""."""
    found = list(tensors(args))
    yield from [("", found[0][1])] if len(found) == 1 else found


def results(output: Any) -> Iterator[tuple[str, Any]]:
    """The tensors in an output; one that has nothing but None beside it is called ""."""
    found = list(tensors(output))
    alone = isinstance(output, (tuple, list)) and len(output) > len(found) == 1
    yield from [("", found[0][1])] if alone else found


def exchanged(value: Any, swap: Callable[[str, Any], Any], part: str = "") -> Any:
    """`value` with swap(part, tensor) for each of its `tensors`."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return swap(part, value)
    if isinstance(value, Mapping):
        items = {key: exchanged(item, swap, f"{part}[{key}]") for key, item in value.items()}
        return items if type(value) is dict else type(value)(items)  # type: ignore[call-arg]
    if isinstance(value, (tuple, list)):
        new = [exchanged(item, swap, f"{part}[{i}]") for i, item in enumerate(value)]
        return type(value)(*new) if hasattr(value, "_fields") else type(value)(new)
    return value


def tensors(value: Any, part: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors in nested tuples, lists, mappings and dataclasses, each with the way to it."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        yield part, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors(item, f"{part}[{key}]")
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from tensors(item, f"{part}[{i}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for field_ in fields(value):
            yield from tensors(getattr(value, field_.name), f"{part}[{field_.name}]")


def wide(array: Any) -> np.ndarray:
    """As float64, or complex128 where it is complex; itself where it is that."""
    array = np.asarray(array)
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64, copy=False)


def lean(array: Any) -> np.ndarray:
    """As it is where it is floating or complex, else `wide`."""
    array = np.asarray(array)
    return array if array.dtype.kind in "fcV" else wide(array)  # numpy files bfloat16 under V


def cotangent(part: str, shape: tuple[int, ...]) -> np.ndarray:
    """What an output is multiplied with in the loss: fixed, between -1 and 1, and in steps of
    1/8, which every dtype holds exactly."""
    rng = np.random.default_rng(zlib.crc32(part.encode()))
    return np.asarray(rng.integers(-8, 9, shape) / 8)


def channels_last(array: np.ndarray) -> np.ndarray:
    """(B, C, *space) → (B, *space, C); arrays of three axes and fewer have the same order in both
    frameworks."""
    return np.moveaxis(array, 1, -1) if array.ndim >= 4 else array


def unlaid(
    layout: Callable[[np.ndarray], np.ndarray], array: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray | None:
    """The array of this shape that `layout` turns into `array`; None where it does not just move
    numbers."""
    try:
        places = layout(np.arange(array.size).reshape(shape))
    except (ValueError, IndexError):
        return None
    seen = np.zeros(array.size, bool)
    seen[places] = True
    if places.shape != array.shape or not seen.all():
        return None
    found = np.empty(array.size, array.dtype)
    found[places.ravel()] = array.ravel()
    return found.reshape(shape)


def sequence_last(array: np.ndarray) -> np.ndarray:
    """(B, C, L) → (B, L, C), as 1-D convolutions have it."""
    return array.swapaxes(1, 2)


def channels_first(array: np.ndarray) -> np.ndarray:
    """(B, *space, C) → (B, C, *space), the opposite of `channels_last`."""
    return np.moveaxis(array, -1, 1) if array.ndim >= 4 else array
