"""Runs from their folder to their end, and what stops them."""

from __future__ import annotations

import io
import json

import jax
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import gam_flax
from gam_flax.convert import load, load_torch, save
from gam_flax.convert.errors import CheckpointError
from gam_flax.train import Settings, TrainingError, fit, read_metrics
from gam_flax.train.diagnosis import where_it_began
from gam_flax.train.tasks import Classification
from tests.train.made import TINY, outcome, tiny, write_fashion


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_fashion(tmp_path_factory.mktemp("data"), 64, 16)


def trained(settings, out, **options):
    """The result, and what was printed."""
    text = io.StringIO()
    console = Console(file=text, width=200, soft_wrap=True)
    return fit(settings, out, console=console, **options), text.getvalue()


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    settings = tiny(data, epochs=4, optimizer="adamw", learning_rate=0.03, label_smoothing=0.05)
    return settings, out, *trained(settings, out)


def test_a_run_leaves_what_it_says(finished):
    settings, out, result, printed = finished
    assert result.finished and result.step == 16
    assert "a new run" in printed and "epoch 4 of 4: test loss" in printed
    assert {path.name for path in out.iterdir()} == {
        *("run.json", "metrics.jsonl", "checkpoints", ".lock"),
        *("last.safetensors", "best.safetensors", "curves.png"),
    }
    assert json.loads((out / "run.json").read_text()) == json.loads(settings.to_json())
    lines = read_metrics(out / "metrics.jsonl")
    train = [line for line in lines if line["part"] == "train"]
    test = [line for line in lines if line["part"] == "test"]
    assert [line["step"] for line in train] == list(range(1, 17))
    assert [line["epoch"] for line in test] == [1, 2, 3, 4]
    assert result.best_accuracy == max(line["accuracy"] for line in test)
    assert train[-1]["loss"] < train[0]["loss"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_model_that_is_left_has_the_accuracy_that_was_said(finished, data):
    from gam_flax.train import read_data

    _, out, result, _ = finished
    checkpoint = gam_flax.convert.read_checkpoint(out / "last.safetensors")
    mean, std = (json.loads(checkpoint.metadata[name]) for name in ("mean", "std"))
    pictures = read_data("fashion-mnist", data).test
    model = load(out / "last.safetensors")
    model.eval()
    x = (np.asarray(pictures.images, np.float32) / 255 - mean) / std
    logits = model(jax.numpy.asarray(x, jax.numpy.float32))
    accuracy = float((np.asarray(logits).argmax(-1) == pictures.labels).mean())
    assert accuracy == pytest.approx(result.accuracy)
    assert checkpoint.metadata["test_accuracy"] == f"{accuracy:.4f}"
    assert json.loads(checkpoint.metadata["classes"])[9] == "boot"


def test_a_finished_run_stays_as_it_is(finished):
    settings, out, result, _ = finished
    before = outcome(out)
    again, printed = trained(settings, out)
    assert again == result and "going on from step 16" in printed
    assert outcome(out) == before


def test_other_settings_want_another_folder(finished, data):
    _, out, _, _ = finished
    before = outcome(out)
    with pytest.raises(TrainingError, match="other settings: .*epochs 2, was 4.*--force"):
        fit(tiny(data, epochs=2), out)
    assert outcome(out) == before


def test_a_folder_with_something_else_is_left_alone(data, tmp_path):
    (tmp_path / "thesis.tex").write_text("ten years")
    with pytest.raises(TrainingError, match="is not a run, it holds thesis.tex"):
        fit(tiny(data), tmp_path)
    assert (tmp_path / "thesis.tex").exists() and not (tmp_path / "run.json").exists()


def test_two_processes_do_not_train_in_one_folder(data, tmp_path):
    from gam_flax.train.run_folder import opened

    with (
        opened(tmp_path / "run", tiny(data), force=False),
        pytest.raises(TrainingError, match="another process trains in it"),
    ):
        fit(tiny(data), tmp_path / "run")


def test_force_starts_anew(data, tmp_path):
    trained(tiny(data, epochs=1), tmp_path / "run")
    result, printed = trained(tiny(data, epochs=2), tmp_path / "run", force=True)
    assert "a new run" in printed and result.step == 8


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"batch_size": 65}, "batch-size 65: there are only 64 training pictures"),
        ({"model": "resnet19"}, "model resnet19: must be one of"),
        ({"attention": "eca"}, "attention eca: must be one of bam, cbam, gam"),
        ({"model_options": {"depth": 3}}, "model resnet8: .*depth"),
        ({"dtype": "float64"}, "JAX_ENABLE_X64"),
        ({"init": "nothing.pth"}, "nothing.pth"),
        ({"data_dir": "/nowhere"}, "/nowhere/train-images-idx3-ubyte: not found"),
    ],
)
def test_what_cannot_be_is_one_line(data, tmp_path, changes, said):
    with pytest.raises(CheckpointError, match=said) as raised:
        fit(tiny(data, **changes), tmp_path / "run")
    assert "\n" not in str(raised.value)


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    """The learning rate is harmless in the first epoch, and then is not."""
    out = tmp_path / "run"
    settings = tiny(data, epochs=2, learning_rate=1e38, warmup=1.0, momentum=0.0, clip=1e-37)
    with pytest.raises(TrainingError) as raised:
        trained(settings, out, save_every=1)
    line = str(raised.value)
    step = int(line.partition("step ")[2].partition(":")[0])
    assert "it began in" in line and f"checkpoint {step - 1} is kept" in line and "\n" not in line
    assert (out / "checkpoints" / str(step - 1)).is_dir()
    assert [x["step"] for x in read_metrics(out / "metrics.jsonl") if x["part"] == "train"] == list(
        range(1, step)
    )


def test_where_it_began():
    x = jax.numpy.asarray(np.random.default_rng(0).normal(size=(4, 12, 12, 1)), jax.numpy.float32)
    batch = {"label": jax.numpy.arange(4)}

    def loss(model):
        return Classification().loss(model, x, batch, Settings("mnist"))[0]

    def built():
        model = gam_flax.create_model(
            "resnet8",
            attention="gam",
            num_classes=10,
            in_channels=1,
            rngs=nnx.Rngs(0),
            remat=True,
            **TINY,
        )
        model.train()
        return model

    model = built()
    kernel = model.layer1[0].conv2.kernel
    kernel[...] = kernel[...] + 3e38
    assert where_it_began(model, x, loss).startswith("in layer1.0.conv2, whose output has")
    model = built()
    bias = model.layer1[0].attention.spatial_attention.norm1.bias
    bias[...] = bias[...].at[0].set(np.nan)
    expected = "in layer1.0.attention.spatial_attention.norm1.bias, which has values"
    assert where_it_began(model, x, loss).startswith(expected)
    assert where_it_began(built(), x * np.nan, loss) == "in the pictures"


def test_fine_tuning_from_a_torch_backbone(data, tmp_path):
    torch = pytest.importorskip("torch")
    import gam_torch

    options = {"layers": [1], "widths": [4], "stem": "cifar"}
    backbone = gam_torch.create_model("resnet8", num_classes=7, in_channels=1, **options)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pth")
    settings = tiny(data, epochs=1, learning_rate=0.0, init=str(tmp_path / "backbone.pth"))
    _, printed = trained(settings, tmp_path / "run")
    assert "tensors loaded; new: fc, attention" in printed
    found = gam_flax.convert.to_torch(load(tmp_path / "run" / "last.safetensors"))
    expected = backbone.state_dict()["layer1.0.conv2.weight"].numpy()
    assert np.array_equal(found["layer1.0.conv2.weight"], expected)
    assert found["fc.weight"].shape == (10, 4)


def test_starting_from_all_of_a_network(data, tmp_path):
    model = gam_flax.create_model(
        "resnet8", attention="gam", num_classes=10, in_channels=1, rngs=nnx.Rngs(5),
        **TINY, stem="cifar",
    )  # fmt: skip
    save(model, tmp_path / "start.safetensors")
    settings = tiny(
        data, epochs=1, learning_rate=0.0, init=str(tmp_path / "start.safetensors"), fresh=()
    )
    _, printed = trained(settings, tmp_path / "run")
    assert "new: nothing" in printed
    end = load(tmp_path / "run" / "last.safetensors")
    assert np.array_equal(end.fc.kernel[...], model.fc.kernel[...])
    assert load_torch(model, tmp_path / "run" / "last.safetensors").ok
