"""Real weights and real photographs; a test that asks for one is skipped where it is absent."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from gam_flax import preprocess_imagenet
from tests.paths import DATA

MOBILENET = "mobilenet_v2-b0353104.pth"
RESNET20 = "resnet20-12fca82f.th"
CLASSES = {"chelsea": 285, "coffee": 967, "camera": 872, "stereo_motorcycle": 665}
"""Photograph of scikit-image → its class: Egyptian cat, espresso, tripod, moped."""


def checkpoint(name: str) -> Path:
    path = DATA / name
    if not path.exists():
        pytest.skip("the folder with other people's checkpoints is not here")
    return path


@cache
def _photographs() -> dict[str, np.ndarray]:
    from skimage import data

    found = {name: getattr(data, name)() for name in CLASSES}
    return {name: p[0] if isinstance(p, tuple) else p for name, p in found.items()}


def photographs() -> dict[str, np.ndarray]:
    """uint8, (H, W) or (H, W, 3), by name."""
    if find_spec("skimage") is None:
        pytest.skip("scikit-image, whose photographs these are, is not installed")
    return _photographs()


def batch(**sizes: int) -> np.ndarray:
    """The photographs as a network wants them: (4, 224, 224, 3), float32."""
    return np.stack([preprocess_imagenet(picture, **sizes) for picture in photographs().values()])
