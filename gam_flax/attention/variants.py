"""The documented variants of each block: the constructor arguments that make it. Plain data."""

from __future__ import annotations

from typing import Any

GAM_VARIANTS: dict[str, dict[str, Any]] = {
    "reference": {},
    "gated": {"channel_gate": "sigmoid"},
    "grouped": {"groups": 4, "shuffle": "gate"},
    "replicate": {"padding_mode": "replicate"},
    "shuffled": {"channel_gate": "sigmoid", "shuffle": "features"},
    "paper": {"channel_gate": "sigmoid", "ratio": 16},
}

CBAM_VARIANTS: dict[str, dict[str, Any]] = {
    "reference": {},
    "timm": {
        "projection": "conv",
        "use_bias": False,
        "concat": "mean_max",
        "norm_momentum": 0.1,
    },
    "plain": {
        "projection": "conv",
        "use_bias": False,
        "concat": "mean_max",
        "spatial_norm": False,
    },
    "prose": {"spatial_norm": False, "spatial_bias": True},
}

SE_VARIANTS: dict[str, dict[str, Any]] = {
    "reference": {},
    "torchvision": {"projection": "conv", "use_bias": True},
    "mobilenet_v3": {"projection": "conv", "use_bias": True, "gate": "hard_sigmoid"},
}

BAM_VARIANTS: dict[str, dict[str, Any]] = {
    "reference": {},
    "paper": {"combine": "sum"},
}
