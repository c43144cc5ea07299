"""What the attention blocks of a network did to its input, without another forward pass.

A gate is what a method of the block returns, and `nnx.capture(method_outputs=…)` notes what
methods return:

| block | channel gate               | spatial gate               |
|-------|----------------------------|----------------------------|
| GAM   | `channel_attention(x)`     | `spatial_attention(x)`     |
| CBAM  | `channel_attention(x)`     | `spatial_attention(x)`     |
| SE    | `channel_attention(x)`     |                            |
| BAM   | `gate(x)`, of both at once | `gate(x)`                  |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from gam_flax.attention.bam import BAM
from gam_flax.attention.cbam import CBAM
from gam_flax.attention.common import check_choice
from gam_flax.attention.gam import GAM
from gam_flax.attention.se import SqueezeExcitation
from gam_flax.convert.errors import shorten
from gam_flax.convert.flax_paths import built, dotted
from gam_flax.optimize import get, put

Path = tuple[Any, ...]
Method = tuple[str, ...]
"""A path below the block, and the method at its end."""

CHANNEL, SPATIAL = ("channel_attention", "__call__"), ("spatial_attention", "__call__")

GATES: dict[type[nnx.Module], tuple[str, Method, Method | None]] = {
    GAM: ("GAM", CHANNEL, SPATIAL),
    CBAM: ("CBAM", CHANNEL, SPATIAL),
    SqueezeExcitation: ("SE", ("channel_attention",), None),
    BAM: ("BAM", ("gate",), ("gate",)),
}
"""Of each block, its name and the methods that return its channel gate and its spatial gate."""

Blocks = Literal["last", "all"] | Sequence[str]
"""The last block of each size of the picture, every block, or those at these paths."""


@dataclass(frozen=True)
class AttentionMap:
    """One call of one block.

    path: of the block, as in a checkpoint.
    kind: "GAM", "CBAM", "SE" or "BAM".
    before, after: what went into the block and what came out, (B, H, W, C).
    channel: the channel gate, (B, H, W, C) or (B, 1, 1, C). In [0, 1] but for a GAM with
        `channel_gate="identity"`, where it is any number.
    spatial: the spatial gate in (0, 1), (B, H, W, C) or (B, H, W, 1); None for SE. BAM's two
        gates are one, which stands in both places.
    """

    path: str
    kind: str
    before: np.ndarray
    after: np.ndarray
    channel: np.ndarray
    spatial: np.ndarray | None

    @property
    def joint(self) -> bool:
        """Whether one gate stands in both places, and y = x · (1 + gate)."""
        return self.kind == "BAM"


def attention_maps(
    model: nnx.Module, x: Float[Array, "B H W C"], *, blocks: Blocks = "last"
) -> tuple[Any, list[AttentionMap]]:
    """The output of `model` in evaluation, and what its attention blocks did on the way.

    Each GAM, CBAM, SqueezeExcitation and BAM anywhere in an NNX model is found; `model` itself
    stays as it is.

    Args:
        model: a network or a block, optimized for inference or not.
        x: pictures as the network expects them.
        blocks: "last" for the last block of each size of the picture, of which a network has four
            or five; "all"; or the paths of some, such as ["layer3.5.attention"].

    Returns:
        The output, and the blocks in the order in which the network was built. A block that is
        called twice is there twice.

    Raises:
        ValueError: no attention block in `model`, or none at a path of `blocks`.
    """
    copy = _Holder(nnx.clone(model))
    copy.eval()
    kinds = _kinds(copy)
    if not kinds:
        raise ValueError(f"no GAM, CBAM, SE or BAM in {type(model).__name__}")
    names = {path: dotted(copy, path).removeprefix("model").lstrip(".") for path in kinds}
    paths = _chosen(blocks, names)
    for path in paths:
        put(copy, path, _Seen(get(copy, path)))
    graph, state = nnx.split(copy)

    def run(state: Any, x: Array) -> tuple[Any, dict[str, Any]]:
        capture: Any = nnx.capture(
            nnx.merge(graph, state), nnx.Intermediate, method_outputs=nnx.Intermediate
        )
        output, kept = capture(x)
        seen = {path: _calls(kept, path, *kinds[path][1:]) for path in paths}
        if blocks == "last":
            last = {calls[-1][0].shape[1:3]: path for path, calls in seen.items() if calls}
            seen = {path: seen[path] for path in last.values()}
        return output, {names[path]: calls for path, calls in seen.items()}

    output, seen = jax.device_get(jax.jit(run)(state, x))
    maps = [
        AttentionMap(names[path], kinds[path][0], *arrays)
        for path in paths
        for arrays in seen.get(names[path], ())
    ]
    return output, maps


class _Holder(nnx.Module):
    """Holds a model, so that a model that is a block itself can be replaced like any other."""

    def __init__(self, model: nnx.Module):
        self.model = model

    def __call__(self, x: Array) -> Any:
        return self.model(x)


class _Seen(nnx.Module):
    """A block in whose place what goes in is a method's output too."""

    def __init__(self, block: nnx.Module):
        self.block = block

    def before(self, x: Array) -> Array:
        return x

    def __call__(self, x: Array) -> Array:
        return self.block(self.before(x))


def _kinds(model: nnx.Module) -> dict[Path, tuple[str, Method, Method | None]]:
    """Path → entry of `GATES`, of each block, in the order in which the model was built."""
    found: dict[Path, Any] = {}
    for path, module in nnx.iter_modules(model):
        if getattr(module, "remat", False):
            vars(module)["remat"] = False  # what is inside it could not be seen
        for kind, gates in GATES.items():
            if isinstance(module, kind):
                found[path] = gates
    return {path: found[path] for path in sorted(found, key=lambda path: built(model, path))}


def _chosen(blocks: Blocks, names: Mapping[Path, str]) -> list[Path]:
    if isinstance(blocks, str):
        check_choice("blocks", blocks, ("last", "all"))
        return list(names)
    for name in blocks:
        if name not in names.values():
            known = ", ".join(names.values())
            raise ValueError(f"no attention block at {shorten(name)!r}; there are {known}")
    return [path for path, name in names.items() if name in blocks]


def _calls(
    kept: Any, path: Path, channel: Method, spatial: Method | None
) -> list[tuple[Array, Array, Array, Array | None]]:
    """What went in, what came out and both gates, of each call of the block at `path`."""
    node = kept
    for part in path:
        node = node.get(part, {})
    if not node:
        return []  # never called

    def outputs(*method: str) -> Sequence[Array]:
        inside = node
        for part in method:
            inside = inside[part]
        return inside.get_value()

    before, after, gates = outputs("before"), outputs("__call__"), outputs("block", *channel)
    spatials = outputs("block", *spatial) if spatial else [None] * len(before)
    return list(zip(before, after, gates, spatials, strict=True))
