"""Summaries: known totals, a network counted by hand, and the same rows on both sides."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import gam_flax
import gam_torch
from gam_flax.attention.common import PointwiseConv
from gam_torch.attention.common import PointwiseConv as TorchPointwiseConv


def torch_model(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return gam_torch.create_model(name, **options)


def flax_model(name: str, **options) -> nnx.Module:
    return nnx.eval_shape(lambda: gam_flax.create_model(name, rngs=nnx.Rngs(0), **options))


def both(name: str, side: int, batch: int = 1, **options):
    return (
        gam_torch.summarize(torch_model(name, **options), (batch, 3, side, side)),
        gam_flax.summarize(flax_model(name, **options), (batch, side, side, 3)),
    )


def channels_last(shape):
    return shape and (shape[0], *shape[2:], shape[1])


def figures(summary):
    return [(row.path, row.calls, row.parameters, row.multiply_adds) for row in summary.rows]


def assert_same(ours, theirs):
    """The rows of a torch summary and of its twin's."""
    assert figures(ours) == figures(theirs)
    for row, twin in zip(ours.rows, theirs.rows, strict=True):
        # a linear layer inside a permuted tensor has its channels last in torch, too
        assert twin.output_shape in (row.output_shape, channels_last(row.output_shape)), row.path


@pytest.mark.parametrize(
    "name, parameters, multiply_adds",
    [
        ("resnet18", 11_689_512, 1_814_073_344),
        ("resnet34", 21_797_672, 3_663_761_408),
        ("resnet50", 25_557_032, 4_089_184_256),
        ("mobilenet_v2", 3_504_872, 300_774_272),
    ],
)
def test_totals_of_torchvision(name, parameters, multiply_adds):
    """The figures that torchvision publishes with its weights, `num_params` and `_ops`."""
    for summary in both(name, 224):
        assert (summary.parameters, summary.multiply_adds) == (parameters, multiply_adds)


@pytest.mark.parametrize("attention", [None, "gam", "cbam", "se", "bam"])
@pytest.mark.parametrize("attention_at", ["blocks", (1, 3)])
def test_twins_have_the_same_rows(attention, attention_at):
    options = {"attention": attention, "attention_at": attention_at, "num_classes": 5}
    assert_same(*both("resnet8", 32, **options))


def test_larger_twins_have_the_same_rows():
    assert_same(*both("resnet50_gam_grouped", 64, batch=2))
    assert_same(*both("mobilenet_v2", 64, attention="gam"))
    assert_same(*both("resnet18", 33, attention="se", attention_options={"projection": "conv"}))


class TorchNet(nn.Module):
    def __init__(self, groups: int = 2):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(7))
        self.conv = nn.Conv2d(4, 6, (3, 5), 2, padding=(1, 2), dilation=(1, 1), groups=groups)
        self.wide = nn.Conv2d(6, 6, 3, dilation=2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 3, 2, stride=2)
        self.fc = nn.Linear(3, 3)
        self.point = TorchPointwiseConv(3, 2)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.fc.weight

    def forward(self, x):
        x = self.up(self.norm(self.wide(self.conv(x)))).mean((2, 3))
        return self.point(self.fc(self.fc(x))) + self.token[0]


class FlaxNet(nnx.Module):
    def __init__(self, groups: int = 2):
        rngs = nnx.Rngs(0)
        pads = ((1, 1), (2, 2))
        self.token = nnx.Param(jnp.zeros(7))
        self.conv = nnx.Conv(4, 6, (3, 5), 2, padding=pads, feature_group_count=groups, rngs=rngs)
        self.wide = nnx.Conv(
            6, 6, (3, 3), padding=((0, 0), (0, 0)), kernel_dilation=2, use_bias=False, rngs=rngs
        )
        self.norm = gam_flax.BatchNorm(6)
        self.up = nnx.ConvTranspose(6, 3, (2, 2), 2, padding=((1, 1), (1, 1)), rngs=rngs)
        self.fc = nnx.Linear(3, 3, rngs=rngs)
        self.point = PointwiseConv(3, 2, rngs=rngs)
        self.tied = nnx.Linear(3, 3, rngs=rngs)
        self.tied.kernel = self.fc.kernel

    def __call__(self, x):
        x = self.up(self.norm(self.wide(self.conv(x)))).mean((1, 2))
        return self.point(self.fc(self.fc(x))) + self.token[0]


BY_HAND = [  # a picture of 16×20 → conv, 8×10 → wide, 4×6 → up, 8×12
    ("", 1, 7, 0),
    ("conv", 1, 6 * 2 * 15 + 6, 6 * 2 * 15 * 80),
    ("wide", 1, 6 * 6 * 9, 6 * 6 * 9 * 24),
    ("norm", 1, 12, 0),
    ("up", 1, 6 * 3 * 4 + 3, 6 * 3 * 4 * 24),
    ("fc", 2, 3 * 3 + 3, 2 * 3 * 3),
    ("point", 1, 3 * 2 + 2, 3 * 2),
    ("tied", 0, 3, 0),
]


@pytest.mark.parametrize("batch", [1, 3])
def test_counted_by_hand(batch):
    """Grouped, dilated, strided, transposed; called twice, never, tied, held by the model."""
    ours = gam_torch.summarize(TorchNet(), (batch, 4, 16, 20))
    theirs = gam_flax.summarize(FlaxNet(), (batch, 16, 20, 4))
    assert figures(ours) == figures(theirs) == BY_HAND
    assert_same(ours, theirs)
    assert ours.parameters == sum(p.numel() for p in TorchNet().parameters())
    assert ours.rows[4].output_shape == (batch, 3, 8, 12) and ours.rows[-1].output_shape is None


def test_a_wrong_number_of_groups_shows():
    ours = gam_torch.summarize(TorchNet(), (1, 4, 16, 20))
    theirs = gam_flax.summarize(FlaxNet(groups=1), (1, 16, 20, 4))
    differ = [a for a, b in zip(figures(ours), figures(theirs), strict=True) if a != b]
    assert [row[0] for row in differ] == ["conv"]


def test_the_torch_model_stays_as_it_is():
    model = gam_torch.create_model("resnet8", attention="cbam", num_classes=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    summary = gam_torch.summarize(model, (2, 3, 32, 32))
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.device("meta"):
        shapes = gam_torch.create_model("resnet8", attention="cbam", num_classes=3)
    assert gam_torch.summarize(shapes, (2, 3, 32, 32)) == summary
    assert gam_torch.summarize(model.double(), (2, 3, 32, 32)) == summary


def test_the_flax_model_stays_as_it_is():
    model = gam_flax.create_model("resnet8", attention="cbam", num_classes=3, rngs=nnx.Rngs(0))
    before = jax.tree.map(np.array, nnx.state(model))
    graph = nnx.graphdef(model)
    summary = gam_flax.summarize(model, (2, 32, 32, 3))
    assert nnx.graphdef(model) == graph  # classes and modes, too
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
    shapes = flax_model("resnet8", attention="cbam", num_classes=3)
    assert gam_flax.summarize(shapes, (2, 32, 32, 3)) == summary


def test_remat_counts_alike():
    plain = gam_flax.summarize(flax_model("resnet8"), (1, 32, 32, 3))
    remat = gam_flax.summarize(flax_model("resnet8", remat=True), (1, 32, 32, 3))
    assert (remat.parameters, remat.multiply_adds) == (plain.parameters, plain.multiply_adds)


class Jitted(nnx.Module):
    def __init__(self):
        self.fc = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

    @nnx.jit
    def inner(self, x):
        return self.fc(x)

    def __call__(self, x):
        return self.inner(x)


def test_what_cannot_be_counted_is_said():
    for _ in range(2):  # also when jit has traced it before
        with pytest.raises(ValueError, match="Linear is called inside a transformation"):
            gam_flax.summarize(Jitted(), (1, 3))
    for summarize, model in (
        (gam_torch.summarize, torch_model("resnet8")),
        (gam_flax.summarize, flax_model("resnet8")),
    ):
        with pytest.raises(ValueError, match="an image or more"):
            summarize(model, (0, 3, 32, 32))


class Parts(nn.Module):
    """A list is never called, what is in it is."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(1000, 3), nn.Linear(3, 3)])

    def forward(self, x):
        for part in self.parts:
            x = part(x)
        return x


class FlaxParts(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.parts = nnx.List([nnx.Linear(1000, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)])

    def __call__(self, x):
        for part in self.parts:
            x = part(x)
        return x


@pytest.mark.parametrize(
    "summarize, net", [(gam_torch.summarize, Parts), (gam_flax.summarize, FlaxParts)]
)
def test_the_table_has_sums_and_totals(summarize, net):
    summary, kind = summarize(net(), (2, 1000)), net.__name__
    lines = [line.split() for line in str(summary).splitlines() if line.strip(" ─")]
    assert lines == [
        ["layer", "kind", "output", "parameters", "multiply-adds"],
        ["parts", "3,015", "3,009"],
        ["0", "Linear", "2×3", "3,003", "3,000"],
        ["1", "Linear", "2×3", "12", "9"],
        ["total", kind, "2×3", "3,015", "3,009"],
    ]


def test_json_is_the_same_but_for_kinds_and_layout():
    ours, theirs = (json.loads(summary.to_json()) for summary in both("resnet8", 32))
    for told in (ours, theirs):
        for row in told["rows"]:
            del row["kind"], row["output_shape"]
    assert ours == theirs
    assert ours["parameters"] == sum(row["parameters"] for row in ours["rows"])
