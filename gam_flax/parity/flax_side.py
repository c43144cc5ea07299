"""A Flax model, NNX or Linen, run on a copy of its arrays."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from gam_flax.parity.linen_side import pure_linen
from gam_flax.parity.nnx_side import pure_nnx
from gam_flax.parity.pure import Pure, is_float
from gam_flax.parity.trace import Calls, Trace, cotangent, tensors, wide

# Compiling is most of what a comparison costs, and LLVM's expensive passes are most of that.
_QUICK_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}

_INPUT = ""
"""The input's name among the arrays that are differentiated; no parameter's path is empty."""


def pure(model: Any, *, dtype: str, train: bool) -> Pure:
    """`model` in training or evaluation, its layers told to compute in `dtype`.

    Args:
        model: an `nnx.Module` or a pair (linen module, variables).

    Raises:
        TypeError: it is neither.
    """
    if isinstance(model, nnx.Module):
        return pure_nnx(model, dtype=jnp.dtype(dtype), train=train)
    match model:
        case (linen.Module() as module, Mapping() as variables):
            return pure_linen(module, variables, dtype=jnp.dtype(dtype), train=train)
    raise TypeError(
        "flax_model must be an nnx.Module or a pair (linen module, variables), "
        f"got {type(model).__name__}"
    )


class Program:
    """`model` compiled once: (x, factors) → one forward, and one backward with `gradients`.

    Parameters and input are rounded to `dtype`; statistics as well, but they are kept in float32
    or wider, as a Flax BatchNorm keeps them. What the forward raises becomes the trace's `error`.
    jax's switches are put back.

    x: (B, *space, C).
    factors: what parameters and statistics are multiplied with before they are rounded.
    """

    def __init__(self, model: Pure, *, dtype: str, gradients: bool):
        self._dtype = dtype
        self._model = model
        quick = _QUICK_COMPILE if jax.default_backend() == "cpu" else None
        run = partial(_forward_and_back, model.apply, gradients)
        self._compiled = jax.jit(run, compiler_options=quick)

    def __call__(self, x: np.ndarray, factors: Mapping[str, float]) -> Trace:
        wider = jnp.promote_types(self._dtype, jnp.float32)
        parameters, statistics = (
            {key: _cast(array, self._dtype, factors.get(key, 1.0)) for key, array in kind.items()}
            for kind in (self._model.parameters, self._model.statistics)
        )
        statistics = {key: _cast(array, wider) for key, array in statistics.items()}
        arguments = (parameters, statistics, _cast(x, self._dtype))
        with jax.enable_x64(self._dtype == "float64"), jax.default_matmul_precision("highest"):
            try:
                found = self._compiled(*arguments)
            except Exception as error:
                return _until(error, self._model, arguments)
            return Trace(**jax.tree.map(wide, found))


def _forward_and_back(
    apply: Any, gradients: bool, parameters: dict, statistics: dict, x: Any
) -> dict[str, Any]:
    """The fields of a trace."""

    def forward(smooth: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        calls = Calls()
        given = {**parameters, **smooth}
        output, after = apply(given, statistics, given.pop(_INPUT, x), calls)
        outputs = dict(tensors(output))
        trace = {"outputs": outputs, "layers": calls.outputs, "statistics": after}
        return {part: y for part, y in outputs.items() if is_float(y)}, trace

    if not gradients:
        return forward({})[1]
    arguments = {**parameters, _INPUT: x}
    smooth = {key: array for key, array in arguments.items() if is_float(array)}
    outputs, back, trace = jax.vjp(forward, smooth, has_aux=True)
    weights = {part: jnp.asarray(cotangent(part, y.shape), y.dtype) for part, y in outputs.items()}
    found = dict(back(weights)[0])
    return {**trace, "input_gradient": found.pop(_INPUT, None), "gradients": found}


def _until(error: Exception, model: Pure, arguments: tuple[dict, dict, Any]) -> Trace:
    """What the layers gave before the forward raised `error`."""
    calls = Calls(keep=wide)
    parameters, statistics, x = jax.tree.map(jnp.asarray, arguments)
    try:
        model.apply(parameters, statistics, x, calls)
    except Exception as again:
        error = again  # without the frames of jit
    return Trace(layers=calls.outputs, error=error)


def _cast(array: Any, dtype: Any, factor: float = 1.0) -> np.ndarray:
    """In numpy, of `dtype` where it is floating: jax would compile a program for each shape."""
    array = np.asarray(array)
    return (
        (array.astype(np.float64) * factor).astype(jnp.dtype(dtype)) if is_float(array) else array
    )
