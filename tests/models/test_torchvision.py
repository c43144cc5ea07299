"""Beside torchvision itself: the same names, weights that go both ways, the same numbers."""

from __future__ import annotations

import warnings
from copy import deepcopy
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from flax import nnx

import gam_flax
import gam_torch
from gam_flax import cli
from gam_flax.convert import convert_file, load_torch, save, to_torch
from gam_flax.parity import compare
from tests.attention.twins import randomize
from tests.torchvision_oracle import torchvision_models

RESNETS = ["resnet18", "resnet34", "resnet50", "resnet101"]
NETWORKS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in RESNETS),
    *(("mobilenet_v2", {"width_mult": width}) for width in (0.35, 0.5, 1.0, 1.4)),
]
SLOW = pytest.mark.slow
WITH_NUMBERS = [
    ("resnet18", {}),
    ("mobilenet_v2", {"width_mult": 0.35, "dropout": 0.0}),
    pytest.param("resnet50", {}, marks=SLOW),
    pytest.param("mobilenet_v2", {"width_mult": 1.0, "dropout": 0.0}, marks=SLOW),
]
SIDES = [65, 64]


def torchvision_net(name: str, **options: Any) -> torch.nn.Module:
    """With shapes alone, on the meta device."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on the meta device nothing can be initialised
        return getattr(torchvision_models(), name)(num_classes=10, **options)


def torch_net(name: str, **options: Any) -> torch.nn.Module:
    """Ours, with shapes alone."""
    with torch.device("meta"):
        return gam_torch.create_model(name, num_classes=10, **options)


def flax_net(name: str, **options: Any) -> nnx.Module:
    """Ours, with shapes alone."""
    options = {"num_classes": 10, **options}
    return nnx.eval_shape(lambda: gam_flax.create_model(name, rngs=nnx.Rngs(0), **options))


def with_numbers(model: torch.nn.Module) -> torch.nn.Module:
    """`model` with numbers in it, none of them an initial value.

    Biases are small: with large ones the pixels of a deep network grow alike, and a norm that
    divides by next to nothing makes rounding errors of 1e-12 out of those of 1e-16.
    """
    model = model.to_empty(device="cpu")
    randomize(model)
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            tensor.mul_(0.2 if key.endswith("bias") else 1)
    return model


@cache
def judge(name: str, **options: Any) -> torch.nn.Module:
    """torchvision's network with numbers."""
    return with_numbers(torchvision_net(name, **options))


def as_ours(theirs: torch.nn.Module, name: str, **options: Any) -> torch.nn.Module:
    """Our torch network with the numbers of torchvision's."""
    ours = torch_net(name, **options).to_empty(device="cpu")
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours


def as_flax(theirs: torch.nn.Module, name: str, **options: Any) -> nnx.Module:
    """Our Flax network with the numbers of torchvision's."""
    ours = flax_net(name, **options)
    assert load_torch(ours, theirs).ok
    return ours


def pictures(side: int) -> np.ndarray:
    return np.random.default_rng(side).normal(size=(4, side, side, 3))


def shapes(model: torch.nn.Module) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Of every tensor, in the order of the state_dict."""
    return [(key, tuple(t.shape), t.dtype) for key, t in model.state_dict().items()]


def assert_same_tensors(ours: dict[str, Any], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert np.array_equal(ours[key], tensor.numpy()), key
        assert str(ours[key].dtype).split(".")[-1] == str(tensor.dtype).split(".")[-1], key


# Names


@pytest.mark.parametrize("name, options", NETWORKS, ids=str)
def test_the_same_keys_in_the_same_order(name, options):
    assert shapes(torch_net(name, **options)) == shapes(torchvision_net(name, **options))


@pytest.mark.parametrize("name, options", NETWORKS, ids=str)
def test_a_torchvision_state_dict_loads_strictly_and_back(name, options):
    """On the meta device: nothing is missing, unexpected or of another shape."""
    theirs, ours = torchvision_net(name, **options), torch_net(name, **options)
    ours.load_state_dict(theirs.state_dict(), strict=True, assign=True)
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)


def test_another_width_is_not_the_same_network():
    theirs = torchvision_net("mobilenet_v2", width_mult=1.4)
    assert shapes(torch_net("mobilenet_v2", width_mult=1.3)) != shapes(theirs)


# Weights


@pytest.mark.parametrize("as_module", [True, False], ids=["module", "state_dict"])
@pytest.mark.parametrize("name, options", WITH_NUMBERS, ids=str)
def test_torchvision_goes_into_flax_bit_for_bit(name, options, as_module):
    theirs, ours = judge(name, **options), flax_net(name, **options)
    report = load_torch(ours, theirs if as_module else theirs.state_dict())
    assert report.ok and not report.cast and not report.notes
    assert_same_tensors(to_torch(ours), theirs.state_dict())


@pytest.mark.parametrize("through", ["command", "function"])
@pytest.mark.parametrize("name, options", WITH_NUMBERS, ids=str)
def test_flax_goes_into_torchvision(name, options, through, tmp_path, monkeypatch):
    """Saved by Flax, ported to torch's format, loaded strictly by torchvision and by our twin."""
    judged = judge(name, **options)
    save(as_flax(judged, name, **options), tmp_path / "flax.safetensors")
    source, target = str(tmp_path / "flax.safetensors"), str(tmp_path / "torch.pt")
    if through == "command":
        monkeypatch.setattr("sys.argv", ["gam-flax", "convert", source, target, "--to", "torch"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 0
    else:
        convert_file(source, target, to="torch")
    state = torch.load(target, weights_only=True)["state_dict"]
    for model in (torchvision_net(name, **options), torch_net(name, **options)):
        model.to_empty(device="cpu").load_state_dict(state, strict=True)
        assert_same_tensors(model.state_dict(), judged.state_dict())


# Numbers


def run(model: torch.nn.Module, x: torch.Tensor, train: bool):
    """The output and the buffers after it, of a copy in float64."""
    model = deepcopy(model).double().train(train)
    with torch.no_grad():
        return model(x), dict(model.named_buffers())


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name, options", WITH_NUMBERS, ids=str)
def test_our_torch_network_computes_the_same(name, options, side, train):
    theirs = judge(name, **options)
    x = torch.from_numpy(pictures(side)).permute(0, 3, 1, 2)
    expected, statistics = run(theirs, x, train)
    y, own = run(as_ours(theirs, name, **options), x, train)
    assert_close(y, expected)
    assert list(own) == list(statistics)
    for key, value in statistics.items():
        assert_close(own[key], value)
    before = theirs.state_dict()
    assert all(torch.equal(before[key].to(value), value) != train for key, value in own.items())


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name, options", WITH_NUMBERS, ids=str)
def test_flax_computes_the_same(name, options, side, train):
    """Every layer, the output, and in training the running statistics; to 1e-12 of their scale."""
    theirs = judge(name, **options)
    ours = as_flax(theirs, name, **options)
    report = compare(theirs, ours, pictures(side), train=train, gradients=False)
    assert report.ok, str(report)
    layers = {row.path for row in report.rows if row.stage == "forward"}
    assert {key.rpartition(".")[0] for key in theirs.state_dict()} <= layers
    assert any(row.stage == "running statistics" for row in report.rows) == train


# Faults in torchvision's network, seen where they are


def _eps(net):
    net.layer2[0].bn1.eps = 1e-4


def _stride_in_the_shortcut(net):
    net.layer3[0].downsample[0].padding = (1, 1)
    net.layer3[0].downsample[0].kernel_size = (3, 3)
    padded = torch.nn.functional.pad(net.layer3[0].downsample[0].weight, (0, 2, 0, 2))
    net.layer3[0].downsample[0].weight = torch.nn.Parameter(padded)


def _one_channel(net):
    with torch.no_grad():
        net.layer1[1].conv2.weight[5] *= 1 + 1e-6


def _stem_pools_otherwise(net):
    net.maxpool.padding, net.maxpool.ceil_mode = 0, True


def _stride_in_the_first_convolution(net):
    """As the paper and Caffe have it; torchvision strides in the 3×3."""
    net.layer2[0].conv1.stride, net.layer2[0].conv2.stride = (2, 2), (1, 1)


FAULTS = [
    ("resnet18", _eps, "layer2.0.bn1"),
    ("resnet18", _stride_in_the_shortcut, "layer3.0.downsample.0"),
    ("resnet18", _one_channel, "layer1.1.conv2"),
    pytest.param("resnet18", _stem_pools_otherwise, "layer1.0.conv1", marks=SLOW),
    pytest.param("resnet50", _stride_in_the_first_convolution, "layer2.0.conv1", marks=SLOW),
]


@pytest.mark.parametrize("name, fault, where", FAULTS)
def test_a_fault_is_seen_where_it_is(name, fault, where):
    theirs = deepcopy(judge(name))
    ours = as_flax(theirs, name)
    fault(theirs)
    report = compare(theirs, ours, pictures(32), gradients=False)
    assert next(row.path for row in report.rows if row.stage == "forward" and not row.ok) == where
