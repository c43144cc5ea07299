"""The one table between torch's tensors and Flax's: how a leaf is called and how it is laid out.

| torch                              | Flax                                |
|------------------------------------|-------------------------------------|
| weight (O, I) of a linear layer    | kernel (I, O)                       |
| weight (O, I / groups, *k) of conv | kernel (*k, I / groups, O)          |
| weight (C,) of a norm              | scale (C,)                          |
| weight (N, D) of an embedding      | embedding (N, D)                    |
| bias                               | bias                                |
| running_mean, running_var          | mean, var                           |
| num_batches_tracked, int64         | num_batches_tracked, int32          |

The path before the leaf is the same on both sides. NNX and Linen share the names. numpy alone;
every array that comes back is a view of the one that went in.
"""

from __future__ import annotations

import numpy as np

TO_FLAX = {
    "bias": "bias",
    "running_mean": "mean",
    "running_var": "var",
    "num_batches_tracked": "num_batches_tracked",
}
TO_TORCH = {
    **{flax: torch for torch, flax in TO_FLAX.items()},
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
}


def split(key: str) -> tuple[str, str]:
    """A dotted key as the path of its layer and the name of its leaf."""
    path, _, leaf = key.rpartition(".")
    return path, leaf


def join(path: str, leaf: str) -> str:
    """The opposite of `split`."""
    return f"{path}.{leaf}" if path else leaf


def flax_name(key: str, ndim: int) -> str:
    """The Flax path of a torch key. A weight of one axis is a norm's, any other a kernel."""
    path, leaf = split(key)
    name = ("scale" if ndim == 1 else "kernel") if leaf == "weight" else TO_FLAX.get(leaf, leaf)
    return join(path, name)


def torch_name(key: str) -> str:
    """The torch key of a Flax path."""
    path, leaf = split(key)
    return join(path, TO_TORCH.get(leaf, leaf))


def to_flax_layout(name: str, array: np.ndarray) -> np.ndarray:
    """A torch tensor in the layout of the Flax leaf `name`: (O, I, *k) to (*k, I, O)."""
    if _is_kernel(name, array.ndim):
        return array.transpose(*range(2, array.ndim), 1, 0)
    return array


def to_torch_layout(name: str, array: np.ndarray) -> np.ndarray:
    """The Flax leaf `name` in torch's layout: (*k, I, O) to (O, I, *k)."""
    if _is_kernel(name, array.ndim):
        return array.transpose(-1, -2, *range(array.ndim - 2))
    return array


def torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that the Flax leaf `name` has in torch."""
    if _is_kernel(name, len(shape)):
        return (shape[-1], shape[-2], *shape[:-2])
    return shape


def _is_kernel(name: str, ndim: int) -> bool:
    return split(name)[1] == "kernel" and ndim >= 2
