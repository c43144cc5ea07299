"""An NNX model as a pure function."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import cache, partial
from typing import Any

from flax import nnx

from gam_flax.convert.flax_paths import nnx_modules, nnx_variables
from gam_flax.parity.masks import Masks, dropped
from gam_flax.parity.pure import Pure, call_modes, is_float_type, trace_level
from gam_flax.parity.trace import Calls


def pure_nnx(model: nnx.Module, *, dtype: Any, train: bool, masks: Masks) -> Pure:
    """A copy of `model`, its layers told to compute in `dtype`, those with masks to use these."""
    copy = nnx.merge(*nnx.split(model), copy=True)
    copy.train() if train else copy.eval()
    copy = nnx.view(
        copy, raise_if_not_found=False, deterministic=not train, use_running_average=not train
    )
    own_dtypes: dict[str, Any] = {}
    for path, module in nnx_modules(copy).items():
        if is_float_type(vars(module).get("dtype")):
            own_dtypes[path], module.dtype = module.dtype, dtype
    variables = nnx_variables(copy)
    parameters = {k: v.get_value() for k, v in variables.items() if isinstance(v, nnx.Param)}
    statistics = {k: v.get_value() for k, v in variables.items() if k not in parameters}
    graph, state = nnx.split(copy)

    def apply(parameters: dict, statistics: dict, x: Any, calls: Calls) -> tuple[Any, dict]:
        twin = nnx.merge(graph, state, copy=True)
        variables = nnx_variables(twin)
        for key, array in {**parameters, **statistics}.items():
            variables[key].set_value(array)
        output = _watched(twin, calls, masks)(x, **call_modes(twin, train))
        return output, {key: variables[key].get_value() for key in statistics}

    return Pure(parameters, statistics, apply, own_dtypes)


_around: ContextVar[Callable[..., Any]] = ContextVar("_around")


def _watched(model: Any, calls: Calls, masks: Masks) -> Callable[..., Any]:
    """`model` as a function that takes the calls of its layers through `calls`.

    `nnx.capture` leaves out layers that inherit their `__call__`, notes a layer twice that calls
    its parent's, and changes classes under everyone's feet. Here only the objects of this one
    model get other classes. Layers inside a transformation of their own (jit, scan, remat) are
    left out.
    """
    paths = {id(module): path for path, module in nnx_modules(model).items()}
    level = trace_level()

    def around(module: Any, call: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        path = paths.get(id(module), "")
        if path in masks:
            call, kwargs = partial(dropped, masks[path]), {}
        if not path or trace_level() != level:
            return call(module, *args, **kwargs)
        return calls.through(path, args, lambda *given: call(module, *given, **kwargs))

    def run(*args: Any, **kwargs: Any) -> Any:
        token = _around.set(around)
        try:
            return model(*args, **kwargs)
        finally:
            _around.reset(token)

    for module in nnx_modules(model).values():
        if callable(module):
            module.__class__ = _watched_class(type(module))
    return run


@cache  # NNX registers each class with jax for good, so there is one for each, not for each run
def _watched_class(cls: type) -> type:
    """`cls` with a call that goes through the run it is called in."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _around.get()(self, cls.__call__, args, kwargs)

    return type(cls.__name__, (cls,), {"__call__": __call__, "__module__": cls.__module__})
