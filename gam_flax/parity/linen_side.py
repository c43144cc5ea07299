"""A Linen model as a pure function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import jax
from flax import linen

from gam_flax.convert import leaves
from gam_flax.convert.flax_paths import linen_leaves
from gam_flax.parity.masks import Masks, dropped
from gam_flax.parity.pure import Pure, call_modes, is_float_type, modes, trace_level
from gam_flax.parity.trace import Calls


def pure_linen(
    module: linen.Module, variables: Mapping[str, Any], *, dtype: Any, train: bool, masks: Masks
) -> Pure:
    """`module` with its variables, its layers told to compute in `dtype`, those with masks to use
    these.

    The mode reaches it by the argument of `__call__` or the field that has one of the usual
    names, see `modes`.
    """
    leaves = linen_leaves(linen.meta.unbox(variables))
    names = {path: ".".join(path[1:]) for path in leaves}
    parameters = {names[path]: leaf for path, leaf in leaves.items() if path[0] == "params"}
    statistics = {names[path]: leaf for path, leaf in leaves.items() if path[0] != "params"}
    told = call_modes(module, train)  # Linen takes a mode once, as an argument or as a field
    fields = modes(train).keys() & module.__dataclass_fields__.keys() - told.keys()
    module = module.clone(**{name: modes(train)[name] for name in fields})
    own_dtypes: dict[str, Any] = {}
    mutable = sorted({path[0] for path in leaves} - {"params"}) if train else []

    def apply(parameters: dict, statistics: dict, x: Any, calls: Calls) -> tuple[Any, dict]:
        arrays = {**statistics, **parameters}
        filled = _nest({path: arrays[name] for path, name in names.items()})
        with linen.intercept_methods(_interceptor(calls, dtype, own_dtypes, masks)):
            output, after = module.apply(filled, x, mutable=mutable, **told)
        changed = {names[path]: leaf for path, leaf in linen_leaves(after).items()}
        return output, {**statistics, **changed}

    return Pure(parameters, statistics, apply, own_dtypes)


def _interceptor(
    calls: Calls, dtype: Any, own_dtypes: dict[str, Any], masks: Masks
) -> Callable[..., Any]:
    """Sets each layer's dtype before it runs, noting its own, and takes its call through `calls`.

    `capture_intermediates` notes a layer twice that calls its parent's `__call__`.
    """
    level = trace_level()
    running: list[tuple[str, ...]] = []

    def intercept(
        call: Callable[..., Any],
        args: tuple,
        kwargs: dict,
        context: linen.module.InterceptorContext,
    ) -> Any:
        module, path = context.module, context.module.path
        if context.method_name != "__call__" or path in running:
            return call(*args, **kwargs)
        name = ".".join(path)
        if is_float_type(getattr(module, "dtype", None)):
            own_dtypes.setdefault(name, module.dtype)  # type: ignore[attr-defined]
            object.__setattr__(module, "dtype", dtype)  # apply works on copies of the modules
        if name in masks:
            call, kwargs = partial(dropped, masks[name], module), {}
        seen = path and trace_level() == level
        running.append(path)
        try:
            if not seen:
                return call(*args, **kwargs)
            return calls.through(name, args, lambda *given: call(*given, **kwargs))
        finally:
            running.pop()

    return intercept


def turned_linen_kernels(pure: Pure, x: Any) -> frozenset[str]:
    """The paths of the kernels that `convert.leaves` calls turned."""
    found: set[str] = set()

    def note(
        call: Callable[..., Any],
        args: tuple,
        kwargs: dict,
        context: linen.module.InterceptorContext,
    ) -> Any:
        module = context.module
        if isinstance(module, linen.ConvTranspose) and not module.transpose_kernel:
            found.add(leaves.join(".".join(module.path), "kernel"))
        return call(*args, **kwargs)

    def forward(parameters: dict, statistics: dict, x: Any) -> None:
        pure.apply(parameters, statistics, x, Calls())

    with linen.intercept_methods(note), suppress(Exception):  # the comparison tells of what raises
        jax.eval_shape(forward, pure.parameters, pure.statistics, x)
    return frozenset(found)


def _nest(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = leaf
    return tree
