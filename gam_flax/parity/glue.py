"""What stands between layers: which simple expression of known tensors is the one that was seen?

Layers are called by name, but sums, activations, pooling and concatenation often are not. Where two
models hand on different tensors, though all tensors before are the same, small expressions of
these are tried until one is torch's tensor and one is Flax's. What the two are tells the mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import ml_dtypes
import numpy as np

from gam_flax.parity.experiments import functions, same_padding
from gam_flax.parity.judge import gap, magnitude

NEAR = 1e-9
"""Two tensors are one where they differ by no more than this part of their largest number."""

Like = Callable[[np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]]

_ENOUGH = 2**16  # numbers in which one function of a tensor looks like no other
_BUDGET = 3e8  # numbers that the expressions of one search may have, a few seconds
LATEST = 8  # known tensors from which expressions are built
_JOINED = 6  # of them, those that are joined in pairs
_NOTHING = "nothing"
_STRADDLING = 1e-3  # the part of all numbers that lie so near a boundary that they round two ways


@dataclass(frozen=True)
class Expression:
    """function(base), in words: `base` is a known tensor or two that are joined."""

    base: str
    function: str

    def __str__(self) -> str:
        return self.base if self.function == _NOTHING else f"{self.function} of {self.base}"


def explain_glue(
    known: dict[str, np.ndarray],
    torch: np.ndarray,
    flax: np.ndarray,
    like: Like,
) -> tuple[str, ...]:
    """Why `flax` is not `torch`, where both are made from `known`; () where nothing fits.

    Args:
        known: name → tensor, in torch's layout, the latest last; all are the same on both sides.
        torch, flax: what each makes of them, each in its own layout.
        like: (torch's, Flax's) → how a tensor of torch's is laid out as Flax's.
    """
    lay = like(torch, flax)
    by_relation = tuple(relations(torch, flax, lay))
    found = _found(known, torch, flax, like)
    if {"torch", "flax"} <= found.keys() and found["torch"] != found["flax"]:
        return (_difference(found["torch"], found["flax"]), *by_relation)
    if by_relation:
        return by_relation
    return _one_side(known, torch, flax, lay, found)


def _found(
    known: dict[str, np.ndarray],
    torch: np.ndarray,
    flax: np.ndarray,
    like: Like,
) -> dict[str, Expression]:
    """The expressions that are torch's tensor and Flax's: "torch", "flax", or what was found.

    As many examples of the batch as tell enough; the search ends where it has cost enough.
    """
    latest = dict([*known.items()][-LATEST:])
    if len({array.shape[:1] for array in (torch, flax, *latest.values())}) == 1 and torch.ndim:
        some = max(1, _ENOUGH * len(torch) // max(torch.size, flax.size, 1))
        torch, flax = torch[:some], flax[:some]
        latest = {name: array[:some] for name, array in latest.items()}
    lay = like(torch, flax)
    truth, other, spent = lay_safely(lay, torch), flax, 0
    found: dict[str, Expression] = {}
    for expression, value in _expressions(latest, {torch.size, flax.size}):
        spent += value.size
        if spent > _BUDGET:
            break
        laid = lay_safely(lay, value)
        if laid is None:
            continue
        if "torch" not in found and truth is not None and near(laid, truth):
            found["torch"] = expression
        if "flax" not in found and near(laid, other):
            found["flax"] = expression
        both = found.get("torch"), found.get("flax")
        if all(both) and both[0].base == both[1].base:  # type: ignore[union-attr]
            break
    return found


def _difference(torch: Expression, flax: Expression) -> str:
    if torch.base == flax.base:
        if flax.function == _NOTHING:
            return f"missing activation: torch has {torch}, Flax {flax} as it is"
        if torch.function.startswith(f"{flax.function} of "):
            what = torch.function.removeprefix(f"{flax.function} of ")
            return f"missing activation: torch has {torch}, Flax no {what}"
        if torch.function == _NOTHING:
            return f"one activation too many: torch has {torch} as it is, Flax {flax}"
        return f"another function of {torch.base}: torch {torch.function}, Flax {flax.function}"
    if torch.base.startswith("concat") and flax.base.startswith("concat"):
        return f"concat order: torch {torch.base}, Flax {flax.base}"
    return f"torch has {torch}, Flax {flax}"


def _one_side(
    known: dict[str, np.ndarray],
    torch: np.ndarray,
    flax: np.ndarray,
    lay: Callable[[np.ndarray], np.ndarray],
    found: dict[str, Expression],
) -> tuple[str, ...]:
    """A term that one side has and the other has not."""
    truth = lay_safely(lay, torch)
    if truth is not None and truth.shape == flax.shape:
        for name, tensor in reversed(known.items()):
            laid = lay_safely(lay, tensor)
            if laid is None or laid.shape != flax.shape or not magnitude(laid):
                continue
            if near(flax + laid, truth):
                return (f"Flax leaves out the sum with {name} (a missing residual)",)
            if near(truth + laid, flax):
                return (f"Flax adds {name}, torch does not",)
    if "flax" in found:
        return (f"Flax has {found['flax']}, torch something else",)
    if "torch" in found:
        return (f"torch has {found['torch']}, Flax something else",)
    return ()


def relations(
    torch: np.ndarray, flax: np.ndarray, lay: Callable[[np.ndarray], np.ndarray]
) -> Iterator[str]:
    """How Flax's tensor follows from torch's alone."""
    truth = lay_safely(lay, torch)
    if truth is None or truth.shape != flax.shape or near(truth, flax):
        return
    if not magnitude(flax):
        yield "Flax has zeros"
        return
    if not np.isfinite(flax).all() and np.isfinite(truth).all():
        yield "Flax has NaN or infinity"
        return
    big = np.abs(truth) > 1e-6 * magnitude(truth)
    ratios = flax[big] / truth[big]
    if ratios.size and np.ptp(ratios) <= NEAR * abs(ratios[0]) and near(truth * ratios[0], flax):
        if f"{ratios[0]:.6g}" != "1":
            yield f"Flax has {ratios[0]:.6g} × torch's"
        return
    for dtype in (ml_dtypes.bfloat16, np.float16, np.float32):
        with np.errstate(over="ignore"):
            rounded = truth.astype(dtype).astype(truth.dtype)
        if np.mean(rounded == flax) > 1 - _STRADDLING:
            yield f"Flax has torch's numbers rounded to {np.dtype(dtype).name}"
            return
    yield from _moved(torch, truth, flax, lay)
    if near(np.zeros_like(flax), flax - truth - (flax - truth).flat[0]):
        yield f"Flax has {(flax - truth).flat[0]:.6g} more than torch everywhere"


def _moved(
    torch: np.ndarray,
    truth: np.ndarray,
    flax: np.ndarray,
    lay: Callable[[np.ndarray], np.ndarray],
) -> Iterator[str]:
    """The same numbers in other places."""
    if not np.allclose(np.sort(truth, axis=None), np.sort(flax, axis=None), rtol=1e-9, atol=0):
        return
    for axes in permutations(range(torch.ndim)):
        moved = lay_safely(lay, torch.transpose(axes))
        if axes != tuple(range(torch.ndim)) and moved is not None and near(moved, flax):
            yield f"the axes are exchanged: torch's {tuple(range(torch.ndim))} stand as {axes}"
            return
    order = channel_order(truth, flax)
    if order is not None:
        where = f"Flax's channels are torch's {_ranges(order)}"
        yield f"{_kind(order)}: {where}"
    else:
        yield "Flax has the same numbers in other places"


def _kind(order: list[int]) -> str:
    """What brings channels into such an order."""
    count = len(order)
    for inner in range(2, count // 2 + 1):  # (C, P) → (P, C), which flattening and shuffling do
        if count % inner == 0 and order == np.arange(count).reshape(-1, inner).T.ravel().tolist():
            return f"flatten order (C, H, W) to (H, W, C), or a shuffle in {count // inner} groups"
    runs = np.flatnonzero(np.diff(order) != 1).size + 1
    return "concat order" if runs <= count // 2 else "the channels are shuffled"


def channel_order(torch: np.ndarray, flax: np.ndarray, axis: int = -1) -> list[int] | None:
    """For each channel of Flax's the one of torch's that it is; None where they are not."""
    mine, other = (np.moveaxis(a, axis, 0).reshape(a.shape[axis], -1) for a in (torch, flax))
    weights = np.random.default_rng(0).normal(size=mine.shape[1])
    marks = [channels @ weights for channels in (mine, other)]  # one number for each channel
    coarse = 1e-9 * max(map(magnitude, marks)) or 1.0
    ranks = [np.argsort(np.round(mark / coarse), kind="stable") for mark in marks]
    order = np.empty(len(mine), int)
    order[ranks[1]] = ranks[0]
    _continued(order, np.round(marks[0] / coarse))
    limits = NEAR * np.maximum(np.abs(other).max(1, initial=0.0), 1e-300)
    if (np.abs(mine[order] - other).max(1, initial=0.0) > limits).any():
        return None
    return order.tolist()


def _continued(order: np.ndarray, marks: np.ndarray) -> None:
    """Exchanges equal channels, such as dead ones, so that what follows one another stays so."""
    at = np.argsort(order)
    for direction in (1, -1):
        for i in range(len(order))[::direction][1:]:
            wanted, now = order[i - direction] + direction, order[i]
            if 0 <= wanted < len(order) and wanted != now and marks[wanted] == marks[now]:
                j = at[wanted]
                order[i], order[j] = wanted, now
                at[wanted], at[now] = i, j


def _ranges(order: list[int]) -> str:
    """[4, 5, 6, 0, 1] as "4–6, 0–1"."""
    runs: list[list[int]] = []
    for number in order:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}–{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return ", ".join(parts[:8]) + (", …" if len(parts) > 8 else "")


def near(a: np.ndarray, b: np.ndarray, part: float = NEAR) -> bool:
    """Whether two tensors are one but for rounding, to this `part` of their largest number."""
    if a.shape != b.shape:
        return False
    distance = gap(a, b)
    if np.isnan(distance).any():
        return False
    return float(np.max(distance, initial=0.0)) <= part * max(magnitude(a), magnitude(b))


def lay_safely(lay: Callable[[np.ndarray], np.ndarray], array: np.ndarray) -> np.ndarray | None:
    """`lay`, or None where it does not fit the shape."""
    try:
        return lay(array)
    except (ValueError, IndexError):
        return None


def _expressions(
    known: dict[str, np.ndarray], sizes: set[int]
) -> Iterator[tuple[Expression, np.ndarray]]:
    """Small expressions of the latest tensors that have one of these sizes, the simplest first."""
    import torch

    latest = dict(reversed([*known.items()][-LATEST:]))
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in latest.items()}
    pairs = list(_pairs(dict(list(tensors.items())[:_JOINED])))
    bases = [*tensors.items(), *pairs]
    fitting = [(name, tensor) for name, tensor in bases if tensor.numel() in sizes]
    for name, tensor in fitting:
        yield Expression(name, _NOTHING), tensor.numpy()
    for name, tensor in fitting:
        for function, apply in functions().items():
            value = _try(apply, tensor)
            if value is not None:
                yield Expression(name, function), value.numpy()
    for name, tensor in tensors.items():
        yield from _smaller(name, tensor, sizes, functions())
    for name, tensor in pairs:
        yield from _smaller(name, tensor, sizes, {"relu": torch.relu})


def _smaller(
    name: str, tensor: Any, sizes: set[int], activations: Mapping[str, Callable[[Any], Any]]
) -> Iterator[tuple[Expression, np.ndarray]]:
    """Pooled and flattened, as it is and after an activation."""
    if tensor.ndim != 4:
        return
    activations = {_NOTHING: lambda x: x, **activations}
    for reduction, reduce in _reductions().items():
        shape = _try(reduce, tensor.to("meta"))
        if shape is None or shape.numel() not in sizes:
            continue
        for activation, apply in activations.items():
            value = _try(reduce, apply(tensor))
            if value is not None:
                first = "" if activation == _NOTHING else f" of {activation}"
                yield Expression(name, f"{reduction}{first}"), value.numpy()


def _pairs(tensors: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    import torch

    items = list(tensors.items())
    for i, (first, a) in enumerate(items):
        for second, b in items[i + 1 :]:
            if a.shape == b.shape:
                yield f"{second} + {first}", a + b
                yield f"{second} · {first}", a * b
                yield f"{second} − {first}", b - a
                yield f"{first} − {second}", a - b
            elif a.ndim == b.ndim and _try(torch.broadcast_tensors, a, b) is not None:
                yield f"{second} · {first}", a * b
                yield f"{second} + {first}", a + b
            if a.ndim == b.ndim > 1 and a.shape[2:] == b.shape[2:] and len(a) == len(b):
                yield f"concat({second}, {first})", torch.cat([b, a], 1)
                yield f"concat({first}, {second})", torch.cat([a, b], 1)


def _reductions() -> dict[str, Callable[[Any], Any]]:
    """What makes a picture smaller."""
    import torch
    import torch.nn.functional as F

    found: dict[str, Callable[[Any], Any]] = {
        "mean over the pixels": lambda x: x.mean((2, 3)),
        "maximum over the pixels": lambda x: x.amax((2, 3)),
        "sum over the pixels": lambda x: x.sum((2, 3)),
        "flatten in the order (C, H, W)": lambda x: x.flatten(1),
        "flatten in the order (H, W, C)": lambda x: x.permute(0, 2, 3, 1).flatten(1),
        "flatten in the order (W, H, C)": lambda x: x.permute(0, 3, 2, 1).flatten(1),
    }
    for k in (2, 3, 5):
        for stride in dict.fromkeys((2, k, 1)):
            for padding in dict.fromkeys((0, k // 2, None)):
                said = "as XLA's 'SAME'" if padding is None else padding
                name = f"pool {k}, stride {stride}, padding {said}"
                found[f"max {name}"] = _pool(F.max_pool2d, k, stride, padding, -torch.inf)
                found[f"average {name}"] = _pool(F.avg_pool2d, k, stride, padding, 0.0)
                if padding == k // 2:
                    found[f"average {name}, counting real pixels"] = _pool(
                        F.avg_pool2d, k, stride, padding, 0.0, count_include_pad=False
                    )
    pools = {name: pool for name, pool in found.items() if " pool " in name}
    flat = {name: order for name, order in found.items() if name.startswith("flatten")}
    for order, flatten in flat.items():
        for name, pool in pools.items():
            found[f"{order} of {name}"] = _composed(flatten, pool)
    for mode in ("nearest", "bilinear", "bicubic"):
        found[f"upsampling by 2, {mode}"] = _resize(mode)
        if mode != "nearest":
            found[f"upsampling by 2, {mode}, aligned corners"] = _resize(mode, align_corners=True)
    return found


def _pool(
    function: Any, k: int, stride: int, padding: Any, fill: float, **options: Any
) -> Callable[[Any], Any]:
    if padding is None:
        return lambda x: function(same_padding(x, k, stride, 1, fill), k, stride, **options)
    return lambda x: function(x, k, stride, padding, **options)


def _composed(outer: Callable[[Any], Any], inner: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda x: outer(inner(x))


def _resize(mode: str, **options: Any) -> Callable[[Any], Any]:
    import torch.nn.functional as F

    return lambda x: F.interpolate(x, scale_factor=2, mode=mode, **options)


UNFIT = (RuntimeError, ValueError, IndexError, TypeError, NotImplementedError)
"""What torch and numpy raise where an expression does not take such tensors."""


def _try(function: Callable[..., Any], *args: Any) -> Any:
    """What it returns; None where it does not take such tensors."""
    try:
        return function(*args)
    except UNFIT:
        return None
