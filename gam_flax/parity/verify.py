"""A checkpoint's blocks, or its whole network, built in both frameworks and compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gam_flax.convert import leaves
from gam_flax.convert.blocks import Block, alone, canonical_tensors, decide, identify
from gam_flax.convert.checkpoint import Checkpoint
from gam_flax.convert.errors import CheckpointError, shorten
from gam_flax.convert.into_flax import load_torch
from gam_flax.convert.rename import aliases, renamed
from gam_flax.convert.saved import build
from gam_flax.convert.yolo import is_yolo, prepared

if TYPE_CHECKING:
    from gam_flax.parity.report import ParityReport

Variant = str | Mapping[str, str] | None


def verify_blocks(
    checkpoint: Checkpoint, blocks: list[Block], variant: Variant
) -> dict[str, ParityReport]:
    """Each block as its PyTorch and its Flax twin, compared on random input in float64."""
    variants = decide(blocks, variant, checkpoint.path)
    reports = {}
    for block in blocks:
        arguments = {"name": block.kind, **block.arguments(variants[block.prefix])}
        made = {"build": "create_attention", "arguments": json.dumps(arguments)}
        own = alone(checkpoint, block, variants[block.prefix])
        name = f"{shorten(block.prefix) or 'the block'} as {variants[block.prefix]}"
        shape = (2, 12, 11, block.channels)
        reports[name] = _compare_twins(made, own, shape)
    return reports


def verify_model(
    checkpoint: Checkpoint, name: str | None, variant: Variant
) -> dict[str, ParityReport]:
    """The whole network in both frameworks, compared on random input in float64.

    Args:
        name: one of `list_models()`; its classes, its input channels and the place and kind of
            its attention are read from the weights. None where the file names its constructor.
    """
    if name is None and is_yolo(checkpoint):
        checkpoint, _ = prepared(checkpoint, variant=variant)
    blocks = identify(checkpoint)
    variants = decide(blocks, variant, checkpoint.path)
    tensors = canonical_tensors(checkpoint, blocks)
    made = checkpoint.metadata
    if name is not None:
        template = _plain_twin(name)
        tensors = _with_names_of(template, tensors)
        made = _constructor(template, name, tensors, blocks, variants, checkpoint.path)
    said = {b.prefix: dict(b.behaviour(variants[b.prefix])) for b in blocks if not b.refusal}
    whole = replace(checkpoint, tensors=tensors, metadata={"behaviour": json.dumps(said)}, norms={})
    return {name or "the network": _compare_twins(made, whole)}


def _plain_twin(name: str) -> Any:
    """The torch network of this name without attention, shapes alone."""
    import torch

    import gam_torch

    if name not in gam_torch.list_models():
        names = ", ".join(gam_torch.list_models())
        raise CheckpointError(f"--model {shorten(name)}: must be one of {names}")
    with torch.device("meta"):
        return gam_torch.create_model(name)


def _with_names_of(template: Any, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors under the network's names, where others circulate for it."""
    paths, ours = (
        dict.fromkeys(leaves.split(key)[0] for key in keys)
        for keys in (tensors, template.state_dict())
    )
    known = aliases(paths, ours)
    return {
        leaves.join(renamed(path, known), leaf): array
        for (path, leaf), array in ((leaves.split(key), tensors[key]) for key in tensors)
    }


def _constructor(
    template: Any,
    name: str,
    tensors: Mapping[str, np.ndarray],
    blocks: list[Block],
    variants: Mapping[str, str],
    where: str,
) -> dict[str, str]:
    """What builds a network of this name around the blocks that the file holds."""
    kernels = [key for key, tensor in template.state_dict().items() if tensor.ndim >= 2]
    first, last = kernels[0], kernels[-1]
    for key in (first, last):
        if key not in tensors:
            raise CheckpointError(f"{where}: no {key}; it is not a {name} of ours")
    arguments: dict[str, Any] = {
        "name": name,
        "num_classes": tensors[last].shape[0],
        "in_channels": tensors[first].shape[1],
    }
    if hasattr(template, "stem"):
        arguments["stem"] = "cifar" if tensors[first].shape[-1] == 3 else "imagenet"
    if blocks:
        options = blocks[0].arguments(variants[blocks[0].prefix])
        options.pop("channels")
        after = [b.prefix.removeprefix("attention") for b in blocks]
        stages = [int(stage) for stage in after if stage.isdigit()]
        arguments |= {
            "attention": blocks[0].kind,
            "attention_options": options,
            "attention_at": stages or "blocks",
        }
    return {"build": "create_model", "arguments": json.dumps(arguments)}


def _compare_twins(
    made: Mapping[str, str], checkpoint: Checkpoint, shape: tuple[int, ...] | None = None
) -> ParityReport:
    """Both twins, filled from `checkpoint`, on random input of `shape`; None for a picture that
    leaves the network's last stage two pixels a side."""
    import gam_flax
    import gam_torch
    from gam_flax.convert.files import to_torch_tensor
    from gam_flax.parity.comparison import compare

    where, tensors = checkpoint.path, checkpoint.tensors
    torch_model, flax_model = build(gam_torch, made, where), build(gam_flax, made, where)
    load_torch(flax_model, checkpoint)
    state = {key: to_torch_tensor(array) for key, array in tensors.items()}
    missing, unexpected = torch_model.load_state_dict(state, strict=False)
    wrong = [*unexpected, *(key for key in missing if not key.endswith("num_batches_tracked"))]
    if wrong:
        raise CheckpointError(f"{where}: {shorten(wrong[0])} has no partner in the torch twin")
    if shape is None:
        stages = getattr(torch_model, "stages", None)
        side = max(32, 2 * stages[-1].stride) if stages else 2 * max(torch_model.strides)
        shape = (2, side, side, torch_model.in_channels)
    inputs = np.random.default_rng(0).standard_normal(shape)
    return compare(torch_model, flax_model, inputs)
