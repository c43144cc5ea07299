"""A Flax model, NNX or Linen, run on a copy of its arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import errors, linen, nnx

from gam_flax.convert import flax_paths
from gam_flax.parity.linen_side import pure_linen, turned_linen_kernels
from gam_flax.parity.masks import REFUSED, Masks
from gam_flax.parity.nnx_side import pure_nnx
from gam_flax.parity.pure import Pure, is_float
from gam_flax.parity.trace import Calls, Fed, Place, Trace, cotangent, lean, results

_INPUT = ""
"""The input's name among the arrays that are differentiated; no parameter's path is empty."""


def pure(model: Any, *, dtype: str, train: bool, masks: Masks | None = None) -> Pure:
    """`model` in training or evaluation, its layers told to compute in `dtype`.

    Args:
        model: an `nnx.Module` or a pair (linen module, variables).
        masks: by Flax's paths, what layers that drop numbers keep in training.

    Raises:
        TypeError: it is neither.
    """
    check_kind(model)
    options: dict[str, Any] = {"train": train, "masks": masks if train and masks else {}}
    if isinstance(model, nnx.Module):
        return pure_nnx(model, dtype=jnp.dtype(dtype), **options)
    return pure_linen(*model, dtype=jnp.dtype(dtype), **options)


def check_kind(model: Any) -> None:
    """Raises TypeError unless `model` is an `nnx.Module` or a pair (linen module, variables)."""
    match model:
        case nnx.Module() | (linen.Module(), Mapping()):
            return
    raise TypeError(
        "flax_model must be an nnx.Module or a pair (linen module, variables), "
        f"got {type(model).__name__}"
    )


def turned_kernels(model: Any, pure: Pure, x: np.ndarray) -> frozenset[str]:
    """The paths of the kernels that `convert.leaves` calls turned.

    A Linen module tells of its layers when it is called, which is done without numbers.
    """
    if isinstance(model, nnx.Module):
        return flax_paths.turned_kernels(model)
    return turned_linen_kernels(pure, x)


class Program:
    """`model` compiled once: (x, factors) → one forward, and one backward with `gradients`.

    Parameters and input are rounded to `dtype`; statistics as well, but they are kept in float32
    or wider, as a Flax BatchNorm keeps them. What the forward raises becomes the trace's `error`.
    jax's switches are put back.

    Args:
        loss: of the output; None for Σ output · cotangent.
        tell: hears the path of each layer while the model is traced.
    """

    def __init__(
        self,
        model: Pure,
        *,
        dtype: str,
        gradients: bool,
        loss: Callable[[Any], Any] | None = None,
        tell: Callable[[str], None] = lambda path: None,
    ):
        self._dtype = dtype
        self._model = model
        self._free, self._fed = _Names(tell), _Names(tell)
        self._run = jax.jit(partial(_forward_and_back, model.apply, gradients, loss, self._free))
        self._run_fed = jax.jit(partial(_forward_fed, model.apply, self._fed))

    def __call__(self, x: np.ndarray, factors: Mapping[str, float]) -> Trace:
        """One run.

        Args:
            x: (B, *space, C).
            factors: what parameters and statistics are multiplied with before they are rounded.
        """
        arguments = self._arguments(x, factors)
        with switches(self._dtype):
            try:
                found, activations = self._run(*arguments)
            except Exception as error:
                return _until(error, self._model, arguments, Calls(keep=lean))
            return Trace(**jax.tree.map(lean, found) | self._free.named(activations))

    def fed(self, x: np.ndarray, factors: Mapping[str, float], source: Trace) -> Trace:
        """One forward, every layer of which is given the activations of `source`, which are laid
        out for this model, instead of its own."""
        with switches(self._dtype):
            inputs, outputs = (self._on_device(kind) for kind in (source.inputs, source.layers))
            arguments = self._arguments(x, factors)
            try:
                found, activations = self._run_fed(*arguments, inputs, outputs)
            except Exception as error:
                return _until(
                    error, self._model, arguments, Fed(inputs, outputs, _adopt, keep=lean)
                )
            return Trace(**jax.tree.map(lean, found) | self._fed.named(activations))

    def _on_device(self, arrays: Mapping[Place, np.ndarray]) -> dict[Place, Any]:
        """Each array once."""
        made = {id(array): array for array in arrays.values()}
        made = {key: jnp.asarray(cast(array, self._dtype)) for key, array in made.items()}
        return {place: made[id(array)] for place, array in arrays.items()}

    def _arguments(self, x: np.ndarray, factors: Mapping[str, float]) -> tuple[dict, dict, Any]:
        wider = jnp.promote_types(self._dtype, jnp.float32)
        parameters, statistics = (
            {key: cast(array, self._dtype, factors.get(key, 1.0)) for key, array in kind.items()}
            for kind in (self._model.parameters, self._model.statistics)
        )
        statistics = {key: cast(array, wider) for key, array in statistics.items()}
        return parameters, statistics, cast(x, self._dtype)


@contextmanager
def switches(dtype: str) -> Iterator[None]:
    """jax's own settings while a model runs in `dtype`."""
    with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
        yield


class _Names:
    """The names of what a compiled program returns of its layers, each tensor once.

    They are found when the program is traced. Args: as `Program`.
    """

    def __init__(self, tell: Callable[[str], None]):
        self.tell = tell
        self._place: dict[str, dict[Place, int]] = {}

    def once(self, calls: Calls) -> list[Any]:
        """The tensors that `calls` holds, each once."""
        kinds = {"inputs": calls.inputs, "layers": calls.outputs}
        found = {id(tensor): tensor for kind in kinds.values() for tensor in kind.values()}
        number = {key: i for i, key in enumerate(found)}
        self._place = {
            kind: {place: number[id(tensor)] for place, tensor in named.items()}
            for kind, named in kinds.items()
        }
        return list(found.values())

    def named(self, arrays: list[Any]) -> dict[str, Any]:
        """What the program returned, under its places."""
        kept = [lean(array) for array in arrays]
        return {
            kind: {place: kept[i] for place, i in numbers.items()}
            for kind, numbers in self._place.items()
        }


def _forward_and_back(
    apply: Any,
    gradients: bool,
    loss: Callable[[Any], Any] | None,
    names: _Names,
    parameters: dict,
    statistics: dict,
    x: Any,
) -> tuple[dict[str, Any], list[Any]]:
    """The fields of a trace, and what the layers took and gave."""

    def forward(smooth: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        calls = Calls(tell=names.tell)
        given = {**parameters, **smooth}
        output, after = apply(given, statistics, given.pop(_INPUT, x), calls)
        roots = results(output) if loss is None else [("", loss(output))]
        smooth_roots = {part: y for part, y in roots if is_float(y)}
        return smooth_roots, (_trace(output, after), names.once(calls))

    if not gradients:
        return forward({})[1]
    arguments = {**parameters, _INPUT: x}
    smooth = {key: array for key, array in arguments.items() if is_float(array)}
    roots, back, (trace, activations) = jax.vjp(forward, smooth, has_aux=True)
    weights = {
        part: jnp.ones_like(y) if loss else jnp.asarray(cotangent(part, y.shape), y.dtype)
        for part, y in roots.items()
    }
    found = dict(back(weights)[0])
    total = sum(jnp.sum(y * weights[part]) for part, y in roots.items())
    trace |= {"loss": total, "input_gradient": found.pop(_INPUT, None), "gradients": found}
    return trace, activations


def _forward_fed(
    apply: Any,
    names: _Names,
    parameters: dict,
    statistics: dict,
    x: Any,
    inputs: dict,
    outputs: dict,
) -> tuple[dict[str, Any], list[Any]]:
    """The same of a forward whose layers are fed."""
    calls = Fed(inputs, outputs, _adopt, tell=names.tell)
    output, after = apply(parameters, statistics, x, calls)
    return _trace(output, after), names.once(calls)


def _trace(output: Any, statistics: dict) -> dict[str, Any]:
    return {"outputs": dict(results(output)), "statistics": statistics}


def _adopt(given: Any, own: Any) -> Any:
    """`given` in place of `own`, where that can be."""
    fits = is_float(own) and is_float(given)
    return jnp.asarray(given, own.dtype) if fits else own


def _until(error: Exception, model: Pure, arguments: tuple[dict, dict, Any], calls: Calls) -> Trace:
    """What the layers gave before the forward raised `error`; `calls` watches once more."""
    parameters, statistics, x = jax.tree.map(jnp.asarray, arguments)
    try:
        model.apply(parameters, statistics, x, calls)
    except Exception as again:
        error = again  # without the frames of jit
    if isinstance(error, errors.InvalidRngError):
        error = ValueError(f"{calls.innermost or 'the model'}, in Flax, {REFUSED}")
    return Trace(inputs=calls.inputs, layers=calls.outputs, error=error)


def cast(array: Any, dtype: Any, factor: float = 1.0) -> np.ndarray:
    """In numpy, of `dtype` where it is floating: jax would compile a program for each shape."""
    array = np.asarray(array)
    if not is_float(array):
        return array
    scaled = array if factor == 1.0 else array.astype(np.float64) * factor
    return scaled.astype(jnp.dtype(dtype), copy=False)
