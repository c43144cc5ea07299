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


def run(model: Pure, x: np.ndarray, *, dtype: str, gradients: bool) -> Trace:
    """One forward, and one backward where `gradients` are wanted.

    Parameters and input are rounded to `dtype`; statistics as well, but they are kept in float32
    or wider, as a Flax BatchNorm keeps them. What the forward raises becomes the trace's `error`.
    jax's switches are put back.

    Args:
        x: (B, *space, C).
    """
    wider = jnp.promote_types(dtype, jnp.float32)
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        parameters = {key: _cast(array, dtype) for key, array in model.parameters.items()}
        statistics = {
            key: _cast(_cast(array, dtype), wider) for key, array in model.statistics.items()
        }
        arguments = (parameters, statistics, _cast(x, dtype))
        quick = _QUICK_COMPILE if jax.default_backend() == "cpu" else None
        program = jax.jit(partial(_program, model.apply, gradients), compiler_options=quick)
        try:
            found = program(*arguments)
        except Exception as error:
            return _until(error, model, *arguments)
        return Trace(**jax.tree.map(wide, found))


def _program(
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


def _until(error: Exception, model: Pure, *arguments: Any) -> Trace:
    """What the layers gave before the forward raised `error`."""
    calls = Calls(keep=wide)
    try:
        model.apply(*jax.tree.map(jnp.asarray, arguments), calls)
    except Exception as again:
        error = again  # without the frames of jit
    return Trace(layers=calls.outputs, error=error)


def _cast(array: Any, dtype: Any) -> np.ndarray:
    """In numpy, of `dtype` where it is floating: jax would compile a program for each shape."""
    array = np.asarray(array)
    return array.astype(jnp.dtype(dtype)) if is_float(array) else array
