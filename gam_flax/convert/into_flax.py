"""PyTorch weights into a Flax model that stands: NNX in place, Linen as new variables."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gam_flax.convert.errors import CheckpointError
from gam_flax.convert.flax_paths import (
    linen_leaves,
    nnx_modules,
    nnx_variables,
    turned_kernels,
)
from gam_flax.convert.match import COUNTER, Leaf, Wanted, match
from gam_flax.convert.rename import Rename
from gam_flax.convert.report import ConversionReport
from gam_flax.convert.source import open_source, told_by_attributes
from gam_flax.convert.yolo import moves

if TYPE_CHECKING:
    from flax import nnx

_TRANSPOSED = ("ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
_NOTHING_TO_KEEP = "keep: the model holds shapes alone, it has no initialisation"


def load_torch(
    model: nnx.Module,
    source: Any,
    *,
    variant: str | Mapping[str, str] | None = None,
    strict: bool = True,
    prefix: str | None = None,
    keep: Collection[str] = (),
    rename: Rename = None,
) -> ConversionReport:
    """Fills an NNX model with PyTorch weights, in place.

    Layers are matched by path: `layer1.0.conv1.weight` goes to `layer1.0.conv1.kernel`.
    Attention blocks are recognised in every layout of `layouts` and brought to their canonical
    names first. Values are copied bit for bit where the dtypes agree, else cast to the model's
    and listed. eps and momentum of the norms follow the source where it tells them.

    Args:
        model: any `nnx.Module`; nothing of it changes when this raises.
        source: a path (`.pt`, `.pth`, `.safetensors`, …), a state_dict, a `Checkpoint` or a
            torch module.
        variant: what the weights cannot tell, such as "gated": one name, or kind → name. It must
            agree with how the model was built. Not needed where the source tells it.
        strict: raise unless every leaf and every tensor is matched. With False, what matches is
            filled and the report says the rest.
        prefix: take only the keys below this path, such as "model.9". By default `model.` and
            the like are taken off where all keys begin so and the model's do not, and a bare
            block is filled from the one block that the file holds.
        keep: layers that keep their initialisation, by path, such as ["fc"], with all below them;
            "attention" stands for every attention block of ours and for what our networks have
            at `attention` and `attention1` …. The source may have weights for them or not: a
            plain backbone goes into a network with attention so.
        rename: the source's path of a layer → the model's, a mapping (which also holds for what
            lies under a path) or a function. The names that circulate for CIFAR's ResNets
            (`linear`, `shortcut`) are known.

    Returns:
        What went where.

    Raises:
        CheckpointError: the source cannot be read; a block is ambiguous and `variant` is not
            given, or the model was built as another variant; with `strict`, all that is missing,
            unexpected or of another shape, at once.
    """
    modules, variables = nnx_modules(model), nnx_variables(model)
    config = getattr(model, "config", None)
    if rename is None and config is not None and hasattr(model, "decode"):
        source = open_source(source)
        rename = moves(config, source.tensors)
    turned = turned_kernels(model)
    places = [
        Leaf(path, v.shape, np.dtype(v.dtype), path in turned) for path, v in variables.items()
    ]
    attributes = {
        path: told for path, module in modules.items() if (told := told_by_attributes(module))
    }
    if keep and any(map(_has_no_values, variables.values())):
        raise CheckpointError(_NOTHING_TO_KEEP)
    wanted = Wanted(variant, strict, prefix, keep, rename)
    values, report, norms = match(places, source, wanted, attributes)
    for path, value in values.items():
        assign(variables[path], value)
    for path, variable in variables.items():
        if path.endswith(COUNTER) and _has_no_values(variable):
            assign(variable, np.zeros(variable.shape, variable.dtype))
    begin_random_state(model)
    for path, settings in norms.items():
        changes = _adopt(modules.get(path), settings)
        if changes:
            report.settings[path] = changes
    return report


def load_torch_linen(
    variables: Mapping[str, Any],
    source: Any,
    *,
    variant: str | Mapping[str, str] | None = None,
    strict: bool = True,
    prefix: str | None = None,
    keep: Collection[str] = (),
    rename: Rename = None,
) -> tuple[dict[str, Any], ConversionReport]:
    """New Linen variables with PyTorch weights; arguments and errors as `load_torch`.

    Variables do not say which variant their module is, nor its eps: `variant` is wanted for every
    ambiguous block, and the report's notes name the eps and momentum that the module must be
    given where the source tells them and they are not torch's defaults. Nor do they say how a
    `linen.ConvTranspose` takes its kernel: it is laid out for transpose_kernel=True, which is not
    Linen's default.

    Args:
        variables: {"params": …, "batch_stats": …} as `module.init` gives them, or shapes alone
            from `jax.eval_shape`.
    """
    import jax
    import jax.numpy as jnp

    flat = linen_leaves(variables)
    if keep and any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in flat.values()):
        raise CheckpointError(_NOTHING_TO_KEEP)
    names = {path: ".".join(path[1:]) for path in flat}
    places = [Leaf(names[path], v.shape, np.dtype(v.dtype)) for path, v in flat.items()]
    wanted = Wanted(variant, strict, prefix, keep, rename)
    values, report, norms = match(places, source, wanted, attributes=None)
    for path, settings in norms.items():
        told = {"eps": settings.get("eps"), "momentum": settings.get("momentum")}
        if told not in ({"eps": 1e-5, "momentum": 0.1}, {"eps": None, "momentum": None}):
            report.notes.append(
                f"{path}: build the module with eps {told['eps']} and momentum {told['momentum']}"
            )
    report.notes += [
        f"{path}: build the module with transpose_kernel=True, for which its kernel is laid out"
        for path in _transposed(source)
    ]
    filled: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = filled
        for part in path[:-1]:
            node = node.setdefault(part, {})
        value = values.get(names[path])
        if value is None and path[-1] == COUNTER and isinstance(leaf, jax.ShapeDtypeStruct):
            value = np.zeros(leaf.shape, leaf.dtype)
        node[path[-1]] = leaf if value is None else jnp.array(value)
    return filled, report


def _transposed(source: Any) -> list[str]:
    """The transposed convolutions of a torch module; nothing else tells of any."""
    modules = source.named_modules() if hasattr(source, "named_modules") else ()
    return [path for path, module in modules if type(module).__name__ in _TRANSPOSED]


def assign(variable: Any, value: np.ndarray) -> None:
    """Gives an NNX variable a copy of `value`, where its old array lay."""
    import jax

    old = variable.get_value()  # shapes alone, where the model comes from nnx.eval_shape
    new = np.array(value, order="C")  # a copy: the source may be a mapped file or a model in use
    variable.set_value(jax.device_put(new, old.sharding if isinstance(old, jax.Array) else None))


def begin_random_state(model: nnx.Module) -> None:
    """Gives dropout its keys, from seed 0, where the model comes from `nnx.eval_shape`."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    streams = nnx.to_flat_state(nnx.state(model, nnx.RngState))
    for i, (_, variable) in enumerate(streams):
        if not _has_no_values(variable):
            continue
        if isinstance(variable, nnx.RngKey):
            key = jax.random.fold_in(jax.random.key(0), i)
            variable.set_value(jax.random.split(key, variable.shape) if variable.shape else key)
        else:
            variable.set_value(jnp.zeros(variable.shape, variable.dtype))


def _has_no_values(variable: Any) -> bool:
    """Whether the model comes from `nnx.eval_shape`."""
    import jax

    return isinstance(variable.get_value(), jax.ShapeDtypeStruct)


def _adopt(norm: Any, settings: Mapping[str, float | None]) -> list[tuple]:
    """Gives a norm layer the source's eps and momentum; returns what changed."""
    changes = []
    for name, attribute in (("eps", "eps"), ("momentum", "momentum"), ("eps", "epsilon")):
        ours = attribute != "momentum" or hasattr(norm, "eps")  # Flax's own means another thing
        if name not in settings or not hasattr(norm, attribute) or not ours:
            continue
        old, new = getattr(norm, attribute), settings[name]
        if old != new:
            setattr(norm, attribute, new)
            changes.append((name, old, new))
    return changes
