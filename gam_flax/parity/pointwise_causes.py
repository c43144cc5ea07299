"""Numbers made of the numbers at the same place: gates, and activations that have a parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import ml_dtypes
import numpy as np

from gam_flax.parity.experiments import functions
from gam_flax.parity.families import Family, Problem, Settings, Trial, few_places
from gam_flax.parity.glue import near
from gam_flax.parity.shape_causes import ACTIVATIONS, AS_IS

_LATEST = 8  # known tensors that may be a factor, and as many that may be a gate
_GROUPS = 16  # a shuffle has no more
_LINE = 8  # numbers; two always stand on a line
_NO_SHIFT = 1e-8  # what is added, where it is rounding

_GATES = ("sigmoid", "hard sigmoid", "tanh", "relu", "silu", "gelu (exact)", "softplus")
_MORE_GATES: dict[str, Callable[[Any], Any]] = {
    "identity": lambda x: x,
    "hard sigmoid of Keras, 0.2 x + 0.5": lambda x: (0.2 * x + 0.5).clamp(0, 1),
    "1 + tanh": lambda x: 1 + x.tanh(),
    "2 sigmoid": lambda x: 2 * x.sigmoid(),
    "1 − sigmoid": lambda x: 1 - x.sigmoid(),
}
Cuts = dict[str, tuple[np.ndarray, np.ndarray]]
"""In words → x and gate."""

_JOINS: dict[str, Callable[[Any, Any], Any]] = {
    "x · gate": lambda x, gate: x * gate,
    "x + x · gate": lambda x, gate: x + x * gate,
    "x + gate": lambda x, gate: x + gate,
    "x alone": lambda x, gate: x,
    "the gate alone": lambda x, gate: gate,
}
_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def gates(problem: Problem) -> Iterator[Family]:
    """x · f(gate) of two known tensors, or of the halves of one; the gate may be smaller."""
    sought = problem.torch.shape
    latest = [*problem.known.items()][::-1]
    for name, x in [(n, t) for n, t in latest if t.shape == sought][:_LATEST]:
        for other, gate in latest[:_LATEST]:
            reshaped = _spread(gate, sought)
            if reshaped is not None and gate is not x:
                yield _gated(f"{name} as x, {other} as gate", x, reshaped, sought)
    for name, tensor in latest[:_LATEST]:
        for axis in dict.fromkeys((1, tensor.ndim - 1)):
            if tensor.ndim == len(sought) and axis > 0 and tensor.shape[axis] == 2 * sought[axis]:
                yield from _halved(name, tensor, axis, sought)


def _spread(gate: np.ndarray, sought: tuple[int, ...]) -> np.ndarray | None:
    """`gate` with axes of length one where it lacks some; None where it does not fit."""
    if gate.ndim < len(sought) and gate.ndim > 1:
        gate = gate.reshape(*gate.shape, *(1,) * (len(sought) - gate.ndim))
    fits = gate.ndim == len(sought) and all(
        a in (1, b) for a, b in zip(gate.shape, sought, strict=True)
    )
    return gate if fits else None


def _halved(name: str, tensor: np.ndarray, axis: int, sought: tuple[int, ...]) -> Iterator[Family]:
    """The ways to cut one tensor into x and gate."""
    first, second = np.split(tensor, 2, axis)
    even, odd = (np.take(tensor, np.arange(i, tensor.shape[axis], 2), axis) for i in (0, 1))
    cuts = {
        "its second half as gate": (first, second),
        "its first half as gate": (second, first),
        "every second channel as gate": (even, odd),
    }
    yield _gate_family(f"gated halves of {name}", cuts, sought)


def _gated(noun: str, x: np.ndarray, gate: np.ndarray, sought: tuple[int, ...]) -> Family:
    """x, shuffled perhaps, times the gate."""
    channels = x.shape[1] if x.ndim > 1 else 1
    groups = [g for g in range(2, min(channels, _GROUPS + 1)) if channels % g == 0]
    cuts = {"no shuffle": (x, gate)}
    if x.ndim >= 3:
        for g in groups:
            shuffled = x.reshape(len(x), g, channels // g, *x.shape[2:]).swapaxes(1, 2)
            cuts[f"x shuffled in {g} groups"] = shuffled.reshape(x.shape), gate
    return _gate_family(noun, cuts, sought)


def _gate_family(noun: str, cuts: Cuts, sought: tuple[int, ...]) -> Family:
    choices = {
        "join": [*_JOINS],
        "activation": [AS_IS, *ACTIVATIONS],
        "cut": [*cuts],
        "gate": [*_GATES, *_MORE_GATES],
    }
    tried = {"join": [*_JOINS][:2], "activation": [AS_IS, *ACTIVATIONS[:2]]}
    cost = 4.0 * np.prod(sought)
    return Family(noun, choices, _gated_value(cuts, sought), cost, 256.0, tried)


def _gated_value(cuts: Cuts, sought: tuple[int, ...]) -> Callable[[Settings, bool], Trial]:
    """What `Family.make` wants; a few numbers of each factor are computed once."""
    known = functions() | _MORE_GATES | {AS_IS: lambda x: x}
    some = few_places(sought)

    def factor(cut: str, which: int, function: str, where: Any) -> Any:
        import torch

        part = np.broadcast_to(cuts[cut][which], sought)[where]
        return known[function](torch.from_numpy(part.copy()))

    few_of = cache(partial(factor, where=some))

    def make(settings: Settings, few: bool) -> Trial:
        of = few_of if few else partial(factor, where=...)
        x = of(settings["cut"], 0, settings["activation"])
        value = _JOINS[settings["join"]](x, of(settings["cut"], 1, settings["gate"])).numpy()
        return (some if few else ...), value

    return make


# Activations with a parameter: it is found from torch's tensor and from Flax's.


def parameters(problem: Problem) -> Iterator[str]:
    """The parameter of one activation of a known tensor, where the two have different ones; or
    that Flax rounds what it is given."""
    yield from _straight(problem)
    for name, x in [*problem.known.items()][::-1]:
        if x.shape != problem.torch.shape:
            continue
        for said, solve, apply in _PARAMETRIC:
            own, flax = (_solved(solve, apply, x, y) for y in (problem.torch, problem.flax))
            if own is not None and flax is not None:
                yield f"{said} of {name}: torch {_number(own)}, Flax {_number(flax)}"
        for function in (*ACTIVATIONS, "sigmoid", "gelu (tanh approximation)"):
            rounded = _rounded_before(function, x, problem)
            if rounded:
                yield f"Flax rounds {name} to {rounded} before {function}"


def _straight(problem: Problem) -> Iterator[str]:
    """Flax's tensor is a · torch's + b."""
    torch, flax = problem.torch.ravel(), problem.flax.ravel()
    low, high = np.argmin(torch), np.argmax(torch)
    if len(torch) < _LINE:
        return
    if not (np.isfinite(torch).all() and np.isfinite(flax).all() and torch[high] > torch[low]):
        return
    slope = (flax[high] - flax[low]) / (torch[high] - torch[low])
    more = flax[low] - slope * torch[low]
    if not near(slope * torch + more, flax) or np.ptp(flax) == 0:
        return
    moved = f" {'+' if more > 0 else '−'} {abs(more):.6g}" if abs(more) > _NO_SHIFT else ""
    yield f"Flax has {slope:.6g} × torch's{moved}"


def _number(parameter: float) -> str:
    return f"{parameter:.6g}" if np.isfinite(parameter) else "none"


def _solved(solve: Any, apply: Any, x: np.ndarray, y: np.ndarray) -> float | None:
    """The parameter with which `apply` makes `y` of all of `x`."""
    with np.errstate(all="ignore"):
        parameter = solve(x.ravel(), y.ravel())
        if parameter is None or np.isnan(parameter):
            return None
        return parameter if near(apply(x, parameter), y) else None


def _where_negative(x: np.ndarray, y: np.ndarray, of: np.ndarray) -> float | None:
    """y / of at the lowest number."""
    at = np.argmin(x)
    return float(y[at] / of[at]) if x[at] < 0 else None


def _softplus(x: Any, beta: float) -> Any:
    return np.logaddexp(0.0, beta * x) / beta


def _beta(x: np.ndarray, y: np.ndarray) -> float | None:
    """By bisection: softplus falls as beta rises."""
    at = np.argmin(np.abs(x))
    low, high = 1e-2, 1e2
    if not _softplus(x[at], high) < y[at] < _softplus(x[at], low):
        return None
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _softplus(x[at], middle) > y[at] else (low, middle)
    return low


def _cut(x: np.ndarray, y: np.ndarray) -> float | None:
    """Where a soft shrinkage begins."""
    at = np.argmax(np.abs(x))
    return float(abs(x[at]) - abs(y[at]))


def _top(x: np.ndarray, y: np.ndarray) -> float | None:
    """The largest number, or infinity where nothing is cut off."""
    return float(y.max()) if y.max() < x.max() else np.inf


_PARAMETRIC: list[tuple[str, Any, Any]] = [
    (
        "slope of a leaky relu",
        lambda x, y: _where_negative(x, y, x),
        lambda x, p: np.where(x > 0, x, p * x),
    ),
    (
        "alpha of an elu",
        lambda x, y: _where_negative(x, y, np.expm1(x)),
        lambda x, p: np.where(x > 0, x, p * np.expm1(x)),
    ),
    ("beta of a softplus", _beta, _softplus),
    (
        "threshold of a soft shrinkage",
        _cut,
        lambda x, p: np.sign(x) * np.maximum(np.abs(x) - p, 0),
    ),
    ("the number at which a relu ends", _top, lambda x, p: np.clip(x, 0, p)),
    ("the number at which values are cut off", _top, lambda x, p: np.clip(x, -p, p)),
]


def _rounded_before(function: str, x: np.ndarray, problem: Problem) -> str | None:
    """The dtype that Flax rounds to before `function`, which torch takes of `x` itself."""
    import torch

    apply = functions()[function]
    where = few_places(x.shape)
    few = torch.from_numpy(x[where])
    if not near(apply(few).numpy(), problem.torch[where]):
        return None
    if not near(apply(torch.from_numpy(x.copy())).numpy(), problem.torch):
        return None
    for name, dtype in _DTYPES.items():
        with np.errstate(over="ignore"):
            rounded = torch.from_numpy(x.astype(dtype).astype(np.float64))
        if near(apply(rounded).numpy(), problem.flax):
            return name
    return None
