"""Which tensor of one model stands for which of the other, and how one is laid over the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from functools import partial

import numpy as np

from gam_flax.convert import leaves
from gam_flax.convert.rename import Rename, renamed
from gam_flax.parity.judge import gap
from gam_flax.parity.trace import Place, channels_last, sequence_last, wide


class Names:
    """Flax's names for torch's."""

    def __init__(self, rename: Rename):
        self._rename = rename

    def layer(self, path: str) -> str:
        """The Flax path of a torch layer."""
        return renamed(path, self._rename)

    def place(self, place: Place) -> Place:
        """The same output of the same call of the Flax layer."""
        path, part = place
        return self.layer(path), part

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


Layout = Callable[[np.ndarray], np.ndarray]
"""A tensor as torch has it → the same as Flax has it."""


class Layouts:
    """How torch's tensors become Flax's.

    Weights by the leaf table, pictures by moving the channels last. Where a picture is flattened
    for a linear layer, torch's features stand in the order (C, H, W) and Flax's usually in
    (H, W, C): a kernel that is torch's in that order tells so, and then features of that length
    may stand either way.

    Args:
        own: the user's word: key of a parameter, path of a layer for its output, or path with
            " (input)" → layout.
        turned: the Flax paths of the kernels that `leaves` calls so.
    """

    def __init__(self, own: Mapping[str, Layout], turned: Container[str] = ()):
        self._own = own
        self.turned = turned
        self._flattened: dict[str, np.ndarray] = {}

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
        return min(
            layouts, key=lambda layout: float(np.nansum(gap(wide(layout(torch)), wide(flax))))
        )


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
