"""`gam-flax detect`, and the detector under it: photographs in, boxes out, the twins alike."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image
from typer.testing import CliRunner

import gam_flax
import gam_torch
from gam_flax.cli import app
from gam_flax.convert import load_torch, save
from gam_flax.detection import Detector, letterbox, non_maximum_suppression
from gam_torch.detection import non_maximum_suppression as suppression_in_torch
from tests.models.small_yolov5 import SMALL

data = pytest.importorskip("skimage.data")
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea")
CLASSES = json.dumps(["cat", "dog", "bird"])


def lively(model: torch.nn.Module) -> torch.nn.Module:
    """Random weights under which a few hundred boxes of a photograph score above 0.25."""
    torch.manual_seed(0)
    for layer in model.detect.m:
        layer.weight.data *= 3
        layer.bias.data.normal_(0, 1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.7, 1.6)
            module.bias.data.normal_(0, 0.3)
    return model.eval()


@pytest.mark.parametrize("name", ["small", pytest.param("yolov5n", marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [{}, {"multi_label": True}, {"agnostic": True}])
def test_the_same_boxes_on_photographs(name, options):
    """float64, GAM before SPPF: the same boxes kept, in the same order, to 1e-12."""
    config, side = (SMALL, 96) if name == "small" else (name, 320)
    theirs = lively(gam_torch.YOLOv5(config, num_classes=3, attention="gam").double())
    with jax.enable_x64(True):
        ours = gam_flax.YOLOv5(
            config, num_classes=3, attention="gam", param_dtype=jnp.float64, rngs=nnx.Rngs(0)
        )
        load_torch(ours, theirs)
        ours.eval()
        for photograph in PHOTOGRAPHS:
            x = letterbox(getattr(data, photograph)(), side, stride=32).image.astype(np.float64)
            found = non_maximum_suppression(ours.decode(ours(jnp.asarray(x[None]))), **options)
            with torch.no_grad():
                y = theirs.decode(theirs(torch.tensor(x[None]).permute(0, 3, 1, 2)))
            expected = suppression_in_torch(y, **options)
            count = int(found.count[0])
            assert 5 < count == int(expected.count[0])
            assert np.array_equal(found.classes, expected.classes)
            assert np.abs(found.boxes - expected.boxes.numpy()).max() <= 1e-12 * 2 * side
            assert np.abs(found.scores - expected.scores.numpy()).max() <= 1e-12


def small(dtype: type = jnp.float32) -> gam_flax.YOLOv5:
    model = gam_flax.YOLOv5(SMALL, attention="gam", param_dtype=dtype, rngs=nnx.Rngs(0))
    load_torch(model, lively(gam_torch.YOLOv5(SMALL, attention="gam")))
    return model


@jax.enable_x64(True)  # in float32 scores that are equal but for rounding change places
def test_a_detector_compiles_once_a_size_and_batches_change_nothing():
    pictures = [getattr(data, name)() for name in PHOTOGRAPHS]
    pictures += [pictures[0][::-1], pictures[1][:, ::-1]]
    model = small(jnp.float64)
    options = {"side": 96, "max_boxes": 20}
    together, alone = Detector(model, batch_size=3, **options), Detector(model, **options)
    found = together(pictures)
    assert together.sizes == {(96, 96), (64, 96)}
    assert together._answer._cache_size() == 2
    together(pictures)
    assert together._answer._cache_size() == 2
    for one, picture in zip(found, pictures, strict=True):
        same = alone([picture])[0]
        assert len(one.scores) == len(same.scores) > 0
        assert np.allclose(one.boxes, same.boxes, atol=1e-3)
        assert one.boxes.min() >= 0 and one.boxes[:, 2].max() <= picture.shape[1]


def test_a_box_is_where_the_thing_is():
    """What a model says in its frame comes back in the photograph's pixels."""

    class Fixed(nnx.Module):
        strides = (8, 32)

        def __call__(self, x):
            return x

        def decode(self, x):
            """One box, 20 × 10 pixels around (48, 48) of the frame."""
            box = jnp.array([[48.0, 48, 20, 10, 1, 0.9]])
            return jnp.broadcast_to(box, (x.shape[0], 1, 6))

    picture = np.zeros((200, 400, 3), np.uint8)  # half as high as wide: 96 × 48 in 96 × 64
    found = Detector(Fixed(), side=96)([picture])[0]
    scale = 96 / 400
    middle = (48 / scale, (48 - 8) / scale)
    expected = [middle[0] - 10 / scale, middle[1] - 5 / scale]
    expected += [middle[0] + 10 / scale, middle[1] + 5 / scale]
    assert np.allclose(found.boxes, [expected]) and np.allclose(found.scores, 0.9)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detect")
    save(small(), folder / "m.safetensors", about={"classes": CLASSES, "side": "96"})
    (folder / "photographs").mkdir()
    for name in PHOTOGRAPHS[:2]:
        Image.fromarray(getattr(data, name)()).save(folder / "photographs" / f"{name}.png")
    return folder


def call(place, *words, checkpoint="m.safetensors", out="out"):
    words = [str(word) for word in words]
    return CliRunner().invoke(
        app,
        ["detect", *words, "--checkpoint", str(place / checkpoint), "--out", str(place / out)],
        catch_exceptions=True,
    )


def test_the_command(place):
    result = call(place, place / "photographs", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads((place / "out" / "detections.json").read_text())
    assert [line["size"] for line in said] == [[512, 512], [600, 400]]
    for line in said:
        drawn = np.asarray(Image.open(line["drawn"]))
        own = np.asarray(Image.open(line["image"]))
        assert drawn.shape == own.shape and not np.array_equal(drawn, own)
        assert line["boxes"] and {box["class"] for box in line["boxes"]} <= {"cat", "dog", "bird"}
        assert all(0 <= x <= 600 for box in line["boxes"] for x in box["box"])
    again = call(place, place / "photographs")
    assert again.exit_code != 0 and "--force" in str(again.exception)
    assert call(place, place / "photographs", "--force").exit_code == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["none.png"], "none.png: not a readable picture"),
        (["empty"], "has no pictures in it"),
        (["broken.png"], "broken.png: not a readable picture"),
        (["photographs", "--side", "100"], "side 100: must be a multiple of 8"),
    ],
)
def test_one_line_for_what_cannot_be(place, words, expected):
    (place / "empty").mkdir(exist_ok=True)
    (place / "broken.png").write_bytes(b"no picture")
    result = call(place, place / words[0], *words[1:], out="other")
    assert result.exit_code != 0
    assert expected in str(result.exception) and "\n" not in str(result.exception)
    assert not (place / "other" / "detections.json").exists()


def test_a_network_that_finds_no_boxes(place):
    model = gam_flax.create_model("resnet8", num_classes=3, rngs=nnx.Rngs(0))
    save(model, place / "r.safetensors", force=True)
    result = call(place, place / "photographs", checkpoint="r.safetensors", out="other")
    assert "a ResNet finds no boxes: it is no detector" in str(result.exception)
