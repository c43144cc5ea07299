"""The one table between torch's tensors and Flax's: how a leaf is called and how it is laid out.

| torch                              | Flax                                |
|------------------------------------|-------------------------------------|
| weight (O, I) of a linear layer    | kernel (I, O)                       |
| weight (O, I / groups, *k) of conv | kernel (*k, I / groups, O)          |
| weight (I, O, *k) of a transposed  | kernel (*k, O, I) with              |
| convolution                        | transpose_kernel=True; else (*k, I, |
|                                    | O), *k backwards: "turned"          |
| weight (C,) of a norm              | scale (C,)                          |
| weight (N, D) of an embedding      | embedding (N, D)                    |
| bias                               | bias                                |
| running_mean, running_var          | mean, var                           |
| num_batches_tracked, int64         | num_batches_tracked, int32          |

The path before the leaf is the same on both sides. NNX and Linen share the names. numpy alone;
every array that comes back is a view of the one that went in.

With as many outputs as inputs no shape tells a turned kernel from another: who knows the Flax
layer says so, see `flax_paths.turned_kernels`.
"""

from __future__ import annotations

from collections.abc import Iterable

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


def to_flax_layout(name: str, array: np.ndarray, *, turned: bool = False) -> np.ndarray:
    """A torch tensor in the layout of the Flax leaf `name`: (O, I, *k) to (*k, I, O), or (I, O, *k)
    to (*k, I, O) with *k backwards where the kernel is `turned`."""
    if not _is_kernel(name, array.ndim):
        return array
    if turned:
        return _backwards(array, range(2, array.ndim)).transpose(*range(2, array.ndim), 0, 1)
    return array.transpose(*range(2, array.ndim), 1, 0)


def to_torch_layout(name: str, array: np.ndarray, *, turned: bool = False) -> np.ndarray:
    """The Flax leaf `name` in torch's layout, the opposite of `to_flax_layout`."""
    if not _is_kernel(name, array.ndim):
        return array
    if turned:
        return _backwards(array, range(array.ndim - 2)).transpose(-2, -1, *range(array.ndim - 2))
    return array.transpose(-1, -2, *range(array.ndim - 2))


def torch_shape(name: str, shape: tuple[int, ...], *, turned: bool = False) -> tuple[int, ...]:
    """The shape that the Flax leaf `name` has in torch."""
    if not _is_kernel(name, len(shape)):
        return shape
    channels = shape[-2:] if turned else shape[:-3:-1]
    return (*channels, *shape[:-2])


def _backwards(array: np.ndarray, axes: Iterable[int]) -> np.ndarray:
    return np.flip(array, tuple(axes))


def _is_kernel(name: str, ndim: int) -> bool:
    return split(name)[1] == "kernel" and ndim >= 2
