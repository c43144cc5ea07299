"""ResNet and its twin: names, shapes, sizes; most of it without computing anything."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import gam_flax
import gam_torch
from gam_flax.convert.leaves import to_torch_layout, torch_name
from gam_flax.models.registry import MODELS
from gam_torch.models.registry import MODELS as TORCH

TINY = {"layers": (1, 2), "widths": (4, 8), "num_classes": 5}


def torch_model(name: str, **options) -> torch.nn.Module:
    with torch.device("meta"):
        return gam_torch.create_model(name, **options)


def flax_model(name: str, **options) -> nnx.Module:
    return nnx.eval_shape(lambda: gam_flax.create_model(name, rngs=nnx.Rngs(0), **options))


def shapes(model) -> dict[str, tuple[int, ...]]:
    """Of every tensor, under torch's name and in its layout."""
    if isinstance(model, torch.nn.Module):
        return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        name = ".".join(map(str, path))
        array = np.broadcast_to(np.zeros(()), leaf.shape)
        found[torch_name(name)] = to_torch_layout(name, array).shape
    return found


def parameters(model) -> int:
    if isinstance(model, torch.nn.Module):
        return sum(parameter.numel() for parameter in model.parameters())
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def torchvision_keys(depths: list[int], convolutions: int):
    """The keys of torchvision's ResNet: a stage opens with a `downsample` where shapes change."""
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    keys = {"conv1.weight", "fc.weight", "fc.bias", *(f"bn1.{leaf}" for leaf in norm)}
    for stage, depth in enumerate(depths, 1):
        for i in range(depth):
            block = f"layer{stage}.{i}"
            for k in range(1, convolutions + 1):
                keys |= {f"{block}.conv{k}.weight", *(f"{block}.bn{k}.{leaf}" for leaf in norm)}
            if i == 0 and (stage > 1 or convolutions == 3):  # layer1 of a basic net keeps its shape
                downsample = {f"{block}.downsample.1.{leaf}" for leaf in norm}
                keys |= {f"{block}.downsample.0.weight", *downsample}
    return keys


@pytest.mark.parametrize("create", [torch_model, flax_model])
@pytest.mark.parametrize(
    "name, depths, convolutions, size",
    [
        ("resnet18", [2, 2, 2, 2], 2, 11_689_512),
        ("resnet34", [3, 4, 6, 3], 2, 21_797_672),
        ("resnet50", [3, 4, 6, 3], 3, 25_557_032),
        ("resnet101", [3, 4, 23, 3], 3, 44_549_160),
    ],
)
def test_names_and_sizes_of_torchvision(create, name, depths, convolutions, size):
    model = create(name)
    assert set(shapes(model)) == torchvision_keys(depths, convolutions)
    assert parameters(model) == size


@pytest.mark.parametrize("create", [torch_model, flax_model])
@pytest.mark.parametrize(
    "name, options, millions",
    [
        ("resnet18", {"attention": "gam"}, 16.04),
        ("resnet50", {"attention": "gam", "stem": "cifar", "num_classes": 100}, 149.47),
        ("resnet50", {"stem": "cifar", "num_classes": 100}, 23.71),
        ("resnet50", {"attention": "se", "stem": "cifar", "num_classes": 100}, 26.22),
        ("resnet50", {"attention": "cbam", "stem": "cifar", "num_classes": 100}, 26.24),
        (
            "resnet50",
            {"attention": "bam", "attention_at": [1, 2, 3], "stem": "cifar", "num_classes": 100},
            24.06,
        ),
    ],
    ids=str,
)
def test_sizes_in_the_tables_of_the_paper(create, name, options, millions):
    assert parameters(create(name, **options)) / 1e6 == pytest.approx(millions, rel=1e-3)


@pytest.mark.parametrize("attention_at", ["blocks", [2, 1]], ids=str)
@pytest.mark.parametrize("attention", [None, "gam", "cbam", "se", "bam"])
@pytest.mark.parametrize(
    "block, shortcut", [("basic", "projection"), ("basic", "pad"), ("bottleneck", "projection")]
)
def test_every_tensor_has_its_twin(attention, attention_at, block, shortcut):
    options = TINY | {"attention": attention, "attention_at": attention_at, "block": block}
    options |= {"shortcut": shortcut, "stem": "cifar", "in_channels": 1}
    if attention:
        options["attention_options"] = {"ratio": 2}
    ours = shapes(flax_model("resnet18", **options))
    assert ours == shapes(torch_model("resnet18", **options))
    inside = {key.partition(".attention.")[0] for key in ours if ".attention." in key}
    after = {key.partition(".")[0] for key in ours if key.startswith("attention")}
    if attention is None:
        assert not inside and not after
    elif attention_at == "blocks":
        assert inside == {"layer1.0", "layer2.0", "layer2.1"} and not after
    else:
        assert after == {f"attention{stage}" for stage in attention_at} and not inside


@functools.cache
def pair(stem: str, shortcut: str):
    options = TINY | {"stem": stem, "shortcut": shortcut}
    return nnx.split(flax_model("resnet18", **options)), torch_model("resnet18", **options).eval()


@pytest.mark.parametrize("stem", ["imagenet", "cifar"])
@pytest.mark.parametrize("shortcut", ["projection", "pad"])
@settings(max_examples=10)
@given(size=st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(1, 70)))
def test_odd_and_even_sides_give_the_same_shapes(stem, shortcut, size):
    (graph, state), twin = pair(stem, shortcut)
    x = jax.ShapeDtypeStruct((*size, 3), jnp.float32)

    def both(state, x):
        model = nnx.merge(graph, state)
        model.eval()
        return model.stage_outputs(x), model(x)

    features, y = jax.eval_shape(both, state, x)
    expected = twin.stage_outputs(torch.empty(size[0], 3, *size[1:], device="meta"))
    moved = [(b, h, w, c) for b, c, h, w in (stage.shape for stage in expected)]
    assert [stage.shape for stage in features] == moved
    assert y.shape == (size[0], 5)


def test_gam_is_the_papers_but_for_its_options():
    def gates(**options):
        model = flax_model("resnet18", **TINY | {"widths": (16, 32)}, attention="gam", **options)
        gam = model.layer1[0].attention
        return gam.channel_gate, gam.ratio, gam.kernel_size

    assert gates() == ("sigmoid", 16, 7)
    assert gates(attention_options={"ratio": 4, "kernel_size": 3}) == ("sigmoid", 4, 3)
    assert gates(attention_options={"variant": "reference"}) == ("identity", 4, 7)


@pytest.mark.parametrize("package", [gam_torch, gam_flax])
def test_attention_may_be_a_factory(package):
    calls = []

    def factory(channels, *, ratio, **types):
        calls.append((channels, ratio, sorted(types)))
        return package.SqueezeExcitation(channels, ratio=ratio, **types)

    create = torch_model if package is gam_torch else flax_model
    create("resnet18", **TINY, attention=factory, attention_options={"ratio": 2})
    types = [] if package is gam_torch else ["dtype", "param_dtype", "rngs"]
    assert calls == [(4, 2, types), (8, 2, types), (8, 2, types)]


def _half_gam(channels, **types):
    return gam_flax.GAM(channels, ratio=2, **types)


def test_types_reach_every_layer():
    model = flax_model("resnet18", **TINY, attention=_half_gam, param_dtype=jnp.bfloat16)
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        if path[-1] != "num_batches_tracked":
            wide = path[-1] in ("mean", "var")  # statistics stay float32
            assert leaf.dtype == (jnp.float32 if wide else jnp.bfloat16), path


def test_trains_under_jit_and_after_split_and_merge():
    """With arguments that are no constants: a network keeps them where jit wants constants."""
    model = gam_flax.create_model(
        "resnet8",
        layers=[1, 1],
        widths=[4, 8],
        attention="gam",
        attention_options={"ratio": 2, "kernel_size": 3, "norm_eps": 1e-3},
        attention_at=[2],
        num_classes=3,
        rngs=nnx.Rngs(0),
    )
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    assert hash(graph) == hash(nnx.graphdef(model))  # as nnx.jit wants it
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 8, 3)), jnp.float32)

    @jax.jit
    def step(params, rest):
        def loss(params):
            model = nnx.merge(graph, params, rest, copy=True)
            return jnp.sum(model(x) ** 2), nnx.state(model, nnx.BatchStat)

        (value, rest), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return value, jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradients), rest

    first, params, rest = step(params, rest)
    second, params, rest = step(params, rest)
    assert second < first
    assert nnx.merge(graph, params, rest).attention2.spatial_attention.norm1.eps == 1e-3


WRONG = [
    ({"attention_at": [3]}, r"attention_at must be one of \[1, 2\], got 3"),
    ({"attention_at": [0, 1]}, r"attention_at must be one of \[1, 2\], got 0"),
    ({"layers": (1, 1, 1)}, "3 stages in layers, 2 in widths"),
    ({"block": "wide"}, "block must be one of .*'basic', 'bottleneck'.* got 'wide'"),
    ({"stem": "mnist"}, "stem must be one of .*'imagenet', 'cifar'.* got 'mnist'"),
    ({"shortcut": "none"}, "shortcut must be one of .*'projection', 'pad'.* got 'none'"),
    ({"attention": "eca"}, r"name must be one of \['bam', 'cbam', 'gam', 'se'\], got 'eca'"),
    ({"attention": "gam"}, "ratio 16 leaves no channel of 4"),
]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("create", [torch_model, flax_model])
@pytest.mark.parametrize("options, message", WRONG)
def test_wrong_arguments(create, options, message):
    with pytest.raises(ValueError, match=message):
        create("resnet18", **TINY | options)


@pytest.mark.parametrize("create", [torch_model, flax_model])
def test_registry(create):
    listed = gam_flax.list_models()
    assert listed == gam_torch.list_models() == sorted(MODELS)
    presets = [{name: (m[0].__name__, m[1]) for name, m in t.items()} for t in (MODELS, TORCH)]
    assert presets[0] == presets[1]
    for name in listed:
        assert create(name, num_classes=7).num_classes == 7
    with pytest.raises(ValueError, match="'resnet18'.* got 'resnet19'"):
        create("resnet19")
