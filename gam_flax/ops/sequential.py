"""Layers applied in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flax import nnx


class Sequential(nnx.Module):
    """`torch.nn.Sequential` with torch's paths: layer i is at `i`, where `nnx.Sequential` puts
    it at `layers.i`.

    Args:
        layers: modules or functions of one argument.
    """

    def __init__(self, layers: Iterable[Callable[[Any], Any]]):
        self.length = 0
        for layer in layers:
            setattr(self, str(self.length), layer)
            self.length += 1

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return getattr(self, str(range(self.length)[index]))

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(self.length))

    def __call__(self, x: Any) -> Any:
        for layer in self:
            x = layer(x)
        return x


def run_layers(layers: Iterable[Any], x: Any, *, remat: bool) -> Any:
    """The layers in turn. With `remat` the backward pass computes each once more from its input,
    and what is inside it is not kept."""
    if not remat and isinstance(layers, Sequential):
        return layers(x)
    for layer in layers:
        x = _recomputed(layer, x) if remat else layer(x)
    return x


@nnx.remat
def _recomputed(layer, x):
    return layer(x)
