"""A Flax model without its arrays, whichever of the two libraries it is written in."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.extend
import jax.numpy as jnp

from gam_flax.parity.trace import Calls


@dataclass(frozen=True)
class Pure:
    """A model as a function, in training or evaluation.

    parameters, statistics: its arrays by dotted path, as they are.
    apply: (parameters, statistics, x, calls) → (output, statistics after); the layers are called
        through `calls`.
    own_dtypes: path → the dtype that a layer is told to compute in as it is, where it is told one;
        a Linen module's fill in when it is applied.
    """

    parameters: dict[str, Any]
    statistics: dict[str, Any]
    apply: Callable[[dict[str, Any], dict[str, Any], Any, Calls], tuple[Any, dict[str, Any]]]
    own_dtypes: dict[str, Any]


def modes(train: bool) -> dict[str, Any]:
    """The names under which Flax models take the mode, and what they are in this one."""
    names = {"train": train, "training": train, "is_training": train}
    return {**names, "deterministic": not train, "use_running_average": not train}


def call_modes(model: Any, train: bool) -> dict[str, Any]:
    """Those of `modes` that `model` takes when it is called."""
    taken = inspect.signature(type(model).__call__).parameters
    return {name: value for name, value in modes(train).items() if name in taken}


def is_float(array: Any) -> bool:
    """Whether an array of numpy or jax holds floating numbers, bfloat16 included."""
    return jnp.issubdtype(array.dtype, jnp.floating)


def is_float_type(value: Any) -> bool:
    """Whether `value` names a floating dtype, in any of the ways jax accepts."""
    try:
        return value is not None and jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        return False


def trace_level() -> Any:
    """The jax transformation in whose middle this is called: values of an inner one are gone
    when it ends, so only what was made on one's own level can be kept."""
    return jax.extend.core.get_opaque_trace_state(convention="flax")
