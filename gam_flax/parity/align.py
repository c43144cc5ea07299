"""Which tensor of one model stands for which of the other, and how one is laid over the other."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping

import numpy as np

from gam_flax.convert import leaves
from gam_flax.convert.rename import Rename, renamed
from gam_flax.parity.judge import gap
from gam_flax.parity.trace import Place, channels_last


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


def lay_parameter(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """A torch parameter as the Flax leaf `name` has it, None where it has not that shape.

    Axes of length one do not count: a 1×1 convolution is a linear layer.
    """
    array = leaves.to_flax_layout(name, array)
    return array.reshape(shape) if _long(array.shape) == _long(shape) else None


def layer_layout(torch: np.ndarray, flax: np.ndarray) -> Callable[[np.ndarray], np.ndarray] | None:
    """How a torch layer's output becomes Flax's: channels moved last, or as it is.

    torch itself holds pictures channels last around a Linear or a LayerNorm. The shape tells, and
    where it leaves both, the smaller difference. Axes of length one do not count. None: neither.
    """

    def reshaped(move: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        return lambda array: move(array).reshape(flax.shape)

    moves = [channels_last, np.asarray]
    fitting = [m for m in moves if m(torch).shape == flax.shape]
    fitting = fitting or [m for m in moves if _long(m(torch).shape) == _long(flax.shape)]
    layouts = [reshaped(move) for move in fitting]
    if len(layouts) < 2 or torch.ndim < 4:
        return next(iter(layouts), None)
    return min(layouts, key=lambda layout: float(np.nansum(gap(layout(torch), flax))))


def _long(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(length for length in shape if length != 1)
