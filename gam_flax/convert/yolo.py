"""YOLOv5's checkpoints: what a pickled model says of itself, and what is done before it is ported.

its YAML, classes and eps → the constructor of `YOLOv5` in the metadata
convolutions with their norms folded in → a norm that changes nothing
weights without attention → moved to where a YAML with attention has these layers
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from gam_flax.convert.blocks import decide, identify
from gam_flax.convert.checkpoint import Checkpoint
from gam_flax.convert.errors import CheckpointError, shorten
from gam_flax.convert.yolo_told import BUILD, EPS, MOMENTUM

BOX = 5
"""Numbers of a box beside its classes."""


def is_yolo(checkpoint: Checkpoint) -> bool:
    """Whether the metadata say that this is a YOLOv5."""
    return checkpoint.metadata.get("build") == BUILD


def prepared(
    checkpoint: Checkpoint, config: Any = None, variant: str | Mapping[str, str] | None = None
) -> tuple[Checkpoint, list[str]]:
    """The checkpoint as the twins have it, its metadata whole; and what a report should say.

    Args:
        config: a YAML, by its path, its name or what it holds, instead of what the file says.
            Attention blocks in it that the weights have not are begun anew, from seed 0.
        variant: of the attention blocks, where their weights cannot tell.

    Raises:
        CheckpointError: the weights and the YAML do not go together; an ambiguous block.
    """
    from gam_flax.models.yolov5_config import read_config

    where = checkpoint.path or "the source"
    arguments = (
        json.loads(checkpoint.metadata.get("arguments", "{}")) if is_yolo(checkpoint) else {}
    )
    tensors, notes = _without_wrappers(checkpoint.tensors)
    try:
        read = read_config(config if config is not None else arguments.get("config", {}))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: its YAML: {shorten(error, 250)}") from error
    notes += _notices(read, where)
    _check_classes(read, tensors, checkpoint, where)
    eps = arguments.get("norm_eps", EPS)
    tensors = _unfolded(tensors, eps, notes)
    tensors = _moved(read, tensors, where, notes)
    usual = {"norm_eps": eps, "norm_momentum": arguments.get("norm_momentum", MOMENTUM)}
    bare = replace(checkpoint, tensors=tensors, metadata={**checkpoint.metadata, "build": BUILD})
    read = _with_options(read, bare, variant)
    told = {**bare.metadata, "arguments": json.dumps({"config": read, **usual})}
    return _begun(replace(bare, metadata=told), notes), notes


def _without_wrappers(tensors: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], list[str]]:
    """Under `model.0.…`, without what releases before 6 keep beside the anchors."""
    found, notes = dict(tensors), []
    while found and all(key.startswith("model.model.") for key in found):
        found = {key.removeprefix("model."): array for key, array in found.items()}
    grids = [key for key in found if key.endswith(".anchor_grid")]
    if grids:
        notes.append(f"{', '.join(grids)}: left out, it is the anchors times the strides")
    return {key: array for key, array in found.items() if key not in grids}, notes


def _detect(tensors: Mapping[str, np.ndarray]) -> int | None:
    """The index of Detect: of the layer that has anchors."""
    found = [re.fullmatch(r"model\.(\d+)\.anchors", key) for key in tensors]
    return next((int(match[1]) for match in found if match), None)


def _check_classes(
    read: dict[str, Any], tensors: Mapping[str, np.ndarray], checkpoint: Checkpoint, where: str
) -> None:
    """The number of classes is the weights', if it is one that the file's own names agree with."""
    detect = _detect(tensors)
    if detect is None:
        raise CheckpointError(f"{where}: no model.N.anchors in it, so not the weights of a YOLOv5")
    bias = tensors.get(f"model.{detect}.m.0.bias")
    count = len(read["anchors"][0]) // 2
    if bias is None or bias.size % count or bias.size // count <= BOX:
        size = "missing" if bias is None else f"{bias.size} numbers"
        raise CheckpointError(
            f"{where}: model.{detect}.m.0.bias is {size}, expected {count} anchors times "
            f"{BOX} + classes; say the right --yaml"
        )
    classes = bias.size // count - BOX
    names = json.loads(checkpoint.metadata.get("classes", "null"))
    if names is not None and len(names) != classes:
        raise CheckpointError(
            f"{where}: has {len(names)} names of classes, but weights for {classes}; it was put "
            "together from two models"
        )
    read["nc"] = classes


def _unfolded(
    tensors: dict[str, np.ndarray], eps: float, notes: list[str]
) -> dict[str, np.ndarray]:
    """A norm that changes nothing but by the bias, where a convolution has one instead of it."""
    found: dict[str, np.ndarray] = {}
    count = 0
    for key, array in tensors.items():
        path = key.removesuffix(".conv.bias")
        if path == key or f"{path}.bn.weight" in tensors:
            found[key] = array
            continue
        count += 1
        found[f"{path}.bn.weight"] = np.ones_like(array)
        found[f"{path}.bn.bias"] = array
        found[f"{path}.bn.running_mean"] = np.zeros_like(array)
        found[f"{path}.bn.running_var"] = np.full(array.shape, 1 - eps)  # float64, to be exact
        found[f"{path}.bn.num_batches_tracked"] = np.zeros((), np.int64)
    if count:
        notes.append(f"{count} convolutions had their norms folded in; norms that change nothing")
    return found


def moves(config: Mapping[str, Any], tensors: Mapping[str, Any]) -> dict[str, str]:
    """model.i of weights without attention → model.j of `config`, where the two differ.

    {} where the weights have as many layers as the configuration.
    """
    from gam_flax.models.yolov5_config import is_attention, lines_of

    lines = lines_of(config)
    plain = [j for j, line in enumerate(lines) if not is_attention(line)]
    if _detect(tensors) != len(plain) - 1 or len(plain) == len(lines):
        return {}
    return {f"model.{i}": f"model.{j}" for i, j in enumerate(plain) if i != j}


def _moved(
    read: dict[str, Any], tensors: dict[str, np.ndarray], where: str, notes: list[str]
) -> dict[str, np.ndarray]:
    from gam_flax.convert.rename import renamed
    from gam_flax.models.yolov5_config import lines_of

    last, detect = len(lines_of(read)) - 1, _detect(tensors)
    names = moves(read, tensors)
    if detect != last and not names:
        raise CheckpointError(
            f"{where}: its last layer is model.{detect}, in the YAML it is {last}, or "
            "less where attention is new; say the right --yaml"
        )
    if names:
        said = ", ".join(f"{old} → {new}" for old, new in names.items())
        notes.append(f"moved, for attention is new: {said}")
    return {renamed(key, names): array for key, array in tensors.items()}


def _notices(read: dict[str, Any], where: str) -> list[str]:
    from gam_flax.models.yolov5_config import plan

    try:
        return list(plan(read).notices)
    except ValueError as error:
        raise CheckpointError(f"{where}: its YAML: {shorten(error, 250)}") from error


def _with_options(
    read: dict[str, Any], checkpoint: Checkpoint, variant: str | Mapping[str, str] | None
) -> dict[str, Any]:
    """The YAML with what is settled of each attention block at the end of its line."""
    from gam_flax.models.yolov5_config import lines_of

    blocks = [block for block in identify(checkpoint) if not block.refusal]
    variants = decide(blocks, variant, checkpoint.path or "the source")
    for block in blocks:
        index = block.prefix.removeprefix("model.")
        if not index.isdigit() or int(index) >= len(lines_of(read)):
            continue
        options = block.arguments(variants[block.prefix])
        line = lines_of(read)[int(index)]
        norms = ("channels", "norm_eps", "norm_momentum")
        line[3] = [block.channels, {k: v for k, v in options.items() if k not in norms}]
    return read


def _begun(checkpoint: Checkpoint, notes: list[str]) -> Checkpoint:
    """With the attention blocks that the YAML has and the weights have not, from seed 0."""
    from gam_flax.models.yolov5_config import is_attention, lines_of

    arguments = json.loads(checkpoint.metadata["arguments"])
    places = [
        f"model.{i}" for i, line in enumerate(lines_of(arguments["config"])) if is_attention(line)
    ]
    new = [p for p in places if not any(k.startswith(f"{p}.") for k in checkpoint.tensors)]
    if not new:
        return checkpoint
    from flax import nnx

    from gam_flax.convert.flax_paths import nnx_modules
    from gam_flax.convert.saved import to_torch
    from gam_flax.convert.source import told_by_attributes
    from gam_flax.models.yolov5 import YOLOv5

    model = YOLOv5(rngs=nnx.Rngs(0), **arguments)
    begun = {
        key: array
        for key, array in to_torch(model).items()
        if key.startswith(tuple(f"{place}." for place in new))
    }
    modules = nnx_modules(model)
    said = {place: told[1] for place in new if (told := told_by_attributes(modules[place]))}
    known = json.loads(checkpoint.metadata.get("behaviour", "{}"))
    notes.append(f"begun anew, from seed 0: {', '.join(new)}")
    return replace(
        checkpoint,
        tensors={**checkpoint.tensors, **begun},
        metadata={**checkpoint.metadata, "behaviour": json.dumps({**known, **said})},
    )
