"""A list of layers applied in turn."""

from __future__ import annotations

from typing import Any

from flax import nnx


class Sequential(nnx.List):
    """`torch.nn.Sequential` with torch's paths: member i is at `i`, where `nnx.Sequential` puts
    it at `layers.i`."""

    def __call__(self, x: Any) -> Any:
        for layer in self:
            x = layer(x)
        return x
