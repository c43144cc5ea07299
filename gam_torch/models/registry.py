"""Host networks by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from gam_torch.attention.common import check_choice
from gam_torch.models.common import Attention
from gam_torch.models.mobilenet_v2 import MobileNetV2
from gam_torch.models.resnet import ResNet
from gam_torch.models.yolov5 import YOLOv5
from gam_torch.models.yolov5_config import YOLOV5_MULTIPLES

_CIFAR = {"widths": (16, 32, 64), "stem": "cifar"}
_CIFAR_PAD = {"shortcut": "pad", **_CIFAR}
_GROUPED = {"variant": "paper", "groups": 4, "shuffle": "gate"}

MODELS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "mobilenet_v2": (MobileNetV2, {}),
    "resnet8": (ResNet, {"layers": (1, 1, 1), **_CIFAR}),
    "resnet14": (ResNet, {"layers": (2, 2, 2), **_CIFAR}),
    "resnet20": (ResNet, {"layers": (3, 3, 3), **_CIFAR_PAD}),
    "resnet32": (ResNet, {"layers": (5, 5, 5), **_CIFAR_PAD}),
    "resnet44": (ResNet, {"layers": (7, 7, 7), **_CIFAR_PAD}),
    "resnet56": (ResNet, {"layers": (9, 9, 9), **_CIFAR_PAD}),
    "resnet18": (ResNet, {"layers": (2, 2, 2, 2)}),
    "resnet34": (ResNet, {"layers": (3, 4, 6, 3)}),
    "resnet50": (ResNet, {"layers": (3, 4, 6, 3), "block": "bottleneck"}),
    "resnet101": (ResNet, {"layers": (3, 4, 23, 3), "block": "bottleneck"}),
    "resnet50_gam_grouped": (
        ResNet,
        {
            "layers": (3, 4, 6, 3),
            "block": "bottleneck",
            "attention": "gam",
            "attention_options": _GROUPED,
        },
    ),
    **{name: (YOLOv5, {"config": name}) for name in YOLOV5_MULTIPLES},
}
"""Name → class and the arguments that make it. The paper's ImageNet ResNet-50 has grouped
convolutions and a channel shuffle in its GAM; it does not say how many groups, code has four."""


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return sorted(MODELS)


def create_model(
    name: str, *, attention: Attention = None, num_classes: int | None = None, **kwargs: Any
) -> nn.Module:
    """Builds a network by name.

    Args:
        name: one of `list_models()`.
        attention: a name of `list_attentions()`, a factory called with the channels, or None for
            what the name says.
        num_classes: outputs of the last layer, or classes of a detector; None for the network's
            own: 1000, YOLOv5's 80.
        **kwargs: the network's own arguments, see its class.

    Raises:
        ValueError: an unknown name, or what the network itself raises.
    """
    check_choice("name", name, list_models())
    make, preset = MODELS[name]
    chosen = {"attention": attention, "num_classes": num_classes}
    chosen = {argument: value for argument, value in chosen.items() if value is not None}
    return make(**{**preset, **chosen, **kwargs})
