"""What a pickled YOLOv5 says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gam_flax.convert.errors import CheckpointError, shorten

BUILD = "YOLOv5"

EPS, MOMENTUM = 1e-3, 0.03
"""Of every norm in a YOLOv5, where the file does not say it."""


def told_by_module(module: Mapping[str, Any], norms: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a pickled YOLOv5: "build", "arguments", "classes"; {} for another module.

    Args:
        module: the attributes of the pickled object.
        norms: the settings of its norms, by path.
    """
    config = module.get("yaml")
    if not isinstance(config, dict) or not {"backbone", "head"} <= config.keys():
        return {}
    eps = next((norm["eps"] for norm in norms.values()), EPS)
    momentum = next((norm["momentum"] for norm in norms.values()), MOMENTUM)
    known = ("nc", "depth_multiple", "width_multiple", "anchors", "backbone", "head")
    arguments = {
        "config": {name: config[name] for name in known if name in config},
        "norm_eps": eps,
        "norm_momentum": momentum,
    }
    try:
        told = {"build": BUILD, "arguments": json.dumps(arguments)}
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"its yaml is no plain data: {shorten(error, 120)}") from error
    names = _names(module.get("names"))
    return {**told, "classes": json.dumps(names)} if names else told


def _names(names: Any) -> list[str]:
    if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
        names = [names[i] for i in range(len(names))]
    return [str(name) for name in names] if isinstance(names, list) else []
