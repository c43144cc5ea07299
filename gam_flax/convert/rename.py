"""Layers under other names: the user's word for it, and names that circulate for one network."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping

Rename = Mapping[str, str] | Callable[[str], str] | None
"""torch's path of a layer → Flax's. A mapping also holds for what lies under a path, the longest
path first, and may name single tensors by their keys."""

ALIASES = (
    (r"linear", "fc"),
    (r"(layer\d+\.\d+)\.shortcut\.(\d+)", r"\1.downsample.\2"),
)
"""What CIFAR's ResNets call it (kuangliu/pytorch-cifar, akamaster/pytorch_resnet_cifar10), as a
pattern of the whole path, and what torchvision does."""


def renamed(path: str, rename: Rename) -> str:
    """The Flax path of a torch layer."""
    if callable(rename):
        return rename(path)
    for prefix, name in sorted((rename or {}).items(), key=lambda pair: -len(pair[0])):
        if path == prefix or path.startswith(f"{prefix}."):
            return name + path[len(prefix) :]
    return path


def aliases(found: Collection[str], expected: Collection[str]) -> dict[str, str]:
    """Found path → expected path, for those paths of a source that a model calls otherwise.

    Only where the model has no layer of the found name and the source none of the expected one.
    """
    names = {}
    for path in found:
        for pattern, usual in ALIASES:
            match = re.fullmatch(pattern, path)
            name = match and match.expand(usual)
            if name and path not in expected and name in expected and name not in found:
                names[path] = name
    return names
