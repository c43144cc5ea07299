"""The figure of a photograph, and the command that draws it."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from flax import nnx
from PIL import Image

import gam_flax
from gam_flax import cli
from gam_flax.convert import CheckpointError, picture_settings, save
from gam_flax.maps import draw_attention_maps
from gam_flax.maps.figure import NARROWEST, draw
from gam_flax.maps.photograph import look

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 60, 3)).astype(np.uint8)
NORMAL = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
CLASSES = ["cat", "dog", "a name of a class that is much longer than there is room for in a figure"]


def network(attention="gam", **options):
    return gam_flax.create_model(
        "resnet8",
        layers=(1, 1),
        widths=(8, 8),
        attention=attention,
        attention_options={"ratio": 2},
        num_classes=3,
        rngs=nnx.Rngs(0),
        **options,
    )


def looked(model, **options):
    options = {"side": None, "classes": CLASSES, "blocks": "last", **NORMAL, **options}
    return look(model, PIXELS, **options)


@pytest.fixture
def files(tmp_path):
    """A checkpoint that knows its classes, and a photograph."""
    about = {"mean": "[0.5, 0.5, 0.5]", "std": "[0.5, 0.5, 0.5]", "classes": json.dumps(CLASSES)}
    save(network(), tmp_path / "net.safetensors", about=about)
    Image.fromarray(PIXELS).save(tmp_path / "photo.jpg")
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["gam-flax", "maps", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        said = capsys.readouterr()
        return stop.value.code, said.out, said.err

    return call


@pytest.mark.parametrize("attention", ["gam", "cbam", "se", "bam"])
def test_all_words_are_inside_of_the_figure(attention):
    figure = draw(looked(network(attention)))
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    texts = [text for text in figure.findobj(lambda a: hasattr(a, "get_text")) if text.get_text()]
    assert any("layer2.0.attention" in text.get_text() for text in texts)
    for text in texts:
        box = text.get_window_extent()
        if text.get_visible() and box.width and (text.axes is None or text.axes.axison):
            inside = box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1
            assert inside, text


def test_gates_that_hardly_differ_have_no_contrast():
    """Those of a fresh network lie about 1/2; the scale spans more than they do."""
    from gam_flax.maps.figure import _gate_scale

    scale = _gate_scale(looked(network("cbam", identity_start=True)).maps)
    assert scale.vmax - scale.vmin == pytest.approx(NARROWEST)
    assert scale.vmin >= 0 and scale.vmax <= 1


def test_what_the_network_saw():
    seen = looked(network())
    assert seen.pixels.shape == (32, 32, 3)  # a CIFAR network's side
    assert looked(network(), side=14).pixels.shape == (14, 14, 3)
    small = look(network(in_channels=1), PIXELS[:28, :28, 0], side=None, mean=[0.5], std=[0.5],
                 classes=None, blocks="last")  # fmt: skip
    np.testing.assert_array_equal(small.pixels[..., 0], PIXELS[:28, :28, 0])
    assert [name for name, _ in small.likeliest(9)][0].startswith("class ")
    assert sum(p for _, p in seen.likeliest(3)) == pytest.approx(1)


def test_what_a_file_knows_of_its_pictures():
    told = {"mean": "0.5", "std": "[0.1, 0.2, 0.3]", "classes": '["a", "b"]', "side": "28"}
    expected = {"mean": [0.5], "std": [0.1, 0.2, 0.3], "classes": ["a", "b"], "side": 28}
    assert picture_settings(told, "net") == expected
    assert picture_settings({}, "net") == {}
    for wrong in ({"mean": "half"}, {"classes": "[1, 2]"}, {"side": "28.5"}, {"std": "[]"}):
        with pytest.raises(CheckpointError, match=f"net: its metadata entry '{next(iter(wrong))}'"):
            picture_settings(wrong, "net")


def test_a_network_without_classes():
    model = gam_flax.GAM(3, ratio=1, rngs=nnx.Rngs(0))
    seen = looked(model, classes=None, side=16)
    assert seen.probabilities is None and seen.likeliest(5) == []
    draw(seen)


def test_channels_and_classes_must_fit():
    with pytest.raises(ValueError, match="sees 1 channels, mean has 3 and std 3"):
        looked(network(in_channels=1))
    with pytest.raises(ValueError, match="2 names of classes for 3 outputs"):
        looked(network(), classes=["cat", "dog"])


def test_a_figure_is_not_replaced_unasked(tmp_path):
    path = tmp_path / "maps.png"
    path.write_bytes(b"mine")
    with pytest.raises(CheckpointError, match=r"maps.png: exists; say force"):
        draw_attention_maps(network(), PIXELS, path, **NORMAL)
    draw_attention_maps(network(), PIXELS, path, **NORMAL, force=True)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_command(files, run):
    words = ("--checkpoint", files / "net.safetensors", "--out", files / "out")
    status, out, _ = run(files / "photo.jpg", *words, "--json")
    (said,) = json.loads(out)
    assert status == 0
    assert [block["path"] for block in said["blocks"]] == [
        "layer1.0.attention",
        "layer2.0.attention",
    ]
    assert 0 < said["blocks"][0]["spatial_gate"]["mean"] < 1
    assert {p["class"] for p in said["prediction"]} == set(CLASSES)
    assert (files / "out" / "photo.png").read_bytes().startswith(b"\x89PNG")
    status, _, error = run(files / "photo.jpg", *words)
    assert status == 2 and error.count("\n") == 1 and "--force" in error
    status, out, _ = run(files / "photo.jpg", *words, "--force", "--block", "layer1.0.attention")
    assert status == 0 and "photo.png" in out


def test_the_folder_of_a_run(files, run):
    folder = files / "run"
    folder.mkdir()
    (files / "net.safetensors").rename(folder / "best.safetensors")
    status, out, _ = run(files / "photo.jpg", "--checkpoint", folder, "--out", files / "out")
    assert status == 0 and "photo.png" in out


@pytest.mark.parametrize(
    "words, said",
    [
        (["photo.jpg", "--block", "nowhere"], "no attention block at 'nowhere'; there are layer1"),
        (["none.jpg"], "none.jpg: not found"),
        (["net.safetensors"], "net.safetensors: not a picture"),
        (["photo.jpg", "photo.jpg"], "draw them into two folders (--out)"),
        (["photo.jpg", "--checkpoint", "photo.jpg"], "photo.jpg"),
        (["photo.jpg", "--checkpoint", "plain.safetensors"], "no GAM, CBAM, SE or BAM in ResNet"),
        (
            ["photo.jpg", "--checkpoint", "broken.safetensors"],
            "its metadata entry 'mean' is broken",
        ),
    ],
    ids=["block", "missing", "no picture", "twice", "no checkpoint", "no attention", "metadata"],
)
def test_mistakes_are_one_line(files, run, monkeypatch, words, said):
    monkeypatch.chdir(files)
    save(network(None), "plain.safetensors", about={"mean": "[0.5, 0.5, 0.5]"})
    save(network(), "broken.safetensors", about={"mean": "half"})
    if "--checkpoint" not in words:
        words = [*words, "--checkpoint", "net.safetensors"]
    status, _, error = run(*words)
    assert status == 2
    assert error.count("\n") == 1
    assert said in error
    assert not list(files.glob("attention-maps/*"))
