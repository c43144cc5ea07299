"""YOLOv5's checkpoints as users have them: pickled, in half precision, with GAM in them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn
from typer.testing import CliRunner

import gam_flax
import gam_torch
from gam_flax.cli import app
from gam_flax.convert import CheckpointError, convert_file, load, load_torch, read_checkpoint
from tests.convert.wild import WildGAM, randomize
from tests.models.small_yolov5 import SMALL, with_layers

NAMES = ["cat", "dog", "bird"]
GAM_AT = 3


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def fork(gam: nn.Module | None = None, arguments: Any = (64, 64)) -> nn.Module:
    """A network as a fork trains it, its GAM before SPPF; attributes as in the pickled object."""
    config = SMALL
    if gam is not None:
        config = with_layers(GAM_AT, [-1, 1, "GAM_Attention", list(arguments)])
    model = gam_torch.YOLOv5(config)
    if gam is not None:
        model.model[GAM_AT] = gam
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = 1e-3, 0.03
    anchors = model.detect.anchors.clone()
    randomize(model)
    model.detect.anchors.copy_(anchors)
    model.yaml = copy.deepcopy(config)
    model.names = dict(enumerate(NAMES))
    model.nc = len(NAMES)
    return model.eval().half()


def spoilt(model: nn.Module) -> nn.Module:
    """What must not be read: the weights that `ema` stands for."""
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.zero_()
    return other


def pictures() -> torch.Tensor:
    return torch.rand(2, 3, 32, 64, generator=torch.Generator().manual_seed(0)).double()


def outputs(model: nn.Module) -> list[np.ndarray]:
    with torch.no_grad():
        return [y.numpy() for y in copy.deepcopy(model).double()(pictures())]


def in_flax(path: Path) -> list[np.ndarray]:
    arguments = json.loads(read_checkpoint(path).metadata["arguments"])
    model = gam_flax.YOLOv5(**arguments, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    load_torch(model, path)
    model.eval()
    x = jnp.asarray(pictures().permute(0, 2, 3, 1).numpy())
    return [np.asarray(y) for y in model(x)]


def agree(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return all(
        np.abs(a - b).max() <= 1e-12 * np.abs(b).max() for a, b in zip(found, expected, strict=True)
    )


def refused(call, *words: str) -> None:
    with pytest.raises(CheckpointError) as error:
        call()
    line = str(error.value)
    assert "\n" not in line and all(word in line for word in words), line


@pytest.mark.parametrize(
    ("variant", "gam"),
    [
        (None, lambda: WildGAM(64, group=True, shuffled="gate")),
        ("reference", lambda: WildGAM(64)),
        ("gated", lambda: WildGAM(64, gated=True)),
    ],
)
def test_a_pickled_model(tmp_path, variant, gam):
    """`ema` in half precision, its YAML, names and eps; the family said where it is not seen."""
    model = fork(gam())
    torch.save({"model": spoilt(model), "ema": model, "epoch": 3}, tmp_path / "best.pt")
    report = convert_file(tmp_path / "best.pt", tmp_path / "b.safetensors", variant=variant)
    assert report.variants == {f"model.{GAM_AT}": variant or "grouped"}
    made = read_checkpoint(tmp_path / "b.safetensors")
    assert json.loads(made.metadata["classes"]) == NAMES
    assert json.loads(made.metadata["arguments"])["norm_eps"] == 1e-3
    assert made.tensors["model.0.conv.kernel"].dtype == np.float16
    assert agree(in_flax(tmp_path / "b.safetensors"), outputs(model))
    assert not agree(in_flax(tmp_path / "b.safetensors"), outputs(spoilt(model)))
    built = load(tmp_path / "b.safetensors")
    assert isinstance(built, gam_flax.YOLOv5) and built.num_classes == 3


def test_another_family_would_be_noticed(tmp_path):
    model = fork(WildGAM(64))
    torch.save(model, tmp_path / "best.pt")
    convert_file(tmp_path / "best.pt", tmp_path / "b.safetensors", variant="gated")
    assert not agree(in_flax(tmp_path / "b.safetensors"), outputs(model))


def test_the_family_is_asked_for(tmp_path):
    torch.save(fork(WildGAM(64)), tmp_path / "best.pt")
    refused(
        lambda: convert_file(tmp_path / "best.pt", tmp_path / "b.safetensors"),
        *("best.pt", f"model.{GAM_AT} could be reference or gated", "--variant"),
    )
    assert not (tmp_path / "b.safetensors").exists()


def fuse(model: nn.Module) -> nn.Module:
    """Each norm of a Conv folded into it and gone; `forward` another, bound, method."""
    model = copy.deepcopy(model).double()
    for conv in [m for m in model.modules() if isinstance(m, gam_torch.models.yolov5.Conv)]:
        norm = conv.bn
        factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        whole = nn.Conv2d(
            conv.conv.in_channels,
            conv.conv.out_channels,
            conv.conv.kernel_size,
            conv.conv.stride,
            conv.conv.padding,
        ).double()
        whole.weight.data = conv.conv.weight.data * factor[:, None, None, None].data
        whole.bias.data = (norm.bias - norm.running_mean * factor).data
        conv.conv, conv.bn = whole, nn.Identity()
        delattr(conv, "bn")
        conv.fused = conv.extra_repr  # a bound method, as `forward_fuse` is
    return model.half()


def test_a_fused_model(tmp_path):
    model = fuse(fork(WildGAM(64, group=True, shuffled="gate")))
    torch.save({"model": model}, tmp_path / "best.pt")
    for conv in [m for m in model.modules() if isinstance(m, gam_torch.models.yolov5.Conv)]:
        conv.bn = nn.Identity()
    expected = outputs(model)
    report = convert_file(tmp_path / "best.pt", tmp_path / "b.safetensors")
    assert any("had their norms folded in" in note for note in report.notes)
    assert agree(in_flax(tmp_path / "b.safetensors"), expected)


def test_a_state_dict_and_a_yaml(tmp_path):
    import yaml

    model = fork(WildGAM(64, group=True, shuffled="gate"))
    torch.save({"state_dict": nn.DataParallel(model).state_dict()}, tmp_path / "w.pt")
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({**model.yaml, "nc": 80}))
    convert_file(tmp_path / "w.pt", tmp_path / "b.safetensors", yaml=tmp_path / "m.yaml")
    assert agree(in_flax(tmp_path / "b.safetensors"), outputs(model))


def test_plain_weights_into_a_yaml_with_attention(tmp_path):
    plain = fork()
    config = with_layers(GAM_AT, [-1, 1, "GAM", [{"variant": "reference"}]])
    torch.save({"model": plain}, tmp_path / "plain.pt")
    report = convert_file(tmp_path / "plain.pt", tmp_path / "b.safetensors", yaml=config)
    moved = "moved, for attention is new: model.3 → model.4, model.4 → model.5"
    assert any(note.startswith(moved) for note in report.notes)
    assert any(f"begun anew, from seed 0: model.{GAM_AT}" in note for note in report.notes)
    made = read_checkpoint(tmp_path / "b.safetensors").tensors
    sppf = plain.model[3].cv1.conv.weight.detach().numpy()
    assert np.array_equal(made["model.4.cv1.conv.kernel"], sppf.transpose(2, 3, 1, 0))
    assert isinstance(load(tmp_path / "b.safetensors").model[GAM_AT], gam_flax.GAM)

    model = gam_flax.YOLOv5(config, rngs=nnx.Rngs(1))
    before = np.asarray(model.model[GAM_AT].spatial_attention.conv1.kernel[...])
    report = load_torch(model, tmp_path / "plain.pt", keep=["attention"])
    assert report.kept == [f"model.{GAM_AT}"]
    assert np.array_equal(model.model[4].cv1.conv.kernel[...], sppf.transpose(2, 3, 1, 0))
    assert np.array_equal(model.model[GAM_AT].spatial_attention.conv1.kernel[...], before)


def test_releases_before_6_keep_anchors_twice(tmp_path):
    state = fork().state_dict()
    state["model.8.anchor_grid"] = torch.ones(2, 1, 2, 1, 1, 2)
    torch.save(state, tmp_path / "old.pt")
    report = convert_file(tmp_path / "old.pt", tmp_path / "b.safetensors", yaml=SMALL)
    assert any("model.8.anchor_grid: left out" in note for note in report.notes)
    assert agree(in_flax(tmp_path / "b.safetensors"), outputs(fork()))


def test_to_torch_and_back(tmp_path):
    model = fork(WildGAM(64, group=True, shuffled="gate"))
    torch.save(model, tmp_path / "best.pt")
    convert_file(tmp_path / "best.pt", tmp_path / "t.pt", to="torch", dtype="float32")
    made = torch.load(tmp_path / "t.pt", weights_only=True)
    twin = gam_torch.YOLOv5(**json.loads(made["gam_attention"]["arguments"]))
    twin.load_state_dict(made["state_dict"], strict=True)
    assert agree(outputs(twin.eval()), outputs(model))


def test_the_commands(tmp_path):
    torch.save(fork(WildGAM(64)), tmp_path / "best.pt")
    run = CliRunner().invoke
    found = run(app, ["inspect", str(tmp_path / "best.pt")])
    assert found.exit_code == 0 and f"model.{GAM_AT}" in found.output
    call = ["convert", str(tmp_path / "best.pt"), str(tmp_path / "b.safetensors")]
    assert run(app, [*call, "--variant", "reference"]).exit_code == 0
    found = run(app, ["verify", str(tmp_path / "b.safetensors")])
    assert found.exit_code == 0 and "rows agree" in found.output
    found = run(app, ["verify", str(tmp_path / "best.pt"), "--variant", "reference"])
    assert found.exit_code == 0 and "rows agree" in found.output


def changed(**attributes: Any) -> nn.Module:
    model = fork(WildGAM(64, group=True, shuffled="gate"))
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"names": ["cat"]}, ["has 1 names of classes, but weights for 3"]),
        ({"yaml": {**SMALL, "backbone": 3}}, ["backbone is '3'"]),
        (
            {"yaml": {**SMALL, "anchors": [[1, 2]] * 2}},
            ["has 3 names of classes, but weights for 11"],
        ),
        (
            {"yaml": with_layers(GAM_AT, [-1, 1, "EMA", [64]])},
            ["layer 3, [-1, 1, 'EMA', [64]]: 'EMA' is not a module known here"],
        ),
        ({"yaml": SMALL}, ["its last layer is model.9, in the YAML it is 8"]),
        ({"yaml": {**SMALL, "head": [[-1, 1, "Conv", [64]]]}}, ["expected Detect as last"]),
    ],
)
def test_what_does_not_go_together(tmp_path, attributes, words):
    torch.save({"model": changed(**attributes)}, tmp_path / "best.pt")
    target = tmp_path / "b.safetensors"
    refused(lambda: convert_file(tmp_path / "best.pt", target), str(tmp_path / "best.pt"), *words)
    assert not target.exists()


def test_a_yaml_for_what_is_no_yolo(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    refused(
        lambda: convert_file(tmp_path / "w.pt", tmp_path / "b.safetensors", yaml="yolov5n"),
        "no model.N.anchors in it",
    )
