"""Where a loss that is not a number began."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gam_flax.convert.flax_paths import built, dotted, nnx_variables


def where_it_began(model: nnx.Module, images: Any, loss: Callable[[nnx.Module], jax.Array]) -> str:
    """The first layer with an output that is not finite, or a parameter with such a gradient.

    Layers in the order in which the network was built, which is the order in which it runs; what
    is in parallel to a layer comes after it.

    Args:
        model: in training mode. It is run once more, slowly, layer by layer.
        images: as the network sees them, (B, H, W, C).
        loss: of such a model, for these pictures.

    Returns:
        A sentence's end, such as "in layer2.0.conv1, whose output has 12 of 4096 values that are
        not finite".
    """
    for path, variable in nnx_variables(model).items():
        if not _finite(variable[...]):
            return f"in {path}, which has values that are not finite"
    if not _finite(images):
        return "in the pictures"
    if hasattr(model, "remat"):
        vars(model)["remat"] = False  # nobody sees the outputs of layers inside it
    for path, output in _outputs(model, images):
        if not _finite(output):
            bad = int((~np.isfinite(np.asarray(output, np.float32))).sum())
            return f"in {path}, whose output has {bad:,} of {output.size:,} values not finite"
    return f"in the gradient{_gradient(model, loss)}"


def _outputs(model: nnx.Module, images: Any) -> list[tuple[str, Any]]:
    """(path, output) of each layer that has no layers inside, in the order of their building."""
    capture: Any = nnx.capture(model, nnx.Intermediate, method_outputs=nnx.Intermediate)
    _, kept = capture(images)
    found: list[tuple[str, Any]] = []
    for path, module in nnx.iter_modules(model):
        node = kept
        for part in path:
            node = node.get(part, {}) if hasattr(node, "get") else {}
        inside = [p for p, _ in nnx.iter_modules(module) if p]
        if not inside and "__call__" in node:
            found += [(dotted(model, path), out) for out in node["__call__"].get_value()]
    return sorted(found, key=lambda pair: built(model, pair[0].split(".")))


def _gradient(model: nnx.Module, loss: Callable[[nnx.Module], jax.Array]) -> str:
    """The last parameter whose gradient is not finite: gradients come from the end."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def of(params: Any) -> jax.Array:
        return loss(nnx.merge(graph, params, rest, copy=True))

    grads = nnx.merge(graph, jax.grad(of)(params), rest)
    paths = [p for p, v in nnx_variables(grads).items() if not _finite(v[...])]
    if not paths:
        return "'s norm, which is too large for a float32"
    last = max(paths, key=lambda path: built(model, path.split(".")[:-1]))
    return f" of {last}"


def _finite(values: Any) -> bool:
    return bool(jnp.isfinite(jnp.asarray(values)).all())
