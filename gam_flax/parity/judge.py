"""The ruler: when are two tensors the same?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np

from gam_flax.parity.report import Row
from gam_flax.parity.trace import wide

FLOAT64_UNIT = 1e-12
"""In float64 two frameworks may differ by this much of a tensor's scale."""

_PIECE = 2**17  # numbers, 1 MiB in float64

DTYPES = ("float64", "float32", "bfloat16")


@dataclass(frozen=True)
class Gauge:
    """How far torch, Flax and the oracle are apart in one tensor; `a | b` is the worst of two.

    torch, flax: the largest error against the oracle.
    apart, rms: the largest and the root mean square difference between torch and Flax.
    turn: 1 − the cosine of the angle between torch and Flax.
    oracle, magnitude: the largest finite magnitude in the oracle and in Flax.
    nan: whether one of torch and Flax has NaN where the other has a number.
    """

    torch: float
    flax: float
    apart: float
    rms: float
    turn: float
    oracle: float
    magnitude: float
    nan: bool

    def __or__(self, other: Gauge) -> Gauge:
        return Gauge(*map(max, vars(self).values(), vars(other).values()))


def gauge(torch: np.ndarray, flax: np.ndarray, oracle: np.ndarray) -> Gauge:
    """Measures three arrays of one shape, in any dtype; `oracle` may be `torch` itself.

    Piece by piece: a piece fits a cache, and copies of the whole would fill the memory.
    """
    size = max(flax.size, 1)
    scales = magnitude(torch), magnitude(flax)
    found = Gauge(0.0, 0.0, 0.0, 0.0, 0.0, magnitude(oracle), scales[1], False)
    products = np.zeros(3)
    for own, partner, truth in _pieces(torch, flax, oracle):
        own, partner = wide(own), wide(partner)
        apart = gap(partner, own)
        same = torch is oracle
        truth = own if same else wide(truth)
        found |= Gauge(
            torch=0.0 if same else _worst(gap(own, truth)),
            flax=_worst(apart if same else gap(partner, truth)),
            apart=_worst(apart),
            rms=math.hypot(found.rms, _rms(apart) * math.sqrt(apart.size / size)),
            turn=0.0,
            oracle=0.0,
            magnitude=0.0,
            nan=bool(np.isnan(apart).any()),
        )
        products += _products(own, partner, scales)
    return replace(found, turn=_turn(*products))


def _pieces(*arrays: np.ndarray) -> Iterator[tuple[np.ndarray, ...]]:
    """Arrays of one shape cut alike until each piece is small; views."""
    shape = arrays[0].shape
    if arrays[0].size <= _PIECE:
        yield arrays
        return
    axis = int(np.argmax(shape))
    half = shape[axis] // 2
    for part in (slice(None, half), slice(half, None)):
        yield from _pieces(*(array[(slice(None),) * axis + (part,)] for array in arrays))


class Judge:
    """Gives each pair of tensors its verdict.

        max|Flax − oracle| ≤ multiple · max|torch − oracle| + unit · scale

    The oracle is torch in float64, from weights and inputs rounded to `dtype`. In float64 it is
    torch itself, so that only unit · scale is left. The unit is 1e-12 in float64, the dtype's eps
    otherwise; the scale is the oracle's largest magnitude.

    Rounding errors of large terms that cancel do not shrink with their sum. So the scale of a
    gradient is the largest gradient of the model, of an optimizer's moment the largest of its
    name, and of a running mean the deviation of its values; and in a single step one layer is
    allowed what torch is off by after all layers up to it, in a gradient what torch is off by in
    those of the layers behind it. XLA adds the gradients of a bfloat16
    bias in bfloat16, torch in float32: there the unit of a gradient is √eps, 9 % of the largest.

    A tensor that is nothing but such errors (the gradient of a bias that a BatchNorm takes off
    again) says nothing: "noise" is what the oracle has below unit · largest and Flax below
    noise · largest, `largest` being the scale of the largest tensor of its kind, noise the unit
    in float64 and its root in the narrower types, whose errors pile up.

    Args:
        dtype: one of `DTYPES`.
        multiple: of torch's own error that Flax is allowed.
    """

    def __init__(self, dtype: str, multiple: float):
        self.dtype = dtype
        self.multiple = multiple
        self.exact = dtype == "float64"
        self.unit = FLOAT64_UNIT if self.exact else float(ml_dtypes.finfo(dtype).eps)
        self.noise = self.unit if self.exact else math.sqrt(self.unit)

    def row(
        self,
        stage: str,
        path: str,
        shape: tuple[int, ...],
        found: Gauge,
        scale: float,
        largest: float,
    ) -> Row:
        """The row of a tensor; `largest` is of all tensors of its kind."""
        coarse = self.dtype == "bfloat16" and "gradient" in stage
        allowed = self.multiple * found.torch + (self.noise if coarse else self.unit) * scale
        quiet = found.oracle <= self.unit * largest and found.magnitude <= self.noise * largest
        verdict, note = "ok", ""
        if found.nan:
            verdict = "nan"
        elif quiet and found.flax:
            verdict, scale = "noise", largest
        elif found.flax > allowed:
            verdict, note = "fail", f"allowed {_relative(allowed, scale):.1e}"
        return Row(
            stage=stage,
            path=path,
            shape=shape,
            dtype=self.dtype,
            max_error=_relative(found.apart, scale),
            rms_error=_relative(found.rms, scale),
            cosine=1 - found.turn,
            torch_error=_relative(found.torch, scale),
            flax_error=_relative(found.flax, scale),
            verdict=verdict,
            note=note,
        )


def equal(stage: str, path: str, torch: np.ndarray, flax: np.ndarray, dtype: str) -> Row:
    """The row of two arrays of one shape that are to be equal, number by number."""
    found = gauge(torch, flax, torch)
    worst, rms = _relative(found.flax, found.oracle), _relative(found.rms, found.oracle)
    verdict = "nan" if found.nan else "fail" if worst else "ok"
    note = "not equal" if verdict == "fail" else ""
    return Row(
        stage=stage,
        path=path,
        shape=flax.shape,
        dtype=dtype,
        max_error=worst,
        rms_error=rms,
        cosine=1 - found.turn,
        torch_error=0.0,
        flax_error=worst,
        verdict=verdict,
        note=note,
    )


def without_numbers(
    verdict: str, note: str, stage: str, path: str, shape: tuple[int, ...], dtype: str
) -> Row:
    """The row of what cannot be compared: as far apart as can be."""
    far = math.inf
    return Row(stage, path, shape, dtype, far, far, 0.0, 0.0, far, verdict, note)


def gap(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a − b|; 0 where both are the same infinity or both NaN, NaN where one of them is."""
    with np.errstate(invalid="ignore"):
        distance = np.asarray(np.abs(a - b))
    if np.isfinite(np.max(distance, initial=0.0)):
        return distance
    return np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, distance)


def magnitude(array: np.ndarray) -> float:
    """The largest finite magnitude, 0 for an empty array."""
    largest = 0.0
    for (piece,) in _pieces(array):
        sizes = np.abs(wide(piece))
        top = float(np.max(sizes, initial=0.0))
        if not math.isfinite(top):
            top = float(np.max(sizes, where=np.isfinite(sizes), initial=0.0))
        largest = max(largest, top)
    return largest


def _worst(distance: np.ndarray) -> float:
    """The largest distance that is a number."""
    return float(np.fmax.reduce(distance, axis=None, initial=0.0))


def _rms(distance: np.ndarray) -> float:
    worst = _worst(distance)
    if worst == 0 or math.isinf(worst):
        return worst
    parts = np.nan_to_num(distance).ravel() / worst  # squares that cannot overflow
    return worst * math.sqrt(np.vdot(parts, parts).real / parts.size)


def _products(a: np.ndarray, b: np.ndarray, scales: tuple[float, float]) -> np.ndarray:
    """a·b, a·a and b·b of arrays of these scales, in squares that cannot overflow."""
    if 0 in scales:
        return np.zeros(3)
    a, b = a.ravel() / scales[0], b.ravel() / scales[1]
    return np.array([np.vdot(x, y).real for x, y in ((a, b), (a, a), (b, b))])


def _turn(both: float, a: float, b: float) -> float:
    """1 − cos, 0 where one of the two is zero or not finite."""
    if not 0 < a * b < math.inf:
        return 0.0
    return max(0.0, 1 - float(both / math.sqrt(a * b)))


def _relative(error: float, scale: float) -> float:
    return error / scale if scale else 0.0 if error == 0 else math.inf
