"""PyTorch weights into a Flax model that stands: NNX in place, Linen as new variables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from gam_flax.convert import leaves
from gam_flax.convert.blocks import (
    CUSTOM,
    Block,
    canonical_tensors,
    decide,
    identify,
    renames,
)
from gam_flax.convert.checkpoint import Checkpoint
from gam_flax.convert.errors import CheckpointError, shorten
from gam_flax.convert.flax_paths import linen_leaves, nnx_modules, nnx_variables
from gam_flax.convert.report import ConversionReport
from gam_flax.convert.source import open_source, told_by_attributes, variant_of

if TYPE_CHECKING:
    from flax import nnx

COUNTER = "num_batches_tracked"
"""The one leaf that either side may lack: old files have none, Flax's own BatchNorm neither."""


@dataclass(frozen=True)
class Leaf:
    """A place in a Flax model: its path, shape and dtype."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype


def load_torch(
    model: nnx.Module,
    source: Any,
    *,
    variant: str | Mapping[str, str] | None = None,
    strict: bool = True,
    prefix: str | None = None,
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

    Returns:
        What went where.

    Raises:
        CheckpointError: the source cannot be read; a block is ambiguous and `variant` is not
            given, or the model was built as another variant; with `strict`, all that is missing,
            unexpected or of another shape, at once.
    """
    modules, variables = nnx_modules(model), nnx_variables(model)
    places = [Leaf(path, v.shape, np.dtype(v.dtype)) for path, v in variables.items()]
    attributes = {
        path: told for path, module in modules.items() if (told := told_by_attributes(module))
    }
    values, report, norms = _match(places, source, variant, strict, prefix, attributes)
    for path, value in values.items():
        _assign(variables[path], value)
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
) -> tuple[dict[str, Any], ConversionReport]:
    """New Linen variables with PyTorch weights; arguments and errors as `load_torch`.

    Variables do not say which variant their module is, nor its eps: `variant` is wanted for every
    ambiguous block, and the report's notes name the eps and momentum that the module must be
    given where the source tells them and they are not torch's defaults.

    Args:
        variables: {"params": …, "batch_stats": …} as `module.init` gives them, or shapes alone
            from `jax.eval_shape`.
    """
    import jax.numpy as jnp

    flat = linen_leaves(variables)
    names = {path: ".".join(path[1:]) for path in flat}
    places = [Leaf(names[path], v.shape, np.dtype(v.dtype)) for path, v in flat.items()]
    values, report, norms = _match(places, source, variant, strict, prefix, attributes=None)
    for path, settings in norms.items():
        told = {"eps": settings.get("eps"), "momentum": settings.get("momentum")}
        if told not in ({"eps": 1e-5, "momentum": 0.1}, {"eps": None, "momentum": None}):
            report.notes.append(
                f"{path}: build the module with eps {told['eps']} and momentum {told['momentum']}"
            )
    filled: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = filled
        for part in path[:-1]:
            node = node.setdefault(part, {})
        value = values.get(names[path])
        node[path[-1]] = leaf if value is None else jnp.array(value)
    return filled, report


def _assign(variable: Any, value: np.ndarray) -> None:
    import jax
    import jax.numpy as jnp

    old = variable.get_value()  # shapes alone, where the model comes from nnx.eval_shape
    new = jnp.array(value)  # a copy: the source may be a mapped file or a torch module in use
    variable.set_value(jax.device_put(new, old.sharding) if isinstance(old, jax.Array) else new)


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


def _match(
    places: list[Leaf],
    source: Any,
    variant: str | Mapping[str, str] | None,
    strict: bool,
    prefix: str | None,
    attributes: Mapping[str, tuple[str, dict[str, Any]]] | None,
) -> tuple[dict[str, np.ndarray], ConversionReport, dict[str, dict[str, float | None]]]:
    """Values by Flax path, the report, and the norms' settings by Flax path.

    `attributes` are the model's own blocks by path, or None where the model cannot be asked.
    """
    checkpoint = open_source(source)
    blocks = identify(checkpoint)
    tensors = canonical_tensors(checkpoint, blocks)
    expected = {leaves.torch_name(place.path): place for place in places}
    where = checkpoint.path or "the source"
    cut = _prefix(tensors, expected, blocks, prefix, attributes, where)
    report = ConversionReport(source=checkpoint.path)
    if cut:
        report.notes.append(f"{shorten(cut)} taken off the keys")
        tensors = {k[len(cut) :]: array for k, array in tensors.items() if k.startswith(cut)}
    inside = {
        b.prefix[len(cut) :] if b.prefix else "": b
        for b in blocks
        if f"{b.prefix}.".startswith(cut)
    }
    report.variants = _variants(inside, attributes, variant, where)
    values: dict[str, np.ndarray] = {}
    for key, place in expected.items():
        if key in tensors:
            _take(key, tensors[key], place, values, report)
        elif leaves.split(key)[1] != COUNTER:
            report.missing.append(key)
    report.unexpected = [
        key for key in tensors if key not in expected and leaves.split(key)[1] != COUNTER
    ]
    _note_counters(tensors, expected, report)
    if strict and not report.ok:
        raise CheckpointError(_complaint(report, where, blocks))
    norms = _norm_paths(checkpoint, blocks, cut)
    return values, report, norms


def _take(
    key: str,
    array: np.ndarray,
    place: Leaf,
    values: dict[str, np.ndarray],
    report: ConversionReport,
) -> None:
    """Lays one tensor out as its place wants it and writes the outcome into the report."""
    if array.ndim == 4 and len(place.shape) == 2 and array.shape[2:] == (1, 1):
        array = array[:, :, 0, 0]  # a linear layer stored as a 1×1 convolution
    value = leaves.to_flax_layout(place.path, array)
    if value.shape != place.shape:
        wanted = leaves.torch_shape(place.path, place.shape)
        report.mismatched[key] = (array.shape, wanted)
        return
    if not np.isfinite(value).all():
        report.not_finite.append(key)
    if value.dtype != place.dtype:
        value = _cast(key, value, place.dtype, report)
    report.mapped[key] = place.path
    values[place.path] = value


def _cast(key: str, value: np.ndarray, dtype: np.dtype, report: ConversionReport) -> np.ndarray:
    counts = np.issubdtype(value.dtype, np.integer) and np.issubdtype(dtype, np.integer)
    if not counts:  # an int64 counter in int32 is the leaf table's business, not a cast
        report.cast[key] = (str(value.dtype), str(dtype))
    elif value.size and (value.max() > np.iinfo(dtype).max or value.min() < np.iinfo(dtype).min):
        raise CheckpointError(
            f"{report.source}: {shorten(key)} is {value.max()}, more than {dtype} holds"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        return value.astype(dtype)


def _prefix(
    tensors: Mapping[str, Any],
    expected: Mapping[str, Leaf],
    blocks: list[Block],
    prefix: str | None,
    attributes: Mapping[str, tuple[str, dict[str, Any]]] | None,
    where: str,
) -> str:
    """What to take off the keys, with its dot: the user's word, or what makes most keys fit."""
    if prefix is not None:
        cut = f"{prefix.rstrip('.')}."
        if not any(key.startswith(cut) for key in tensors):
            raise CheckpointError(f"{where}: no key begins with prefix {shorten(cut)!r}")
        return cut
    if any(key in tensors for key in expected):
        return ""
    own = (attributes or {}).get("")
    if own:  # the model is a bare block
        same = [block for block in blocks if block.kind == own[0] and not block.refusal]
        if len(same) == 1:
            return leaves.join(same[0].prefix, "")
        if same:
            names = ", ".join(shorten(block.prefix) for block in same[:8])
            raise CheckpointError(
                f"{where}: it holds {len(same)} blocks of this kind ({names}); "
                "say which with prefix="
            )
    first = next(iter(tensors), "").split(".")
    for depth in range(1, len(first)):
        cut = ".".join(first[:depth]) + "."
        if not all(key.startswith(cut) for key in tensors):
            break
        if any(cut + key in tensors for key in expected):
            return cut
    return ""


def _variants(
    blocks: Mapping[str, Block],
    attributes: Mapping[str, tuple[str, dict[str, Any]]] | None,
    variant: str | Mapping[str, str] | None,
    where: str,
) -> dict[str, str]:
    """The variant of each block, and that the model was built for it.

    A block whose place in the model is the user's own class is the user's own affair.
    """
    if attributes is not None:
        blocks = {path: block for path, block in blocks.items() if path in attributes}
    chosen = decide(list(blocks.values()), variant, where)
    variants = {path: chosen[b.prefix] for path, b in blocks.items() if b.prefix in chosen}
    for path, name in variants.items():
        if attributes is None:
            continue
        kind, built = attributes[path]
        block = blocks[path]
        said = block.behaviour(name)
        if kind == block.kind and said != built:
            differing = ", ".join(
                f"{argument}={built[argument]!r} instead of {said[argument]!r}"
                for argument in said
                if built[argument] != said[argument]
            )
            raise CheckpointError(
                f"{where}: {shorten(path) or 'the block'} is {name!r}, the model was built as "
                f"{variant_of(kind, built) or CUSTOM!r}: {differing}"
            )
    return variants


def _note_counters(
    tensors: Mapping[str, Any], expected: Mapping[str, Leaf], report: ConversionReport
) -> None:
    absent = [k for k in expected if leaves.split(k)[1] == COUNTER and k not in tensors]
    surplus = [k for k in tensors if leaves.split(k)[1] == COUNTER and k not in expected]
    if absent:
        report.notes.append(f"{len(absent)} {COUNTER} are not in the source and stay as they are")
    if surplus:
        report.notes.append(f"{len(surplus)} {COUNTER} of the source have no place in the model")


def _complaint(report: ConversionReport, where: str, blocks: list[Block]) -> str:
    refused = [str(block) for block in blocks if block.refusal]
    return f"{where}: does not fit the model: " + "; ".join([*report.problems(), *refused])


def _norm_paths(
    checkpoint: Checkpoint, blocks: list[Block], cut: str
) -> dict[str, dict[str, float | None]]:
    """The norms' settings under the paths of the model."""
    names = renames(blocks)
    paths = {names.get(path, path): dict(norm) for path, norm in checkpoint.norms.items()}
    return {path[len(cut) :]: norm for path, norm in paths.items() if path.startswith(cut)}
