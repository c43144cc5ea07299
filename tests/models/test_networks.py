"""What all networks share: stages, heads, presets, files, remat."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import gam_flax
import gam_torch
from gam_flax.convert import load, load_torch, save, to_torch
from gam_flax.convert.flax_paths import nnx_variables
from tests.attention.twins import randomize

DETECTORS = ["yolov5l", "yolov5m", "yolov5n", "yolov5s", "yolov5x"]
NAMES = sorted({*gam_flax.list_models()} - {*DETECTORS})
TINY = {
    "resnet8": {"layers": (1, 1), "widths": (4, 8), "num_classes": 3},
    "mobilenet_v2": {"width_mult": 0.1, "num_classes": 3},
}
SE = {"attention": "se", "attention_options": {"ratio": 2}}


def torch_net(name: str, **options: Any) -> torch.nn.Module:
    """With shapes alone."""
    with torch.device("meta"):
        return gam_torch.create_model(name, **options)


def flax_net(name: str, **options: Any) -> nnx.Module:
    """With shapes alone."""
    return nnx.eval_shape(lambda: gam_flax.create_model(name, rngs=nnx.Rngs(0), **options))


CREATE = [torch_net, flax_net]


def shapes(model: Any, side: int, call: str = "forward") -> Any:
    """What `model.call` returns for a picture of this side, as torch lays it out."""
    if isinstance(model, torch.nn.Module):
        x = torch.empty(2, model.in_channels, side, side, device="meta")
        y = getattr(model.eval(), call)(x)
        return [tuple(part.shape) for part in y] if isinstance(y, list) else tuple(y.shape)
    model.eval()
    graph, state = nnx.split(model)
    x = jax.ShapeDtypeStruct((2, side, side, model.in_channels), jnp.float32)
    call = "__call__" if call == "forward" else call
    y = jax.eval_shape(lambda state, x: getattr(nnx.merge(graph, state), call)(x), state, x)
    return [(*p.shape[::3], *p.shape[1:3]) for p in y] if isinstance(y, list) else y.shape


# Stages


@pytest.mark.parametrize("create", CREATE)
@pytest.mark.parametrize("name", NAMES)
def test_stages_say_what_stage_outputs_are(name, create):
    """For a side that all strides divide, and for the next one, which is rounded up."""
    model = create(name)
    side = 2 * model.stages[-1].stride
    even = [(2, s.channels, side // s.stride, side // s.stride) for s in model.stages]
    odd = [(2, s.channels, side // s.stride + 1, side // s.stride + 1) for s in model.stages]
    assert shapes(model, side, "stage_outputs") == even
    assert shapes(model, side + 1, "stage_outputs") == odd


@pytest.mark.parametrize("name", NAMES)
def test_stages_are_the_same_in_both_packages(name):
    ours, theirs = (create(name).stages for create in CREATE)
    assert [tuple(stage) for stage in ours] == [tuple(stage) for stage in theirs]


def test_stages_of_the_well_known():
    assert [tuple(s) for s in torch_net("resnet50").stages] == [
        (256, 4),
        (512, 8),
        (1024, 16),
        (2048, 32),
    ]
    assert [tuple(s) for s in torch_net("resnet20").stages] == [(16, 1), (32, 2), (64, 4)]
    strides = [stage.stride for stage in torch_net("mobilenet_v2").stages]
    assert strides == [2, 4, 8, 16, 16, 32, 32]


# Heads


def head(model: Any) -> Any:
    return model.classifier if "MobileNet" in type(model).__name__ else model.fc


@pytest.mark.parametrize("create", CREATE)
@pytest.mark.parametrize("name", TINY)
def test_no_head(name, create):
    """What comes out is what a head would see, also where the head is taken off later."""
    model = create(name, **TINY[name] | {"num_classes": 0})
    features = getattr(model, "last_channels", model.stages[-1].channels)
    assert head(model) is None and model.num_classes == 0
    assert shapes(model, 64) == (2, features)
    with_head = create(name, **TINY[name])
    reset(with_head, 0)
    assert shapes(with_head, 64) == (2, features)


def reset(model: Any, classes: int) -> None:
    if isinstance(model, torch.nn.Module):
        with torch.device("meta"):
            model.reset_classifier(classes)
    else:
        model.reset_classifier(classes, rngs=nnx.Rngs(1))


@pytest.mark.parametrize("before", [3, 0])
@pytest.mark.parametrize("create", CREATE)
@pytest.mark.parametrize("name", TINY)
def test_another_head(name, create, before):
    model = create(name, **TINY[name] | {"num_classes": before})
    reset(model, 7)
    assert model.num_classes == 7 and shapes(model, 64) == (2, 7)
    model.train()  # the new head has all it needs


@pytest.mark.parametrize("create", CREATE)
@pytest.mark.parametrize("name", TINY)
def test_a_negative_number_of_classes(name, create):
    message = r"num_classes must be 0 \(no head\) or more, got -1"
    with pytest.raises(ValueError, match=message):
        create(name, **TINY[name] | {"num_classes": -1})
    model = create(name, **TINY[name])
    with pytest.raises(ValueError, match=message):
        reset(model, -1)
    assert model.num_classes == 3 and shapes(model, 64) == (2, 3)


@pytest.mark.parametrize("classes", [3, 0])
@pytest.mark.parametrize("name", TINY)
def test_any_module_may_be_the_head(name, classes):
    where = "classifier" if name == "mobilenet_v2" else "fc"
    options = TINY[name] | {"num_classes": classes}
    theirs, ours = torch_net(name, **options), flax_net(name, **options)
    features = getattr(theirs, "last_channels", theirs.stages[-1].channels)
    with torch.device("meta"):
        setattr(theirs, where, torch.nn.Sequential(torch.nn.Linear(features, 5), torch.nn.GELU()))
    setattr(ours, where, nnx.Sequential(nnx.Linear(features, 5, rngs=nnx.Rngs(0)), nnx.gelu))
    assert shapes(theirs, 64) == shapes(ours, 64) == (2, 5)
    assert f"{where}.0.weight" in theirs.state_dict()
    assert f"{where}.0.kernel" in nnx_variables(ours)


# Presets


def test_the_names():
    assert gam_torch.list_models() == gam_flax.list_models() == sorted([*NAMES, *DETECTORS])
    cifar = ["resnet8", "resnet14", "resnet20", "resnet32", "resnet44", "resnet56"]
    imagenet = ["resnet18", "resnet34", "resnet50", "resnet101"]
    assert sorted([*cifar, *imagenet, "mobilenet_v2", "resnet50_gam_grouped"]) == NAMES


@pytest.mark.parametrize("create", CREATE)
@pytest.mark.parametrize(
    "name, size",
    [
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet44", 658_586),
        ("resnet56", 853_018),
    ],
)
def test_sizes_of_the_cifar_networks(name, size, create):
    """arXiv 1512.03385, table 6, has 0.27, 0.46, 0.66 and 0.85 million."""
    assert parameters(create(name, num_classes=10)) == size


def parameters(model: Any) -> int:
    if isinstance(model, torch.nn.Module):
        return sum(parameter.numel() for parameter in model.parameters())
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize("create", CREATE)
def test_the_grouped_resnet50(create):
    model = create("resnet50_gam_grouped")
    gams = [block.attention for i in (1, 2, 3, 4) for block in getattr(model, f"layer{i}")]
    assert len(gams) == 16
    for gam in gams:
        spatial = gam.spatial_attention
        assert (gam.ratio, gam.channel_gate, gam.shuffle) == (16, "sigmoid", "gate")
        assert spatial.conv1.kernel_size in ((7, 7), 7)
        groups = {
            getattr(conv, "groups", None) or conv.feature_group_count
            for conv in (spatial.conv1, spatial.conv2)
        }
        assert groups == {4}
    plain = create("resnet50_gam_grouped", attention="se", attention_options={})
    assert type(plain.layer1[0].attention).__name__ == "SqueezeExcitation"


@pytest.mark.parametrize("create", CREATE)
def test_mobilenet_with_attention_after_stages(create):
    model = create("mobilenet_v2", attention="gam", attention_at=[7, 3])
    after = {i for i in range(1, 8) if getattr(model, f"attention{i}", None) is not None}
    assert after == {3, 7} and model.attention_at == (7, 3)
    channels = [getattr(model, f"attention{i}").channels for i in (3, 7)]
    assert channels == [model.stages[2].channels, model.stages[6].channels] == [32, 320]
    assert all(model.features[i].attention is None for i in range(1, 18))
    inside = create("mobilenet_v2", attention="gam")
    assert [inside.features[i].attention.channels for i in (1, 2, 17)] == [16, 24, 320]
    with pytest.raises(ValueError, match=r"attention_at must be one of \[1, 2, 3.* got 8"):
        create("mobilenet_v2", attention="gam", attention_at=[8])


# Files


@pytest.mark.parametrize("at", ["blocks", (2, 7)], ids=str)
def test_a_mobilenet_saved_is_the_same_again(at, tmp_path):
    """Dropout included: what is loaded trains."""
    options = TINY["mobilenet_v2"] | SE | {"attention_at": at}
    model = gam_flax.create_model("mobilenet_v2", rngs=nnx.Rngs(0), **options)
    save(model, tmp_path / "a.safetensors")
    again = load(tmp_path / "a.safetensors")
    assert type(again) is type(model) and again.attention_at == at
    ours, theirs = to_torch(again), to_torch(model)
    assert list(ours) == list(theirs)
    assert all(ours[key].tobytes() == theirs[key].tobytes() for key in ours)
    x = jnp.ones((2, 64, 64, 3))
    for net in (model, again):
        net.eval()
    assert np.array_equal(again(x), model(x))
    again.train()
    first, second = again(x), again(x)
    assert np.isfinite(first).all() and not np.array_equal(first, second)  # masks differ


# Remat


def _loss(model: nnx.Module, x: Any):
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        twin = nnx.merge(graph, params, rest, copy=True)
        return jnp.sum(jnp.sin(twin(x))), nnx.state(twin, nnx.BatchStat)

    return jax.jit(jax.grad(loss, has_aux=True)), params


REMAT = {
    "resnet8": TINY["resnet8"] | SE,
    "mobilenet_v2": TINY["mobilenet_v2"] | {"dropout": 0.0},
}


PRODUCTS = ("convolution", "dot_general")


@pytest.mark.parametrize("name", ["resnet8", pytest.param("mobilenet_v2", marks=pytest.mark.slow)])
def test_remat_computes_more_and_finds_the_same(name):
    """XLA on a CPU merges what is computed twice, so the program is asked before it does."""
    state = gam_torch.create_model(name, **REMAT[name])
    randomize(state)
    found, products = {}, {}
    with jax.enable_x64(True):
        for remat in (False, True):
            options = REMAT[name] | {"remat": remat, "param_dtype": jnp.float64}
            model = flax_net(name, **options)
            load_torch(model, state)
            model.train()
            x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, 64, 3)))
            gradient, params = _loss(model, x)
            text = gradient.lower(params).as_text()
            products[remat] = sum(text.count(f"stablehlo.{op}") for op in PRODUCTS)
            found[remat] = jax.tree.leaves(gradient(params))
    assert products[True] > products[False]
    largest = max(float(np.abs(leaf).max()) for leaf in found[False])
    for ours, plain in zip(found[True], found[False], strict=True):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-12 * largest)
