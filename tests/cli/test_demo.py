"""The demo, and the classifier that ships."""

from __future__ import annotations

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from gam_flax import demo
from gam_flax.convert import CheckpointError
from tests.paths import ROOT


def test_the_shipped_classifier():
    checkpoint, images, labels = demo.shipped()
    assert (ROOT / "gam_flax" / "assets" / "fashion_gam.pt").stat().st_size <= 1.5e6
    assert float(checkpoint.metadata["test_accuracy"]) >= 0.92
    assert images.shape == (200, 28, 28)
    assert set(labels) == set(range(10))
    torch_model, flax_model, report = demo.twins(checkpoint)
    assert report.ok
    about = checkpoint.metadata
    x = (images[..., None].astype(np.float32) / 255 - float(about["mean"])) / float(about["std"])
    logits = np.asarray(flax_model(jnp.asarray(x)))
    assert np.mean(logits.argmax(1) == labels) >= 0.9
    import torch

    expected = torch_model(torch.from_numpy(x.transpose(0, 3, 1, 2))).detach().numpy()
    assert (expected.argmax(1) == logits.argmax(1)).all()


def test_the_demo(tmp_path):
    text = io.StringIO()
    demo.run_demo(Console(file=text, width=120), tmp_path / "out", force=False)
    said = text.getvalue()
    for word in ("attention1", "110 of 110 tensors", "accuracy", "compilation", "float64", "PNG"):
        assert word.lower() in said.lower()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {f"attention_{name}.png" for name in ("trouser", "sandal", "boot")}
    picture = (tmp_path / "out" / "attention_boot.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 20_000
    with pytest.raises(CheckpointError, match="--force"):
        demo.run_demo(Console(file=text), tmp_path / "out", force=False)


def test_the_classes_are_named():
    checkpoint, _, labels = demo.shipped()
    assert len(json.loads(checkpoint.metadata["classes"])) == len(set(labels))
