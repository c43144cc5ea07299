"""Detectors are trained as classifiers are: labels read, pictures changed, runs that go on."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import yaml
from PIL import Image
from rich.console import Console

from gam_flax.convert import load, read_checkpoint
from gam_flax.detection import mean_average_precision
from gam_flax.train import DataError, Settings, TrainingError, fit, read_data, read_metrics
from gam_flax.train.augmentation import jitter
from gam_flax.train.yolo_folder import label_file
from tests.models.small_yolov5 import SMALL

SIDE = 32
NAMES = ["dark", "bright", "none"]


def write_folder(place: Path, train: int = 12, val: int = 5) -> Path:
    """Pictures with one bright or dark square each, and what is where."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (place / kind / part).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image = rng.integers(100, 150, (24, SIDE, 3)).astype(np.uint8)
            name, left, top = i % 2, int(rng.integers(0, 20)), int(rng.integers(0, 12))
            image[top : top + 12, left : left + 12] = 255 * name
            Image.fromarray(image).save(place / "images" / part / f"{i}.png")
            line = f"{name} {(left + 6) / SIDE} {(top + 6) / 24} {12 / SIDE} {12 / 24}\n"
            (place / "labels" / part / f"{i}.txt").write_text(line if i else "")
    told = {"names": NAMES, "train": "images/train", "val": "images/val"}
    (place / "data.yaml").write_text(yaml.safe_dump(told))
    return place


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("yolo"))


def test_boxes_are_where_the_things_are(folder):
    data = read_data("yolo", folder, side=SIDE)
    assert (len(data.train), len(data.test), data.classes) == (12, 5, tuple(NAMES))
    assert (data.train[0]["boxes"][:, 0] == -1).all()  # a file without a line
    element = data.train[3]
    name, x, y, wide, high = element["boxes"][0]
    left, top, right, bottom = (
        round(float(v) * SIDE) for v in (x - wide / 2, y - high / 2, x + wide / 2, y + high / 2)
    )
    assert (name, right - left, bottom - top) == (1, 12, 12)
    assert (element["image"][top:bottom, left:right] == 255).all()
    assert (element["image"][:4] == 114).all()  # letterboxed: 24 rows in 32


def test_jitter_moves_boxes_with_their_things(folder):
    data = read_data("yolo", folder, side=SIDE)
    seen = 0
    for n in range(60):
        found = jitter(data.train[1 + 2 * (n % 5)], np.random.default_rng(n), flip=True)
        name, x, y, wide, high = found["boxes"][0]
        if name < 0:
            continue
        rows, columns = (
            slice(round(float(m - s / 2) * SIDE) + 2, round(float(m + s / 2) * SIDE) - 2)
            for m, s in ((y, high), (x, wide))
        )
        inside = found["image"][rows, columns].astype(int)
        if inside.size:
            seen += 1
            assert inside.min() > 140  # bright, whatever its colour became
        assert x - wide / 2 >= 0 and x + wide / 2 <= 1 + 1e-6
    assert seen > 30
    one, same, other = (
        jitter(data.train[1], np.random.default_rng(n), flip=True)["image"] for n in (1, 1, 2)
    )
    assert np.array_equal(one, same) and not np.array_equal(one, other)


def test_where_labels_lie():
    assert label_file(Path("/d/images/train/a.b.jpg")) == Path("/d/labels/train/a.b.txt")
    assert label_file(Path("images/x/images/a.png")) == Path("images/x/labels/a.txt")
    assert label_file(Path("pictures/a.png")) == Path("pictures/a.txt")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("0 0.5 0.5", "line 1: '0 0.5 0.5', expected class x y width height"),
        ("0 a 0.5 0.5 0.5", "expected class x y width height"),
        ("0 nan 0.5 0.5 0.5", "expected class x y width height"),
        ("3 0.5 0.5 0.5 0.5", "line 1: class 3, expected 0 to 2"),
        ("0.5 0.5 0.5 0.5 0.5", "line 1: class 0.5, expected 0 to 2"),
        ("0 0.5 0.5 1.5 0.5", "expected fractions of the picture, 0 to 1"),
        ("0 0.5 0.5 0 0.5", "expected fractions of the picture, 0 to 1"),
    ],
)
def test_a_broken_label_is_one_line(tmp_path, line, expected):
    write_folder(tmp_path, 2, 1)
    (tmp_path / "labels" / "train" / "1.txt").write_text(line)
    with pytest.raises(DataError) as error:
        read_data("yolo", tmp_path, side=SIDE)
    said = str(error.value)
    assert expected in said and "1.txt" in said and "\n" not in said


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"names": 3}, "names is 3, expected a list of classes"),
        ({"names": NAMES, "train": "images/none"}, "not found"),
        ({"names": NAMES}, "train is None, expected a folder"),
        ([1], "expected names, train and val"),
    ],
)
def test_a_broken_data_yaml_is_one_line(tmp_path, told, expected):
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(told))
    with pytest.raises(DataError) as error:
        read_data("yolo", tmp_path, side=SIDE)
    assert expected in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(DataError, match="side 30: must be a multiple of 32"):
        read_data("yolo", write_folder(tmp_path / "good", 1, 1), side=30)


# Precision


def found(boxes, scores, classes, truth):
    """One picture, as `mean_average_precision` wants it."""
    arrays = {"boxes": boxes, "scores": scores, "classes": classes, "truth": truth}
    return {**{k: np.asarray(v, float) for k, v in arrays.items()}, "count": len(scores)}


def test_precision_by_hand():
    """Of class 0 one of two is found, of class 1 the only one, at an IoU of 0.6."""
    truth = [[0, 10, 10, 10, 10], [0, 40, 40, 10, 10], [1, 70, 70, 10, 10], [-1, 0, 0, 0, 0]]
    shifted = [65.0, 65, 75, 75 * 1.0]
    shifted[0] += 2.5  # 7.5 of 12.5 wide: IoU 0.6
    shifted[2] += 2.5
    one = found([[5, 5, 15, 15], shifted], [0.9, 0.8], [0, 1], truth)
    perfect_half = 51 / 101  # precision 1 up to a recall of 0.5, of 101 recalls
    measured = mean_average_precision([one])
    assert measured["map50"] == pytest.approx((perfect_half + 1) / 2)
    below = 3 / 10  # IoUs of 0.5, 0.55 and 0.6
    assert measured["map50_95"] == pytest.approx((perfect_half + below) / 2)


def test_precision_of_nothing():
    nothing = found(np.zeros((0, 4)), [], [], [[0, 5, 5, 5, 5]])
    assert mean_average_precision([nothing]) == {"map50": 0.0, "map50_95": 0.0}


# Runs


def settings(folder: Path, **changes) -> Settings:
    options = {"config": SMALL}
    usual = {"model": "yolov5n", "attention": "gam", "side": SIDE, "epochs": 3, "batch_size": 4}
    usual |= {"optimizer": "adamw", "learning_rate": 0.01, "model_options": options, "ema": 0.9}
    return Settings("yolo", str(folder), **{**usual, **changes})


def trained(settings: Settings, out: Path, **options):
    return fit(settings, out, console=Console(quiet=True), **options)


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, trained(settings(folder), out)


def test_a_run(whole):
    out, result = whole
    assert result.finished and result.step == 9
    lines = read_metrics(out / "metrics.jsonl")
    train = [line for line in lines if line["part"] == "train"]
    test = [line for line in lines if line["part"] == "test"]
    assert {"loss", "box", "objectness", "classification"} <= train[0].keys()
    assert [set(line) >= {"map50", "map50_95"} for line in test] == [True] * 3
    assert result.accuracy == test[-1]["map50"]
    assert np.mean([x["loss"] for x in train[-3:]]) < np.mean([x["loss"] for x in train[:3]])
    model = load(out / "best.safetensors")
    assert type(model).__name__ == "YOLOv5" and model.num_classes == 3
    told = read_checkpoint(out / "best.safetensors").metadata
    assert "test_map50" in told and (out / "curves.png").exists()


def test_a_run_that_stopped_ends_with_the_same_bits(whole, folder, tmp_path, monkeypatch):
    from gam_flax.train import loop

    class Stopper:
        def at(self, step):
            return step == 5

    class Stopping:
        def __enter__(self):
            return Stopper()

        def __exit__(self, *error):
            pass

    with monkeypatch.context() as patched:
        patched.setattr(loop, "stop_request", Stopping)
        assert not trained(settings(folder), tmp_path / "run").finished
    assert trained(settings(folder), tmp_path / "run").finished
    one, other = (
        read_checkpoint(place / "last.safetensors").tensors
        for place in (whole[0], tmp_path / "run")
    )
    assert all(one[key].tobytes() == other[key].tobytes() for key in one)


def test_a_users_yaml_and_a_start_from_plain_weights(folder, tmp_path):
    torch = pytest.importorskip("torch")
    import gam_torch

    plain = gam_torch.YOLOv5(SMALL)
    torch.save({"model": plain.state_dict()}, tmp_path / "plain.pt")
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(SMALL))
    changes = {"model": str(tmp_path / "m.yaml"), "model_options": {}, "epochs": 1}
    out = tmp_path / "run"
    begun = settings(folder, **changes, init=str(tmp_path / "plain.pt"), learning_rate=0.0)
    trained(begun, out)
    model = load(out / "last.safetensors")
    kernel = np.asarray(model.model[0].conv.kernel[...])
    expected = plain.model[0].conv.weight.detach().numpy().transpose(2, 3, 1, 0)
    assert np.allclose(kernel, expected, rtol=1e-6)
    assert type(model.model[3]).__name__ == "GAM"


def test_a_network_for_other_data(folder, tmp_path):
    for changes, expected in (
        ({"model": "resnet8"}, "model resnet8: data yolo wants a detector"),
        ({"model": str(tmp_path / "none.yaml")}, "none.yaml: cannot be read"),
    ):
        with pytest.raises(TrainingError, match=expected):
            trained(settings(folder, **changes, model_options={}), tmp_path / "run", force=True)


def test_a_loss_that_is_not_finite_is_found(folder, tmp_path):
    with pytest.raises(TrainingError, match="it began"):
        trained(settings(folder, learning_rate=1e30, ema=None), tmp_path / "run")
    jax.clear_caches()
