"""The network of a run: built by name, perhaps with weights from a file in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gam_flax.attention.registry import list_attentions
from gam_flax.convert.blocks import identify
from gam_flax.convert.errors import shorten
from gam_flax.convert.into_flax import load_torch
from gam_flax.convert.source import open_source
from gam_flax.models.registry import MODELS, create_model, list_models
from gam_flax.models.resnet import ResNet
from gam_flax.models.yolov5 import YOLOv5
from gam_flax.train.data import Data
from gam_flax.train.errors import TrainingError
from gam_flax.train.settings import Settings
from gam_flax.train.step import wide_type
from gam_flax.train.yolo_folder import LabelledData

SMALL = 64
"""A ResNet of pictures up to this side, in pixels, has the CIFAR stem."""


def build_network(settings: Settings, data: Data, say: Callable[[str], None]) -> nnx.Module:
    """The network that `settings` name, for `data`, in training mode.

    Args:
        say: is given a line on what came out of `settings.init`.

    Raises:
        TrainingError: no such network or block, or the network refuses its options.
        CheckpointError: `settings.init` cannot be read, or is of another network.
    """
    yaml = Path(settings.model).suffix in (".yaml", ".yml")
    for name, value, known in (
        ("model", "yolov5n" if yaml else settings.model, list_models()),
        ("attention", settings.attention, [None, *list_attentions()]),
    ):
        if value not in known:
            names = ", ".join(filter(None, known))
            raise TrainingError(f"{name} {shorten(value)}: must be one of {names}")
    if settings.dtype == "float64" and not jax.config.read("jax_enable_x64"):
        raise TrainingError("dtype float64: say JAX_ENABLE_X64=1 in the environment")
    chosen = {"config": settings.model} if yaml else _stem(settings.model, data.side)
    try:
        model = create_model(
            "yolov5n" if yaml else settings.model,
            attention=settings.attention,
            num_classes=len(data.classes),
            in_channels=data.channels,
            remat=settings.remat,
            dtype=None if settings.dtype == "float32" else jnp.dtype(settings.dtype),
            param_dtype=wide_type(settings.dtype),
            rngs=nnx.Rngs(settings.seed),
            **{**chosen, **settings.model_options},
        )
    except (TypeError, ValueError) as error:
        raise TrainingError(f"model {settings.model}: {shorten(error, 200)}") from error
    if isinstance(data, LabelledData) != isinstance(model, YOLOv5):
        wanted = "a detector, such as yolov5n" if isinstance(data, LabelledData) else "a classifier"
        raise TrainingError(f"model {settings.model}: data {settings.data} wants {wanted}")
    if settings.init is not None:
        _fill(model, settings, say)
    return model


def _stem(name: str, side: int) -> dict[str, Any]:
    make, preset = MODELS[name]
    return {"stem": "cifar"} if make is ResNet and "stem" not in preset and side <= SMALL else {}


def _head(model: nnx.Module) -> str:
    """The path of the layer that knows the classes."""
    if isinstance(model, YOLOv5):
        return f"model.{len(model.model) - 1}"
    return "fc" if isinstance(model, ResNet) else "classifier"


def _fill(model: nnx.Module, settings: Settings, say: Callable[[str], None]) -> None:
    source = open_source(settings.init)
    keep = settings.fresh
    if settings.init_step is not None:
        keep = ()
    elif keep is None:
        head = _head(model)
        keep = (head,) if identify(source) else (head, "attention")
    report = load_torch(model, source, variant=settings.variant, keep=keep)
    fresh = ", ".join(keep) or "nothing"
    say(f"{shorten(settings.init)}: {len(report.mapped)} tensors loaded; new: {fresh}")
