"""Resizing, shuffling and pooling between known tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from gam_flax.parity.families import Family, Problem, Settings, Trial

_POOLED = 12  # known tensors that are pooled, the latest
_SUMMED = 5  # of them, those whose poolings are added
_NO_MORE = "nothing more"
AS_IS = "no activation"

ACTIVATIONS = ("relu", "silu", "gelu (exact)", "hard swish", "relu6", "tanh")
"""What often stands before something else; the names are those of `experiments.functions`."""


def resizings(problem: Problem) -> Iterator[Family]:
    """A known picture or sequence made larger or smaller, (B, C, *space)."""
    sought = problem.torch.shape
    for name, tensor in [*problem.known.items()][::-1]:
        shape = tensor.shape
        same = len(shape) == len(sought) and shape[:1] == sought[:1]
        if not same or len(shape) not in (3, 4) or shape[2:] == sought[2:]:
            continue
        ways = _pixels(shape, sought) if shape[1] != sought[1] else _ways(shape, sought)
        if ways:
            noun = f"{name} from {_by(shape)} to {_by(sought)}"
            yield _of_one(noun, tensor, ways, max(problem.torch.size, tensor.size))


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape[2:]))


def _of_one(noun: str, tensor: np.ndarray, ways: dict[str, Any], cost: float) -> Family:
    """way(activation(tensor)); the way is what differs mostly."""
    choices = {"way": [*ways], "activation": [AS_IS, *ACTIVATIONS]}
    return Family(noun, choices, partial(_applied, tensor, ways), cost, cost, {})


def _applied(tensor: np.ndarray, ways: dict[str, Any], settings: Settings, few: bool) -> Trial:
    import torch

    x = activated(torch.from_numpy(tensor.copy()), settings["activation"])
    return ..., ways[settings["way"]](x).numpy()


def activated(x: Any, activation: str) -> Any:
    """An activation by its name."""
    from gam_flax.parity.experiments import functions

    return x if activation == AS_IS else functions()[activation](x)


def _ways(shape: tuple[int, ...], sought: tuple[int, ...]) -> dict[str, Callable[[Any], Any]]:
    """All that brings the axes of space from one length to another."""
    import torch.nn.functional as F

    size, flat = sought[2:], len(shape) == 3
    ways: dict[str, Callable[[Any], Any]] = {}
    parts = [-(-a // b) for a, b in zip(shape[2:], size, strict=True)]
    if max(parts) > 1 and len(set(parts)) == 1:
        ways |= _pools(flat, parts[0])
    linear = "linear" if flat else "bilinear"

    def add(name: str, mode: str, **options: Any) -> None:
        ways[name] = partial(F.interpolate, size=size, mode=mode, **options)

    add("nearest", "nearest")
    add("nearest to the centres", "nearest-exact")
    add(linear, linear)
    add(f"{linear} with aligned corners", linear, align_corners=True)
    if not flat:
        add("bicubic", "bicubic")
        add("bicubic with aligned corners", "bicubic", align_corners=True)
        add("bilinear, smoothed (antialias, jax.image's default)", "bilinear", antialias=True)
        add("bicubic as jax.image has it (a = −0.5)", "bicubic", antialias=True)
    times = [b // a for a, b in zip(shape[2:], size, strict=True)]
    if all(a * n == b for a, b, n in zip(shape[2:], size, times, strict=True)):
        ways["tiled, not repeated"] = lambda x: x.repeat(1, 1, *times)
    return ways


def _pools(flat: bool, stride: int) -> dict[str, Callable[[Any], Any]]:
    """Pools with this stride, and every n-th number."""
    import torch.nn.functional as F

    at = (slice(None), slice(None), *(slice(None, None, stride),) * (1 if flat else 2))
    found: dict[str, Callable[[Any], Any]] = {f"every {stride}. number": lambda x: x[at]}
    for name, pool in (
        ("max pool", F.max_pool1d if flat else F.max_pool2d),
        ("average pool", F.avg_pool1d if flat else F.avg_pool2d),
    ):
        for k, padding in ((stride, 0), (stride + 1, 0), (stride + 1, (stride + 1) // 2)):
            for ceil in (False, True):
                said = f"{name} {k}, padding {padding}{', ceil_mode' if ceil else ''}"
                found[said] = partial(
                    pool, kernel_size=k, stride=stride, padding=padding, ceil_mode=ceil
                )
    return found


def _pixels(shape: tuple[int, ...], sought: tuple[int, ...]) -> dict[str, Callable[[Any], Any]]:
    """Channels that become pixels, or pixels that become channels."""
    if len(shape) != 4:
        return {}
    letters = "crs", "rsc", "csr", "src"
    grown = [b / a for a, b in zip(shape[2:], sought[2:], strict=True)]
    r = round(max(grown[0], 1 / grown[0]))
    if sought == (shape[0], shape[1] // r**2, shape[2] * r, shape[3] * r):
        return {f"pixel shuffle, channels as {_said(o)}": partial(_shuffle, o, r) for o in letters}
    if shape == (sought[0], sought[1] // r**2, sought[2] * r, sought[3] * r):
        return {
            f"pixel unshuffle, channels as {_said(o)}": partial(_unshuffle, o, r) for o in letters
        }
    return {}


def _said(order: str) -> str:
    words = {"c": "channel", "r": "row", "s": "column"}
    return f"({', '.join(words[letter] for letter in order)})"


def _shuffle(order: str, r: int, x: Any) -> Any:
    batch, channels, height, width = x.shape
    lengths = {"c": channels // r**2, "r": r, "s": r}
    parts = x.reshape(batch, *(lengths[letter] for letter in order), height, width)
    c, row, column = (1 + order.index(letter) for letter in "crs")
    y = parts.permute(0, c, 4, row, 5, column)
    return y.reshape(batch, lengths["c"], height * r, width * r)


def _unshuffle(order: str, r: int, x: Any) -> Any:
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, channels, height // r, r, width // r, r)
    axis = {"c": 1, "r": 3, "s": 5}
    y = parts.permute(0, *(axis[letter] for letter in order), 2, 4)
    return y.reshape(batch, channels * r**2, height // r, width // r)


def turned(problem: Problem) -> Iterator[Family]:
    """A known tensor with its last two axes exchanged, or reshaped as if they were."""
    sought = problem.torch.shape
    for name, tensor in [*problem.known.items()][::-1]:
        if tensor.ndim >= 3 and (*tensor.shape[:-2], *tensor.shape[:-3:-1]) == sought:
            ways = {
                "transposed": lambda x: x.swapaxes(-1, -2),
                "reshaped": lambda x: x.reshape(sought),
                "as it is": lambda x: x,
            }
            yield _of_one(name, tensor, ways, tensor.size)


_POOLINGS: dict[str, Callable[[Any, int], Any]] = {
    "the mean of {}": lambda x, axis: x.mean(axis),
    "the first of {}": lambda x, axis: x.select(axis, 0),
    "the maximum of {}": lambda x, axis: x.amax(axis),
    "the last of {}": lambda x, axis: x.select(axis, -1),
    "the mean of {} without the first": lambda x, axis: _later(x, axis).mean(axis),
    "the sum of {}": lambda x, axis: x.sum(axis),
    "the middle of {}": lambda x, axis: x.select(axis, x.shape[axis] // 2),
}


def _later(x: Any, axis: int) -> Any:
    return x.narrow(axis, 1, x.shape[axis] - 1)


Pooled = tuple[np.ndarray, int, str]
"""A tensor, the axis of it that is pooled, and how."""


def poolings(problem: Problem) -> Iterator[Family]:
    """One pooling of tokens or pixels, (B, N, C) → (B, C), (B, C, *space) → (B, C), after an
    activation; or the sum of two."""
    if problem.torch.ndim != 2:
        return
    latest = [*problem.known.items()][::-1][:_POOLED]
    pooled = dict(_pooled(latest, problem.torch.shape))
    few = dict(_pooled(latest[:_SUMMED], problem.torch.shape))
    values: dict[tuple[str, str], np.ndarray] = {}  # each is computed once
    cost = problem.torch.size * 2.0
    for one, activations, two in (
        (pooled, [AS_IS, *ACTIVATIONS], [_NO_MORE]),
        (few, [AS_IS], [*few]),
    ):
        if one:
            choices = {"activation": activations, "first": [*one], "second": two}
            made = partial(_pooled_sum, one, values)
            yield Family("pooling", choices, made, cost, cost, {}, ("first",))


def _pooled(
    known: list[tuple[str, np.ndarray]], sought: tuple[int, ...]
) -> Iterator[tuple[str, Pooled]]:
    """The poolings that give such a shape, by what they are called."""
    for name, tensor in known:
        for axis in _pooled_axes(tensor.shape, sought):
            for way in _POOLINGS:
                yield way.format(name), (tensor, axis, way)


def _pooled_axes(shape: tuple[int, ...], sought: tuple[int, ...]) -> Iterator[int]:
    """The axes that may be pooled; of a picture all pixels are one axis."""
    if len(shape) < 3 or shape[0] != sought[0]:
        return
    flat = (*shape[:2], int(np.prod(shape[2:])))
    yield from (axis for axis in (1, 2) if flat[3 - axis] == sought[1] and flat[axis] > 1)


def _pooled_sum(
    pooled: dict[str, Pooled],
    values: dict[tuple[str, str], np.ndarray],
    settings: Settings,
    few: bool,
) -> Trial:
    import torch

    total: Any = 0.0
    for term in (settings["first"], settings["second"]):
        if term == _NO_MORE:
            continue
        key = term, settings["activation"]
        if key not in values:
            tensor, axis, way = pooled[term]
            x = activated(torch.from_numpy(tensor.copy()), settings["activation"])
            values[key] = _POOLINGS[way](x.flatten(2), axis).numpy()
        total = total + values[key]
    return ..., np.asarray(total)
