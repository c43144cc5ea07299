"""A Flax model, NNX or Linen, as a pure function, run on a copy of its arrays."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from gam_flax.convert.flax_paths import linen_leaves, nnx_modules, nnx_variables
from gam_flax.parity.trace import Calls, Trace, cotangent, tensors, wide

# Compiling is most of what a comparison costs, and LLVM's expensive passes are most of that.
_QUICK_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


@dataclass(frozen=True)
class Pure:
    """A model without its arrays.

    parameters, statistics: its arrays by dotted path, as they are.
    apply: (parameters, statistics, x, calls) → (output, statistics after); what each layer
        returns goes into `calls`.
    """

    parameters: dict[str, Any]
    statistics: dict[str, Any]
    apply: Callable[[dict[str, Any], dict[str, Any], Any, Calls], tuple[Any, dict[str, Any]]]


def pure(model: Any, *, dtype: str, train: bool) -> Pure:
    """`model` in training or evaluation, its layers told to compute in `dtype`.

    Args:
        model: an `nnx.Module` or a pair (linen module, variables).

    Raises:
        TypeError: it is neither.
    """
    if isinstance(model, nnx.Module):
        return _pure_nnx(model, jnp.dtype(dtype), train)
    match model:
        case (linen.Module() as module, Mapping() as variables):
            return _pure_linen(module, variables, jnp.dtype(dtype), train)
    raise TypeError(
        "flax_model must be an nnx.Module or a pair (linen module, variables), "
        f"got {type(model).__name__}"
    )


def run(model: Pure, x: np.ndarray, *, dtype: str, gradients: bool) -> Trace:
    """One forward, and one backward where `gradients` are wanted.

    Parameters and input are rounded to `dtype`; running statistics as well, but they are kept
    in float32 or wider, as a Flax BatchNorm keeps them. What the forward raises becomes the
    trace's `error`. jax's own switches are put back.
    """
    wider = jnp.promote_types(dtype, jnp.float32)
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        parameters = {key: _cast(array, dtype) for key, array in model.parameters.items()}
        statistics = {
            key: _cast(_cast(array, dtype), wider) for key, array in model.statistics.items()
        }
        pixels = _cast(x, dtype)

        def program(*arguments: Any) -> dict[str, Any]:
            return _forward_and_back(model, gradients, *arguments)

        quick = _QUICK_COMPILE if jax.default_backend() == "cpu" else None
        try:
            found = jax.jit(program, compiler_options=quick)(parameters, statistics, pixels)
        except Exception as error:
            return _until(error, model, parameters, statistics, pixels)
        return Trace(**jax.tree.map(wide, found))


def _forward_and_back(
    model: Pure, gradients: bool, parameters: dict, statistics: dict, x: Any
) -> dict[str, Any]:
    """The fields of a trace."""

    def forward(differentiated: dict[str, Any]) -> tuple[dict[str, Any], tuple]:
        calls = Calls()
        given = {**parameters, **differentiated}
        pixels = given.pop(_INPUT, x)
        output, after = model.apply(given, statistics, pixels, calls)
        outputs = dict(tensors(output))
        smooth = {part: y for part, y in outputs.items() if _is_float(y)}
        return smooth, (outputs, calls.outputs, after)

    if not gradients:
        _, (outputs, layers, after) = forward({})
        return {"outputs": outputs, "layers": layers, "statistics": after}
    arguments = {**parameters, _INPUT: x}
    arguments = {key: array for key, array in arguments.items() if _is_float(array)}
    smooth, back, (outputs, layers, after) = jax.vjp(forward, arguments, has_aux=True)
    weights = {part: jnp.asarray(cotangent(part, y.shape), y.dtype) for part, y in smooth.items()}
    (found,) = back(weights)
    input_gradient = found.pop(_INPUT, None)
    return {
        "outputs": outputs,
        "layers": layers,
        "statistics": after,
        "gradients": found,
        "input_gradient": input_gradient,
    }


_INPUT = ""
"""The input's name among the arrays that are differentiated; no parameter's path is empty."""


def _until(error: Exception, model: Pure, *arguments: Any) -> Trace:
    """What the layers gave before the forward raised `error`."""
    calls = Calls(keep=wide)
    try:
        model.apply(*arguments, calls)
    except Exception as same:
        error = same
    return Trace(layers=calls.outputs, error=error)


def _cast(array: Any, dtype: Any) -> Any:
    """As a jax array, of `dtype` where it holds floating numbers."""
    return jnp.asarray(array, dtype) if _is_float(array) else jnp.asarray(array)


def _is_float(array: Any) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


# NNX

_noting: ContextVar[Callable[[Any, Any], None]] = ContextVar("noting")


def _pure_nnx(model: nnx.Module, dtype: Any, train: bool) -> Pure:
    copy = nnx.merge(*nnx.split(model), copy=True)
    copy.train() if train else copy.eval()
    copy = nnx.view(
        copy, raise_if_not_found=False, deterministic=not train, use_running_average=not train
    )
    for module in nnx_modules(copy).values():
        if _is_float_type(vars(module).get("dtype")):
            module.dtype = dtype
    variables = nnx_variables(copy)
    parameters = {k: v.get_value() for k, v in variables.items() if isinstance(v, nnx.Param)}
    statistics = {k: v.get_value() for k, v in variables.items() if k not in parameters}
    graph, state = nnx.split(copy)

    def apply(parameters: dict, statistics: dict, x: Any, calls: Calls) -> tuple[Any, dict]:
        twin = nnx.merge(graph, state, copy=True)
        variables = nnx_variables(twin)
        for key, array in {**parameters, **statistics}.items():
            variables[key].set_value(array)
        output = _noted(twin, calls)(x, **_modes(twin, train))
        return output, {key: variables[key].get_value() for key in statistics}

    return Pure(parameters, statistics, apply)


def _noted(model: nnx.Module, calls: Calls) -> Callable[..., Any]:
    """`model` as a function that puts what its layers return into `calls`.

    `nnx.capture` leaves out layers that inherit their `__call__`, notes a layer twice that calls
    its parent's, and changes classes for everyone. Here only the objects of this one model get
    other classes. Layers inside a transformation of their own (scan, remat) are left out: their
    values do not exist outside of it.
    """
    paths = {id(m): path for path, m in nnx_modules(model).items()}
    level = jax.extend.core.get_opaque_trace_state(convention="flax")

    def note(module: Any, output: Any) -> None:
        path = paths.get(id(module))
        here = jax.extend.core.get_opaque_trace_state(convention="flax")
        if path and here == level:
            calls.add(path, output)

    def call(*args: Any, **kwargs: Any) -> Any:
        token = _noting.set(note)
        try:
            return model(*args, **kwargs)  # type: ignore[operator]
        finally:
            _noting.reset(token)

    for module in nnx_modules(model).values():
        if callable(module):
            module.__class__ = _noting_class(type(module))
    return call


@cache  # NNX registers every class with jax for good: one for each of the user's, not one a run
def _noting_class(cls: type) -> type:
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = cls.__call__(self, *args, **kwargs)
        _noting.get()(self, output)
        return output

    return type(cls.__name__, (cls,), {"__call__": __call__, "__module__": cls.__module__})


# Linen


def _pure_linen(module: linen.Module, variables: Mapping, dtype: Any, train: bool) -> Pure:
    leaves = linen_leaves(linen.meta.unbox(variables))
    names = {path: ".".join(path[1:]) for path in leaves}
    parameters = {names[p]: leaf for p, leaf in leaves.items() if p[0] == "params"}
    statistics = {names[p]: leaf for p, leaf in leaves.items() if p[0] != "params"}
    mutable = sorted({path[0] for path in leaves} - {"params"}) if train else False
    modes = _modes(module, train)
    fields = {k: v for k, v in _MODES(train).items() if k in module.__dataclass_fields__}

    def apply(parameters: dict, statistics: dict, x: Any, calls: Calls) -> tuple[Any, dict]:
        arrays = {**statistics, **parameters}
        filled = _nest({path: arrays[name] for path, name in names.items()})
        with linen.intercept_methods(_noting_interceptor(calls, dtype)):
            found = module.clone(**fields).apply(filled, x, mutable=mutable, **modes)
        if mutable is False:
            return found, statistics
        output, after = found
        return output, {names[path]: leaf for path, leaf in linen_leaves(after).items()}

    return Pure(parameters, statistics, apply)
