"""YOLOv5 with attention: the twins agree, names are the checkpoints', lines of a YAML are read."""

from __future__ import annotations

import json
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import yaml
from flax import nnx

import gam_flax
import gam_torch
from gam_flax.convert import load, load_torch, save, to_torch
from gam_flax.convert.saved import constructor
from gam_flax.models.yolov5_config import (
    insert_attention,
    layer_moves,
    lines_of,
    plan,
    read_config,
)
from gam_flax.parity import compare
from gam_flax.preprocess import usual_side
from tests.models.small_yolov5 import SMALL, with_layers

NECK = (9, 17)
"""Before SPPF, and in the neck, after a C3."""


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def twins(config: Any, **options: Any) -> tuple[torch.nn.Module, nnx.Module]:
    theirs = gam_torch.YOLOv5(config, **options).double()
    ours = gam_flax.YOLOv5(config, **options, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    load_torch(ours, theirs)
    return theirs, ours


def pictures(side: int = 64, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).random((batch, side, side, 3))


KINDS = {"grouped": {}, "reference": {"variant": "reference"}}
"""Options of the attention."""


@pytest.mark.parametrize("kind, train", [("grouped", False), ("reference", True)])
def test_a_small_network_agrees_with_its_twin(kind, train):
    """All outputs, running statistics and gradients, layer by layer, to 1e-12 of their scale."""
    options = KINDS[kind]
    theirs, ours = twins(SMALL, attention="gam", attention_options=options, attention_at=(3, 6))
    report = compare(theirs, ours, pictures(32), train=train)
    assert report.ok, str(report)


NETWORKS = list(product(["yolov5n", "yolov5s"], KINDS, [False, True]))


@pytest.mark.parametrize(
    "name, kind, train",
    [
        pytest.param(*one, marks=[] if one == ("yolov5n", "grouped", True) else pytest.mark.slow)
        for one in NETWORKS
    ],
)
def test_networks_with_gam_agree_with_their_twins(name, kind, train):
    theirs, ours = twins(name, attention="gam", attention_options=KINDS[kind], attention_at=NECK)
    report = compare(theirs, ours, pictures(), train=train)
    assert report.ok, str(report)


def test_a_seeded_fault_is_noticed():
    theirs, ours = twins(SMALL, attention="gam")
    ours.model[2].cv2.bn.eps = 1.1e-3
    assert not compare(theirs, ours, pictures(32), gradients=False).ok


def test_decoded_boxes_agree():
    theirs, ours = twins("yolov5n", num_classes=3)
    theirs.eval(), ours.eval()
    x = pictures(96)[:, :, :64]
    with torch.no_grad():
        outputs = theirs(torch.tensor(x).permute(0, 3, 1, 2))
        expected = theirs.decode(outputs).numpy()
    found = ours(jnp.asarray(x))
    assert [y.shape for y in found] == [tuple(y.shape) for y in outputs]
    assert found[0].shape == (2, 3, 12, 8, 8)
    boxes = np.asarray(ours.decode(found))
    assert boxes.shape == (2, 3 * (12 * 8 + 6 * 4 + 3 * 2), 8)
    assert np.abs(boxes - expected).max() <= 1e-12 * np.abs(expected).max()


def test_a_box_is_where_its_cell_and_anchor_say():
    """σ(0) = ½: the middle of the cell, and the anchor itself."""
    model = gam_torch.YOLOv5("yolov5n", num_classes=1)
    boxes = model.decode([torch.zeros(1, 3, s, s, 6) for s in (8, 4, 2)])
    assert torch.allclose(boxes[0, 0], torch.tensor([4.0, 4.0, 10.0, 13.0, 0.5, 0.5]))
    second_anchor_row_2_column_3 = 64 + 2 * 8 + 3
    expected = torch.tensor([28.0, 20.0, 16.0, 30.0, 0.5, 0.5])
    assert torch.allclose(boxes[0, second_anchor_row_2_column_3], expected)
    assert torch.allclose(boxes[0, -1, :4], torch.tensor([48.0, 48.0, 373.0, 326.0]))


def test_boxes_of_half_precision_are_in_whole_precision():
    model = gam_torch.YOLOv5("yolov5n", num_classes=1)
    outputs = [torch.zeros(1, 3, s, s, 6, dtype=torch.bfloat16) for s in (80, 40, 20)]
    boxes = model.decode(outputs)
    assert boxes.dtype == torch.float32 and boxes[0, 79, 0] == 636
    ours = gam_flax.YOLOv5("yolov5n", num_classes=1, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    found = ours.decode([jnp.zeros(y.shape, jnp.bfloat16) for y in outputs])
    assert np.array_equal(found, boxes)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("yolov5n", 1_872_157), ("yolov5s", 7_235_389), ("yolov5m", 21_190_557)],
)
def test_parameters_of_the_published_networks(name, parameters):
    model = gam_torch.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_names_are_those_of_the_checkpoints():
    with torch.device("meta"):
        state = gam_torch.YOLOv5("yolov5n").state_dict()
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert len(shapes) == 349
    for key, shape in {
        "model.0.conv.weight": (16, 3, 6, 6),
        "model.0.bn.num_batches_tracked": (),
        "model.2.m.0.cv2.conv.weight": (16, 16, 3, 3),
        "model.6.m.2.cv1.bn.running_var": (64,),
        "model.9.cv2.conv.weight": (256, 512, 1, 1),
        "model.24.anchors": (3, 3, 2),
        "model.24.m.2.bias": (255,),
    }.items():
        assert shapes[key] == shape
    with torch.device("meta"):
        shifted = gam_torch.YOLOv5("yolov5n", attention="gam").state_dict()
    assert {"model.9.spatial_attention.conv1.weight", "model.25.anchors"} <= set(shifted)


def test_norms_have_yolos_eps():
    theirs, ours = twins(SMALL, attention="gam")
    norms = [m for m in theirs.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.03)}
    ours_too = [m for _, m in nnx.iter_modules(ours) if hasattr(m, "eps")]
    assert {(m.eps, m.momentum) for m in ours_too} == {(1e-3, 0.03)} and len(ours_too) == len(norms)
    asked = gam_torch.YOLOv5(SMALL, attention="gam", attention_options={"norm_eps": 1e-5})
    assert asked.model[3].spatial_attention.norm1.eps == 1e-5 and asked.model[2].cv1.bn.eps == 1e-3


def test_saved_and_loaded(tmp_path):
    options = {"variant": "reference", "ratio": 2}
    model = gam_flax.YOLOv5(SMALL, attention="gam", attention_options=options, rngs=nnx.Rngs(0))
    save(model, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    assert again.config == model.config and again.notices == ()
    model.eval(), again.eval()
    x = jnp.asarray(pictures(32), jnp.float32)
    for y, z in zip(model(x), again(x), strict=True):
        assert np.array_equal(y, z)
    weights = {key: torch.tensor(value) for key, value in to_torch(model).items()}
    theirs = gam_torch.YOLOv5(SMALL, attention="gam", attention_options=options)
    theirs.load_state_dict(weights, strict=True)
    assert theirs.config == json.loads(constructor(model)["arguments"])["config"]


def test_optimized_and_under_jit(tmp_path):
    _, ours = twins(SMALL, attention="gam")
    ours.eval()
    x = jnp.asarray(pictures(32))
    fast = gam_flax.optimize_for_inference(ours, x.shape)
    convs = [m for _, m in nnx.iter_modules(fast) if type(m).__name__ == "BatchNorm"]
    assert not convs
    expected = ours.decode(ours(x))
    save(fast, tmp_path / "fast.safetensors")
    for model in (fast, load(tmp_path / "fast.safetensors")):
        found = nnx.jit(lambda model, x: model.decode(model(x)))(model, x)
        assert np.abs(found - expected).max() <= 1e-12 * np.abs(expected).max()


def test_remat_changes_nothing():
    _, ours = twins(SMALL, attention="gam")
    again = gam_flax.YOLOv5(ours.config, remat=True, param_dtype=jnp.float64, rngs=nnx.Rngs(1))
    nnx.update(again, nnx.state(ours))
    x = jnp.asarray(pictures(32))

    def loss(model):
        return sum(jnp.sum(y**2) for y in model(x))

    one, other = (nnx.grad(loss)(model) for model in (ours, again))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.allclose(a, b, rtol=1e-9, atol=1e-12 * np.abs(a).max())


# Lines of a YAML


@pytest.mark.parametrize(
    "arguments", [[64, 64], [64], [128, 128], [], [{"ratio": 8}], [64, 64, {"ratio": 8}]]
)
def test_channels_before_and_after_the_width(arguments):
    layers, notices = plan(with_layers(3, [-1, 1, "GAM_Attention", arguments]))
    assert (layers[3].kind, layers[3].in_channels, layers[3].out_channels) == ("gam", (64,), 64)
    assert notices == ()
    assert layers[3].arguments == (arguments[-1] if arguments[-1:] == [{"ratio": 8}] else {})


@pytest.mark.parametrize("name", ["GAM_Attention", "GAMAttention", "GAM", "models.common.GAM"])
def test_names_of_gam(name):
    assert plan(with_layers(3, [-1, 1, name, [64]])).layers[3].kind == "gam"


@pytest.mark.parametrize(("line", "module"), [("CBAM", "cbam"), ("SE", "se"), ("BAM", "bam")])
def test_other_attention_at_any_index(line, module):
    config = with_layers(2, [-1, 1, line, [64]])
    theirs, ours = twins(config)
    assert type(theirs.model[2]).__name__ == type(ours.model[2]).__name__
    assert plan(config).layers[2].kind == module
    assert compare(theirs, ours, pictures(32), gradients=False).ok


def test_options_of_a_line_change_the_grouped_gam():
    """Those of the line alone where it has some, else the model's."""
    asked = {"attention_options": {"ratio": 2}}
    for line, ratio, groups in (([], 2, 2), ([{"groups": 1}], 4, 1)):
        model = gam_torch.YOLOv5(with_layers(3, [-1, 1, "GAM", line]), **asked)
        gam = model.model[3]
        assert (gam.ratio, gam.groups, gam.shuffle) == (ratio, groups, "gate")
        assert gam.spatial_attention.conv1.groups == groups


def test_arguments_that_forks_ignore():
    model = gam_torch.YOLOv5(with_layers(3, [-1, 1, "GAM_Attention", [64, 64, True, 16]]))
    assert len(model.notices) == 1
    assert model.notices[0].startswith("layer 3: True, 16 ignored")
    assert model.model[3].channel_attention.fc1.out_features == 16  # family C, whatever is said


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ([-1, 1, "EMA", [64]], "layer 3, [-1, 1, 'EMA', [64]]: 'EMA' is not a module known here"),
        ([-1, 1, "GAM", [96]], "written for 96 channels, but its input has 64"),
        ([7, 1, "GAM", [64]], "takes the output of 7, expected a layer before it"),
        ([-1, 1, "Conv", []], "Conv wants the output's channels first"),
        ([-1, 1, "Conv", [64, 1, 1, 0, 1, 5]], "Conv has no argument 5"),
        ([-1, 1, "Conv", [64, 3, 0]], "Conv with stride 0"),
        ([-1, 1, "Conv", [64, 3, 1, -1]], "Conv with padding -1"),
        ([-1, 1, "Conv", [64, "x"]], "Conv with kernel_size 'x'"),
        ([-1, 1, "Conv", [-64]], "Conv wants the output's channels first"),
        ([-1, 1, "SPP", [64, 5]], "SPP with kernel_sizes 5"),
        ([-1, 1, "C3", [64, True, 1, 0]], "C3 with expansion 0"),
        ([-1, 0, "C3", [64]], "its number is 0, expected 1 or more"),
        ([-1, "3", "C3", [64]], "its number is '3', expected 1 or more"),
        ([[], 1, "C3", [64]], "takes the output of no layer"),
        ([True, 1, "C3", [64]], "takes the output of True, expected a layer before it"),
        ([-1, 1, "nn.Upsample", [None, 4, "nearest"]], "only [None, 2, nearest] is supported"),
        ([[-1, 0], 1, "Concat", [1]], "its inputs have strides"),
        ([[-1, 0], 1, "C3", [64]], "C3 takes one input, got 2"),
        ([-1, 1, "GAM", "64"], "its arguments are '64', expected a list"),
        ([-1, 1, "GAM", [{"ratio": 1000}]], "layer 3, gam:"),
        ([-1, 1, "GAM", [{"colour": 1}]], "layer 3, gam:"),
    ],
)
def test_a_line_that_is_not_understood(line, expected):
    for package in (gam_torch, gam_flax):
        rngs = {} if package is gam_torch else {"rngs": nnx.Rngs(0)}
        with pytest.raises(ValueError) as error:
            package.YOLOv5(with_layers(3, line), **rngs)
        assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ([[7, 4], 1, "Detect", ["nc"]], "Detect wants [nc, anchors]"),
        ([[7, 4], 1, "Detect", [80, "anchors"]], "Detect of 80 classes where nc is 3"),
        ([[7], 1, "Detect", ["nc", "anchors"]], "Detect of 1 inputs wants anchors of as many"),
        ([-1, 1, "C3", [64]], "layer 8 is C3, expected Detect as last"),
    ],
)
def test_a_last_line_that_is_not_understood(line, expected):
    with pytest.raises(ValueError) as error:
        gam_torch.YOLOv5({**SMALL, "head": [*SMALL["head"][:-1], line]})
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("nc: 3\nbackbone: [", "not YAML"),
        ("- 1", "holds no mapping"),
        ("backbone: []", "nc is missing"),
        ("nc: 3\nanchors: [[1, 2, 3]]\nbackbone: [[1]]", "anchors is '[[1, 2, 3]]'"),
        ("nc: 3\nanchors: [[1, 2]]\nbackbone: [[1]]", "backbone is '[[1]]'"),
        ("nc: 3\nanchors: [[1, 2]]\nwidth_multiple: -1", "width_multiple is '-1'"),
    ],
)
def test_a_yaml_that_is_not_understood(tmp_path, text, expected):
    path = tmp_path / "m.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_config(path)
    assert expected in str(error.value) and str(path) in str(error.value)
    with pytest.raises(ValueError, match="cannot be read"):
        read_config(tmp_path / "none.yaml")


def test_a_users_own_yaml(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    assert gam_torch.YOLOv5(path).config == read_config(SMALL)


def test_classes():
    for classes in (0, -1):
        with pytest.raises(ValueError, match=f"num_classes must be 1 or more, got {classes}"):
            gam_torch.YOLOv5(SMALL, num_classes=classes)
    model = gam_torch.create_model("yolov5n", attention="gam", num_classes=3)
    assert (model.num_classes, model.config["nc"], model.detect.m[0].out_channels) == (3, 3, 24)
    assert model.strides == (8, 16, 32)
    with pytest.raises(ValueError, match="attention must be one of"):
        gam_torch.YOLOv5(SMALL, attention="colour")


def test_its_summary():
    model = nnx.eval_shape(lambda: gam_flax.create_model("yolov5n", rngs=nnx.Rngs(0)))
    counted = gam_flax.summarize(model, (1, 640, 640, 3))
    assert counted.parameters == 1_872_157
    assert round(2 * counted.multiply_adds / 1e9, 1) == 4.5  # "FLOPs" as its README has them
    assert usual_side(model) == 640


def test_attention_inserted_shifts_what_follows():
    old = read_config("yolov5s")
    new = insert_attention(old, "GAM_Attention", NECK)
    assert [i for i, line in enumerate(lines_of(new)) if line[2] == "GAM_Attention"] == [9, 18]
    moves = layer_moves(old, new)
    assert (moves[8], moves[9], moves[16], moves[17], moves[24]) == (8, 10, 17, 19, 26)
    assert lines_of(new)[-1][0] == [19, 22, 25]
    shapes = [(layer.kind, layer.out_channels) for layer in plan(old).layers]
    kept = [(p.kind, p.out_channels) for p in plan(new).layers if p.kind != "gam"]
    assert kept == shapes
    with pytest.raises(ValueError, match=r"at 99: must be one of the layers 1 … 24"):
        insert_attention(old, at=[99])
    with pytest.raises(ValueError, match=r"layer 9 is SPPF, where layer 9"):
        layer_moves(old, with_layers(9, [-1, 1, "SPP", [1024]], base=old))


def test_release_5_has_focus_and_spp():
    config = with_layers(0, [-1, 1, "Focus", [32, 3]], base=SMALL, replace=True)
    config = with_layers(3, [-1, 1, "SPP", [128, [3, 5]]], base=config, replace=True)
    theirs, ours = twins(config)
    assert compare(theirs, ours, pictures(32), gradients=False).ok
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    seen: list[torch.Tensor] = []
    focus = gam_torch.models.yolov5.Focus(1, 1)
    focus.conv.register_forward_pre_hook(lambda conv, inputs: seen.append(inputs[0]))
    focus(x)
    assert seen[0][0, :, 0, 0].tolist() == [0.0, 4.0, 1.0, 5.0]
