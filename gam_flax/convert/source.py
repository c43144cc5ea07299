"""Whatever a user has, opened as a checkpoint in torch's layout, with all it says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gam_flax.convert import leaves
from gam_flax.convert.checkpoint import Checkpoint, from_mapping, from_module, read_checkpoint
from gam_flax.convert.errors import CheckpointError, shorten
from gam_flax.convert.layouts import UNSEEN, VARIANTS, behaviour


def open_source(source: Any) -> Checkpoint:
    """A `Checkpoint` of whatever the user has: a path, a state_dict, a torch module, itself.

    Files in Flax's own layout come back in torch's, so that all that follows sees one layout.
    """
    if isinstance(source, Checkpoint):
        checkpoint = source
    elif isinstance(source, Mapping):
        checkpoint = from_mapping(source)
    elif hasattr(source, "state_dict") and hasattr(source, "named_modules"):
        checkpoint = from_module(source)
        told = _told_by_module(source, checkpoint.stripped)
        checkpoint = replace(checkpoint, metadata={"behaviour": json.dumps(told)})
    else:
        checkpoint = read_checkpoint(source)
    if "norms" in checkpoint.metadata and not checkpoint.norms:
        checkpoint = replace(checkpoint, norms=_norms_of_metadata(checkpoint))
    if checkpoint.layout == "flax":
        turned = _turned(checkpoint)
        tensors = {
            leaves.torch_name(name): leaves.to_torch_layout(name, array, turned=name in turned)
            for name, array in checkpoint.tensors.items()
        }
        return replace(checkpoint, tensors=tensors, layout="torch")
    return checkpoint


def _told_by_module(module: Any, stripped: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """The unseen arguments of each live block of ours: path, without what was stripped, → them."""
    told = {}
    for path, child in module.named_modules():
        for wrapper in stripped:
            path = path.removeprefix(wrapper)
        if found := told_by_attributes(child):
            told[path] = found[1]
    return told


def told_by_attributes(module: Any) -> tuple[str, dict[str, Any]] | None:
    """Kind and unseen arguments of a live block of ours, in either framework; None for others."""
    kind = {"GAM": "gam", "CBAM": "cbam", "SqueezeExcitation": "se", "BAM": "bam"}.get(
        type(module).__name__
    )
    if kind is None or not all(hasattr(module, name) for name in UNSEEN[kind]):
        return None
    return kind, {name: getattr(module, name) for name in UNSEEN[kind]}


def variant_of(kind: str, options: Mapping[str, Any]) -> str | None:
    """The first variant of `kind` that agrees with `options` on what no weight shows."""
    wanted = {name: options[name] for name in UNSEEN[kind]}
    return next((v for v in VARIANTS[kind] if behaviour(kind, v) == wanted), None)


def told_by_metadata(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """What a file of ours, or a live module, says about the arguments that no weight shows.

    path of a block → those arguments.
    """
    told = _table(checkpoint, "behaviour")
    for path, arguments in told.items():
        known = isinstance(arguments, dict) and any(
            arguments.keys() == unseen.keys() for unseen in UNSEEN.values()
        )
        if not known or not all(isinstance(v, str | None) for v in arguments.values()):
            raise CheckpointError(
                f"{checkpoint.path}: its metadata entry 'behaviour' is broken at {shorten(path)!r}"
            )
    return told


def _norms_of_metadata(checkpoint: Checkpoint) -> dict[str, dict[str, float | None]]:
    """eps and momentum of the norms as `convert_file` wrote them."""
    norms = _table(checkpoint, "norms")
    for norm in norms.values():
        numbers = norm.values() if isinstance(norm, dict) else ["not a table"]
        if not all(value is None or isinstance(value, float | int) for value in numbers):
            raise CheckpointError(f"{checkpoint.path}: its metadata entry 'norms' is broken")
    return norms


def _turned(checkpoint: Checkpoint) -> list[str]:
    """The kernels that `save` kept as a transposed convolution has them."""
    try:
        names = json.loads(checkpoint.metadata.get("turned", "[]"))
    except (json.JSONDecodeError, RecursionError):
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{checkpoint.path}: its metadata entry 'turned' is not a list")
    return names


def _table(checkpoint: Checkpoint, entry: str) -> dict[str, Any]:
    """A table that this package writes into the metadata of a file, as JSON."""
    try:
        table = json.loads(checkpoint.metadata.get(entry, "{}"))
    except (json.JSONDecodeError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise CheckpointError(f"{checkpoint.path}: its metadata entry {entry!r} is not a table")
    return table
