"""Host networks by name."""

from __future__ import annotations

from typing import Any

from flax import nnx

from gam_flax.attention.common import check_choice
from gam_flax.models.common import Attention
from gam_flax.models.resnet import ResNet

_CIFAR = {"widths": (16, 32, 64), "stem": "cifar"}

MODELS: dict[str, dict[str, Any]] = {
    "resnet8": {"layers": (1, 1, 1), **_CIFAR},
    "resnet14": {"layers": (2, 2, 2), **_CIFAR},
    "resnet20": {"layers": (3, 3, 3), "shortcut": "pad", **_CIFAR},
    "resnet18": {"layers": (2, 2, 2, 2)},
    "resnet34": {"layers": (3, 4, 6, 3)},
    "resnet50": {"layers": (3, 4, 6, 3), "block": "bottleneck"},
    "resnet101": {"layers": (3, 4, 23, 3), "block": "bottleneck"},
}


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return sorted(MODELS)


def create_model(
    name: str, *, attention: Attention = None, num_classes: int = 1000, **kwargs: Any
) -> nnx.Module:
    """Builds a network by name.

    Args:
        name: one of `list_models()`.
        attention: a name of `list_attentions()`, a factory called with the channels, or None.
        num_classes: outputs of the last layer.
        **kwargs: the network's own arguments, see its class.

    Raises:
        ValueError: an unknown name, or what the network itself raises.
    """
    check_choice("name", name, list_models())
    options = {**MODELS[name], **kwargs}
    return ResNet(attention=attention, num_classes=num_classes, **options)
