"""Which tensor of one model stands for which of the other, and how one is laid over the other."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import partial
from typing import Any

import numpy as np

from gam_flax.convert import leaves
from gam_flax.convert.rename import Rename, renamed
from gam_flax.parity.judge import gap
from gam_flax.parity.trace import Place, channels_last, sequence_last, wide

Calls = Mapping[Place, np.ndarray]
"""What the layers were given, call by call."""

_FAR_NEARER = 0.1  # the part of the distance by order that another pairing may have
_UNLIKE = 1e30  # the distance of inputs that cannot be compared


class Names:
    """Flax's names for torch's."""

    def __init__(self, rename: Rename):
        self._rename = rename
        self._calls: dict[str, dict[str, str]] = {}  # path → mark of a call → Flax's mark

    def layer(self, path: str) -> str:
        """The Flax path of a torch layer."""
        return renamed(path, self._rename)

    def place(self, place: Place, known: Container[Place] = ()) -> Place:
        """The same output of the same call of the Flax layer.

        Args:
            known: Flax's places. Where one side returns (y, more) and the other y, y is paired.
        """
        mark, part = split_call(place[1])
        path, mark = self.layer(place[0]), self._calls.get(place[0], {}).get(mark, mark)
        also = {"": "[0]", "[0]": ""}.get(part, part)
        found = (path, mark + part), (path, mark + also)
        return next((place for place in found if place in known), found[0])

    def learn_calls(self, torch: Calls, flax: Calls, apart: Callable[..., float]) -> None:
        """Pairs the calls of a layer that is called several times, in another order in Flax.

        By order, unless another pairing brings the inputs far nearer to each other. What was found
        once stays.

        Args:
            torch, flax: what every place was given.
            apart: of a path and two such tensors, how far they are apart.
        """
        theirs = _by_call(flax)
        for path, mine in _by_call(torch).items():
            other = theirs.get(self.layer(path), {})
            if len(mine) < 2 or len(mine) != len(other) or path in self._calls:
                continue
            costs = np.array(
                [[_cost(path, a, b, apart) for b in other.values()] for a in mine.values()]
            )
            columns = _nearest(costs)
            nearer = costs[range(len(mine)), columns].sum() < _FAR_NEARER * np.trace(costs)
            marks = [list(other)[column] for column in columns] if nearer else list(mine)
            self._calls[path] = dict(zip(mine, marks, strict=True))

    def leaf(self, key: str, known: Container[str]) -> str | None:
        """The Flax name of a torch parameter or buffer, among the `known` ones; None for none.

        The leaf table says what torch's leaf may be called: a `weight` is a kernel, a scale or
        an embedding.
        """
        if isinstance(self._rename, Mapping) and key in self._rename:
            names = [self._rename[key]]
        else:
            path, leaf = leaves.split(key)
            flax = [name for name, torch in leaves.TO_TORCH.items() if torch == leaf]
            names = [leaves.join(self.layer(path), name) for name in [*flax, leaf]]
        return next((name for name in names if name in known), None)


def check_names(option: str, names: Iterable[str], torch_model: Any) -> None:
    """Raises ValueError where a name in `rename` or `layout` is of no layer, parameter, buffer or
    output of torch's model."""
    tensors = [*torch_model.named_parameters(), *torch_model.named_buffers()]
    known = [path for path, _ in [*torch_model.named_modules(), *tensors]]
    for name in names:
        path = re.sub(r"(#\d+)?(\[.*\])?( \(input\))?$", "", name)
        if path not in known:
            near = get_close_matches(path, known, 3)
            like = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"{option}= names {name!r}, which the torch model has not{like}")


def split_call(part: str) -> tuple[str, str]:
    """("#2[0]") as the mark of the call and the part of its output, ("#2", "[0]")."""
    found = re.fullmatch(r"((?:#\d+)?)(.*)", part, re.DOTALL)
    assert found is not None
    return found[1], found[2]


def _by_call(tensors: Calls) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Path → mark of the call → part → tensor."""
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for (path, part), tensor in tensors.items():
        mark, rest = split_call(part)
        found.setdefault(path, {}).setdefault(mark, {})[rest] = tensor
    return found


def _cost(
    path: str,
    torch: Mapping[str, np.ndarray],
    flax: Mapping[str, np.ndarray],
    apart: Callable[[str, np.ndarray, np.ndarray], float],
) -> float:
    if torch.keys() != flax.keys():
        return _UNLIKE
    return min(sum(apart(path, tensor, flax[part]) for part, tensor in torch.items()), _UNLIKE)


def _nearest(costs: np.ndarray) -> list[int]:
    """For each row the cheapest column that no row before has taken."""
    taken: list[int] = []
    for row in costs:
        free = [column for column in range(len(row)) if column not in taken]
        taken.append(min(free, key=row.__getitem__))
    return taken


Layout = Callable[[np.ndarray], np.ndarray]
"""A tensor as torch has it → the same as Flax has it."""

OutputLayout = Callable[[str, np.ndarray], Layout]
"""Part of the model's output, torch's tensor → its layout; see `Layouts.output`."""


class Layouts:
    """How torch's tensors become Flax's.

    Weights by the leaf table, pictures by moving the channels last. Where a picture is flattened
    for a linear layer, torch's features stand in the order (C, H, W) and Flax's usually in
    (H, W, C): a kernel that is torch's in that order tells so, and then features of that length
    may stand either way.

    Args:
        own: the user's word: key of a parameter, path of a layer for its output, or path with
            " (input)" → layout; "" or "[…]" for an output of the model.
        turned: the Flax paths of the kernels that `leaves` calls so.
    """

    def __init__(self, own: Mapping[str, Layout], turned: Container[str] = ()):
        self._own = own
        self.turned = turned
        self._flattened: dict[str, np.ndarray] = {}
        self._outputs: dict[str, Layout] = {}
        self._expected: dict[str, np.ndarray] = {}

    def parameter(
        self, key: str, name: str, array: np.ndarray, shape: tuple[int, ...]
    ) -> np.ndarray | None:
        """A torch parameter as the Flax leaf `name` has it, None where it has not that shape.

        Axes of length one do not count: a 1×1 convolution is a linear layer.
        """
        if key in self._own:
            laid = self._own[key](array)
            return laid if laid.shape == shape else None
        array = self.leaf(name, array)
        if _long(array.shape) != _long(shape):
            return None
        array = array.reshape(shape)
        return array[self._flattened[name]] if name in self._flattened else array

    def leaf(self, name: str, array: np.ndarray) -> np.ndarray:
        """A torch parameter as the table of leaves lays it out for the Flax leaf `name`."""
        return leaves.to_flax_layout(name, array, turned=name in self.turned)

    def learn_flattening(
        self,
        name: str,
        torch: np.ndarray,
        flax: np.ndarray,
        pictures: Iterable[tuple[int, ...]],
    ) -> None:
        """Notes that Flax has the parameter in the order of a flattened picture, if it has."""
        for order in flattenings(pictures, len(flax) if flax.ndim else 0):
            if np.array_equal(torch[order], flax):
                self._flattened[name] = order

    def is_told(self, path: str) -> bool:
        """Whether the user has said how this activation is laid out."""
        return path in self._own

    def expect(self, outputs: Mapping[str, np.ndarray]) -> None:
        """Hears what Flax's model gives, before `output` is asked; the first time counts."""
        self._expected = self._expected or dict(outputs)

    def output(self, part: str, torch: np.ndarray) -> Layout:
        """How an output of torch's model becomes Flax's, for good.

        Pictures have their channels moved. What is none, such as the maps of an attention, and
        what torch itself gives channels last, is as it stands: the shape tells, and where it does
        not, the numbers.
        """
        if part not in self._outputs:
            self._outputs[part] = self._own.get(part) or _picture(torch, self._expected.get(part))
        return self._outputs[part]

    def activation(self, path: str, torch: np.ndarray, flax: np.ndarray | None) -> Layout | None:
        """How a torch activation becomes Flax's: channels moved last, or as it is.

        torch itself holds pictures channels last around a Linear or a LayerNorm, and sequences
        channels first around a 1-D convolution. The shape tells, and where it leaves several, the
        smallest difference. Axes of length one do not count. None: no way.
        """
        if path in self._own:
            return self._own[path]
        if flax is None:
            return channels_last
        shape = flax.shape

        def reshaped(move: Layout) -> Layout:
            return lambda array: move(array).reshape(shape)

        moves = [np.asarray, sequence_last] if torch.ndim == 3 else [channels_last, np.asarray]
        fitting = [m for m in moves if m(torch).shape == shape]
        fitting = fitting or [m for m in moves if _long(m(torch).shape) == _long(shape)]
        layouts = [reshaped(move) for move in (fitting if torch.ndim >= 3 else fitting[:1])]
        if fitting and torch.ndim == 2:
            orders = [o for o in self._flattened.values() if len(o) == torch.shape[1]]
            layouts += [partial(_reordered, order) for order in orders[:1]]
        if len(layouts) < 2:
            return next(iter(layouts), None)
        return min(layouts, key=lambda layout: _distance(layout(torch), flax))


def _picture(torch: np.ndarray, flax: np.ndarray | None) -> Layout:
    """Whether an output has its channels moved."""
    moves = [channels_last, np.asarray] if torch.ndim >= 4 and flax is not None else []
    fitting = [move for move in moves if flax is not None and move(torch).shape == flax.shape]
    if len(fitting) < 2:
        return next(iter(fitting), channels_last)
    return min(fitting, key=lambda move: _distance(move(torch), flax))


def _distance(a: np.ndarray, b: Any) -> float:
    return float(np.nansum(gap(wide(a), wide(b))))


def flattenings(pictures: Iterable[tuple[int, ...]], length: int) -> Iterator[np.ndarray]:
    """The orders in which Flax may have `length` features that torch flattened from one of
    `pictures`, (C, H, W)."""
    for shape in dict.fromkeys(pictures):
        if len(shape) >= 2 and math.prod(shape) == length and 1 < shape[0] < length:
            yield np.moveaxis(np.arange(length).reshape(shape), 0, -1).ravel()


def _reordered(order: np.ndarray, array: np.ndarray) -> np.ndarray:
    return array[:, order]


def _long(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)
