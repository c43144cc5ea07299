"""The leaves and layers of a Flax model under the paths that torch has for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from gam_flax.convert import leaves


def nnx_variables(model: Any) -> dict[str, Any]:
    """Dotted path → variable, of everything that a checkpoint holds: no random state, no
    captured activations."""
    from flax import nnx

    kept = nnx.Not(nnx.Any(nnx.RngState, nnx.Intermediate))
    flat = nnx.to_flat_state(nnx.state(model, kept))
    return {dotted(model, path): variable for path, variable in flat}


def nnx_modules(model: Any) -> dict[str, Any]:
    """Dotted path → module, the model itself under ""."""
    from flax import nnx

    return {dotted(model, path): module for path, module in nnx.iter_modules(model)}


def turned_kernels(model: Any) -> frozenset[str]:
    """The paths of the kernels that `leaves` calls turned: those of transposed convolutions as
    Flax builds them by default."""
    from flax import nnx

    return frozenset(
        leaves.join(path, "kernel")
        for path, module in nnx_modules(model).items()
        if isinstance(module, nnx.ConvTranspose) and not module.transpose_kernel
    )


def linen_leaves(variables: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """(collection, path, …, leaf) → array, of Linen variables."""
    import jax

    flat = jax.tree_util.tree_leaves_with_path(variables)
    return {tuple(str(getattr(part, "key", part)) for part in path): leaf for path, leaf in flat}


def arrays(model_or_variables: Any) -> dict[str, np.ndarray]:
    """Dotted path → value, of an NNX module or Linen variables, without the collection."""
    if isinstance(model_or_variables, Mapping):
        flat = linen_leaves(model_or_variables).items()
        return {".".join(path[1:]): np.asarray(leaf) for path, leaf in flat}
    variables = nnx_variables(model_or_variables).items()
    return {path: np.asarray(variable[...]) for path, variable in variables}


def dotted(model: Any, path: Iterable[Any]) -> str:
    """A path with torch's names: what `nnx.Sequential` holds in `layers` torch holds directly."""
    from flax import nnx

    parts, node = [], model
    for part in path:
        if not (isinstance(node, nnx.Sequential) and part == "layers"):
            parts.append(str(part))
        node = _child(node, part)
    return ".".join(parts)


def built(model: Any, path: Iterable[Any]) -> list[int]:
    """Sorts paths by the order of building, which mostly is that of running: of each part, the
    number of its attribute."""
    order: list[int] = []
    node = model
    for part in path:
        if str(part).isdigit():
            order.append(int(part))
            node = node[int(part)]
        else:
            order.append(list(vars(node)).index(part))
            node = getattr(node, part)
    return order


def _child(node: Any, part: Any) -> Any:
    if isinstance(part, str) and hasattr(node, part):
        return getattr(node, part)
    try:
        return node[part]
    except (TypeError, KeyError, IndexError):
        return None
