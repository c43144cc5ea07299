"""The ruler: when are two tensors the same?"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

from gam_flax.parity.report import Row

FLOAT64_UNIT = 1e-12
"""In float64 two frameworks may differ by this much of a tensor's scale."""

DTYPES = ("float64", "float32", "bfloat16")


class Judge:
    """Gives each pair of tensors its row.

        |Flax − oracle| ≤ multiple · max|torch − oracle| + unit · scale        everywhere

    The oracle is torch in float64, from the weights rounded to `dtype`. In float64 it is torch
    itself, so that only unit · scale is left. The unit is 1e-12 in float64, the dtype's eps
    otherwise; the scale is the oracle's largest finite magnitude.

    Gradients stand under one more rule, as rounding errors of large terms that cancel do not
    shrink with their sum: in float64 their scale is the largest gradient of the model. And a
    tensor that is nothing but such errors (the gradient of a bias that a BatchNorm takes off
    again) says nothing: "noise" is what the oracle has below unit · largest and Flax below
    noise · largest, `largest` being the scale of the stage's largest tensor, noise the unit in
    float64 and its root in the narrower types, whose errors pile up.

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
        torch: np.ndarray,
        flax: np.ndarray,
        oracle: np.ndarray,
        largest: float,
    ) -> Row:
        """The row of three arrays of one shape; `largest` is the stage's largest scale."""
        own = magnitude(oracle)
        scale = largest if self.exact and "gradient" in stage else own
        torch_error, flax_error = _worst(gap(torch, oracle)), _worst(gap(flax, oracle))
        allowed = self.multiple * torch_error + self.unit * scale
        note = ""
        if np.isnan(gap(flax, torch)).any():
            verdict = "nan"
        elif flax_error == 0:
            verdict = "ok"
        elif own <= self.unit * largest and magnitude(flax) <= self.noise * largest:
            verdict = "noise"
        elif flax_error <= allowed:
            verdict = "ok"
        else:
            verdict, note = "fail", f"allowed {_relative(allowed, scale):.1e}"
        return Row(
            stage=stage,
            path=path,
            shape=flax.shape,
            dtype=self.dtype,
            max_error=_relative(_worst(gap(flax, torch)), scale),
            rms_error=_relative(_rms(gap(flax, torch)), scale),
            torch_error=_relative(torch_error, scale),
            flax_error=_relative(flax_error, scale),
            verdict=verdict,
            note=note,
        )


def equal(stage: str, path: str, torch: np.ndarray, flax: np.ndarray, dtype: str) -> Row:
    """The row of two arrays of one shape that are to be equal, number by number."""
    error, scale = gap(flax, torch), magnitude(torch)
    worst, rms = _relative(_worst(error), scale), _relative(_rms(error), scale)
    verdict = "nan" if np.isnan(error).any() else "fail" if worst else "ok"
    note = "not equal" if verdict == "fail" else ""
    return Row(stage, path, flax.shape, dtype, worst, rms, 0.0, worst, verdict, note)


def without_numbers(
    verdict: str, note: str, stage: str, path: str, shape: tuple[int, ...], dtype: str
) -> Row:
    """The row of what cannot be compared: as far apart as can be."""
    far = math.inf
    return Row(stage, path, shape, dtype, far, far, 0.0, far, verdict, note)


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


def _relative(error: float, scale: float) -> float:
    return error / scale if scale else 0.0 if error == 0 else math.inf
