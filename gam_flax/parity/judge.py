"""The ruler: when are two tensors the same?"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import ml_dtypes
import numpy as np

from gam_flax.parity.report import Row

FLOAT64_UNIT = 1e-12
"""In float64 two frameworks may differ by this much of a tensor's scale."""

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
        return Gauge(*map(max, astuple(self), astuple(other)))


def gauge(torch: np.ndarray, flax: np.ndarray, oracle: np.ndarray) -> Gauge:
    """Measures three arrays of one shape."""
    apart = gap(flax, torch)
    return Gauge(
        torch=_worst(gap(torch, oracle)),
        flax=_worst(gap(flax, oracle)),
        apart=_worst(apart),
        rms=_rms(apart),
        turn=_turn(torch, flax),
        oracle=magnitude(oracle),
        magnitude=magnitude(flax),
        nan=bool(np.isnan(apart).any()),
    )


class Judge:
    """Gives each pair of tensors its verdict.

        max|Flax − oracle| ≤ multiple · max|torch − oracle| + unit · scale

    The oracle is torch in float64, from weights and inputs rounded to `dtype`. In float64 it is
    torch itself, so that only unit · scale is left. The unit is 1e-12 in float64, the dtype's eps
    otherwise; the scale is the oracle's largest magnitude.

    Rounding errors of large terms that cancel do not shrink with their sum. So the scale of a
    gradient is the largest gradient of the model, of an optimizer's moment the largest of its
    name, and of a running mean the deviation of its values; and in a single step one layer is
    allowed what torch is off by after all layers up to it. XLA adds the gradients of a bfloat16
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
        distance = np.abs(a - b)
    return np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, distance)


def magnitude(array: np.ndarray) -> float:
    """The largest finite magnitude, 0 for an empty array."""
    sizes = np.abs(array)
    return float(np.max(sizes, where=np.isfinite(sizes), initial=0.0))


def _worst(distance: np.ndarray) -> float:
    """The largest distance that is a number."""
    return float(np.fmax.reduce(distance, axis=None, initial=0.0))


def _rms(distance: np.ndarray) -> float:
    worst = _worst(distance)
    if worst == 0 or math.isinf(worst):
        return worst
    parts = np.nan_to_num(distance) / worst  # squares that cannot overflow
    return worst * math.sqrt(np.mean(parts**2))


def _turn(a: np.ndarray, b: np.ndarray) -> float:
    """1 − cos, 0 where one of the two is zero or not finite."""
    scales = magnitude(a), magnitude(b)
    if 0 in scales or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return 0.0
    a, b = a.ravel() / scales[0], b.ravel() / scales[1]  # squares that cannot overflow
    cosine = np.vdot(a, b).real / math.sqrt(np.vdot(a, a).real * np.vdot(b, b).real)
    return max(0.0, 1 - float(cosine))


def _relative(error: float, scale: float) -> float:
    return error / scale if scale else 0.0 if error == 0 else math.inf
