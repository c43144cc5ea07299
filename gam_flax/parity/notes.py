"""What a reader of a report should know though no number tells it, a sentence each."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from gam_flax.convert import leaves
from gam_flax.convert.errors import shorten
from gam_flax.parity.report import Unmatched

_LISTED = 6  # names in a note


def unseen_layers(unmatched: Iterable[Unmatched], paired: Iterable[str]) -> Iterator[str]:
    """torch's layers whose weights Flax has, but whose calls were not seen there.

    Args:
        paired: the torch keys of the parameters and buffers that have a partner.
    """
    own = dict.fromkeys(leaves.split(key)[0] for key in paired)
    lonely = {item.path for item in unmatched if (item.side, item.kind) == ("torch", "layer")}
    unseen = [path for path in own if path in lonely]
    if unseen:
        yield (
            f"Flax: {listed(unseen)}: not seen to be called (inside a jit, scan or remat of the "
            "model's own, or its weights are used without it), so judged by what follows alone"
        )


def silent_gradients(silent: Sequence[str], count: int) -> Iterator[str]:
    """Args: the keys of those of `count` parameters whose gradients are zero on both sides."""
    if silent:
        yield (
            f"the gradients of {len(silent)} of {count} parameters are zero on both sides "
            f"({listed(silent)}): what stands between them and the loss lets nothing through, as a "
            "layer of zeros does, and faults of the backward pass there do not show: use steps="
        )


def narrow_layers(own: Mapping[str, Any], dtype: str) -> Iterator[str]:
    """Args: the dtypes in which Flax's layers compute as they are, by path; and that of the
    comparison, which all of them are set to."""
    of: dict[str, list[str]] = {}
    for path, kept in own.items():
        if jnp.dtype(kept).itemsize < 4 and jnp.dtype(kept) != jnp.dtype(dtype):
            of.setdefault(jnp.dtype(kept).name, []).append(path)
    for kept, paths in of.items():
        yield f"Flax: {listed(paths)}: computes in {kept} as it stands (dtype=), in {dtype} here"


def listed(paths: Collection[str]) -> str:
    """The first of them, and how many more there are."""
    shown = ", ".join(shorten(path) or "the model" for path in list(paths)[:_LISTED])
    return f"{shown} and {len(paths) - _LISTED} more" if len(paths) > _LISTED else shown
