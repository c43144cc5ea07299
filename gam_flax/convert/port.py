"""A checkpoint file ported to another file, without building a model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from gam_flax.convert import leaves
from gam_flax.convert.blocks import Block, canonical_tensors, decide, identify, renames
from gam_flax.convert.checkpoint import Checkpoint
from gam_flax.convert.errors import CheckpointError, shorten
from gam_flax.convert.files import check_free, write_safetensors, write_torch
from gam_flax.convert.report import ConversionReport
from gam_flax.convert.source import open_source
from gam_flax.convert.yolo import is_yolo, prepared

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}


def convert_file(
    source: Any,
    destination: str | os.PathLike,
    *,
    variant: str | Mapping[str, str] | None = None,
    to: Literal["flax", "torch"] = "flax",
    dtype: str | None = None,
    yaml: Any = None,
    force: bool = False,
) -> ConversionReport:
    """Ports a checkpoint to a file: canonical names, and the layout of the framework it is for.

    The file's metadata keep what the weights cannot say: each block's variant, the norms' eps and
    momentum, and the constructor where it is known, so that `load` and `load_torch` do not ask
    again.

    Args:
        source: a path, a state_dict, a `Checkpoint` or a torch module; torch's layout or Flax's.
        destination: `.safetensors`; for torch also `.pt` or `.pth`, which hold
            {"state_dict": …, "gam_attention": metadata}.
        variant: what the weights cannot tell: one name, or kind → name.
        to: "flax" or "torch".
        dtype: of all floating-point tensors; None leaves each as it is, bit for bit.
        yaml: of a YOLOv5, where the file has none of its own, or one with attention that the
            weights have not: by its path, its name, or what it holds.
        force: replace a file that exists.

    Raises:
        CheckpointError: the source cannot be read, is ambiguous, or holds a look-alike of a GAM;
            the destination exists; a value does not fit the dtype.
    """
    suffix = Path(destination).suffix
    if suffix not in (".safetensors", *((".pt", ".pth") if to == "torch" else ())):
        kinds = ".safetensors, .pt or .pth" if to == "torch" else ".safetensors"
        raise CheckpointError(f"{shorten(destination)}: name it {kinds} for {to}")
    check_free(destination, force=force)
    checkpoint = open_source(source)
    where = checkpoint.path or "the source"
    notes: list[str] = []
    if yaml is not None or is_yolo(checkpoint):
        checkpoint, notes = prepared(checkpoint, yaml, variant)
    blocks = identify(checkpoint)
    for block in blocks:
        if block.refusal:
            raise CheckpointError(f"{where}: {block}")
    chosen = decide(blocks, variant, where)
    report = ConversionReport(source=checkpoint.path, variants=chosen, notes=notes)
    if not blocks:
        report.notes.append("no attention block found; the tensors were laid out by the leaf table")
    tensors = {
        key: _cast(key, array, dtype, report, where)
        for key, array in canonical_tensors(checkpoint, blocks).items()
    }
    metadata = {**_metadata(checkpoint, blocks, report.variants), "format": to}
    if to == "flax":
        tensors = _flax_layout(tensors, report, where)
    else:
        report.mapped = {key: key for key in tensors}
    write = write_safetensors if suffix == ".safetensors" else write_torch
    write(destination, tensors, metadata, force=force)
    return report


def _flax_layout(
    tensors: Mapping[str, np.ndarray], report: ConversionReport, where: str
) -> dict[str, np.ndarray]:
    laid_out: dict[str, np.ndarray] = {}
    for key, array in tensors.items():
        name = leaves.flax_name(key, array.ndim)
        if name in laid_out:
            raise CheckpointError(
                f"{where}: two keys become {shorten(name)}, {shorten(key)} is one"
            )
        laid_out[name] = leaves.to_flax_layout(name, array)
        report.mapped[key] = name
    return laid_out


def _cast(
    key: str, array: np.ndarray, dtype: str | None, report: ConversionReport, where: str
) -> np.ndarray:
    floating = array.dtype.kind == "f" or array.dtype.name.startswith(("bfloat", "float"))
    if floating and not np.isfinite(array).all():
        report.not_finite.append(key)
    if dtype is None or not floating or array.dtype == DTYPES[dtype]:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(DTYPES[dtype])
    if np.isinf(cast).sum() > np.isinf(array).sum():
        raise CheckpointError(f"{where}: {shorten(key)} holds values too large for {dtype}")
    report.cast[key] = (array.dtype.name, dtype)
    return cast


def _metadata(
    checkpoint: Checkpoint, blocks: list[Block], variants: Mapping[str, str]
) -> dict[str, str]:
    """What the weights cannot say; what the source's own metadata said stays."""
    of_the_file = ("format", "turned")  # what is written is laid out by the leaf table alone
    metadata = {k: value for k, value in checkpoint.metadata.items() if k not in of_the_file}
    said = {b.prefix: dict(b.behaviour(variants[b.prefix])) for b in blocks}
    metadata["behaviour"] = json.dumps(said)
    names = renames(blocks)
    norms = {names.get(path, path): norm for path, norm in checkpoint.norms.items()}
    if norms:
        metadata["norms"] = json.dumps(norms)
    if "build" not in metadata and len(blocks) == 1 and not blocks[0].prefix:
        block = blocks[0]
        arguments = {"name": block.kind, **block.arguments(variants[""])}
        metadata |= {"build": "create_attention", "arguments": json.dumps(arguments)}
    return metadata
