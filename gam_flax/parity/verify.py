"""A checkpoint's blocks, or its whole network, built in both frameworks and compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from gam_flax.convert.blocks import Block, alone, canonical_tensors, decide, identify
from gam_flax.convert.checkpoint import Checkpoint
from gam_flax.convert.errors import CheckpointError, shorten
from gam_flax.convert.into_flax import load_torch
from gam_flax.convert.saved import build

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
    blocks = identify(checkpoint)
    variants = decide(blocks, variant, checkpoint.path)
    made = checkpoint.metadata if name is None else _constructor(checkpoint, name, blocks, variants)
    tensors = canonical_tensors(checkpoint, blocks)
    if "conv1.weight" not in tensors:
        raise CheckpointError(f"{checkpoint.path}: no conv1.weight; it is not a {name}")
    side = 64 if tensors["conv1.weight"].shape[-1] == 7 else 32
    shape = (2, side, side, tensors["conv1.weight"].shape[1])
    said = {b.prefix: dict(b.behaviour(variants[b.prefix])) for b in blocks if not b.refusal}
    whole = replace(checkpoint, tensors=tensors, metadata={"behaviour": json.dumps(said)}, norms={})
    return {name or "the network": _compare_twins(made, whole, shape)}


def _constructor(
    checkpoint: Checkpoint, name: str, blocks: list[Block], variants: Mapping[str, str]
) -> dict[str, str]:
    """What builds a network of this name around the blocks that the file holds."""
    from gam_flax.models.registry import list_models

    if name not in list_models():
        raise CheckpointError(f"--model {shorten(name)}: must be one of {', '.join(list_models())}")
    tensors = checkpoint.tensors
    for key in ("fc.weight", "conv1.weight"):
        if key not in tensors:
            raise CheckpointError(f"{checkpoint.path}: no {key}; it is not a {name} of ours")
    arguments: dict[str, Any] = {
        "name": name,
        "num_classes": tensors["fc.weight"].shape[0],
        "in_channels": tensors["conv1.weight"].shape[1],
    }
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
    made: Mapping[str, str], checkpoint: Checkpoint, shape: tuple[int, ...]
) -> ParityReport:
    """Both twins, filled from `checkpoint`, on random input of `shape`."""
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
    inputs = np.random.default_rng(0).standard_normal(shape)
    return compare(torch_model, flax_model, inputs)
