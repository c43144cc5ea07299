"""A plain backbone into a network with attention: what is taken, what is kept, what is said."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax import nnx

import gam_flax
import gam_torch
from gam_flax import linen
from gam_flax.convert import CheckpointError, load_torch, load_torch_linen, to_torch
from tests.attention.twins import randomize

SIZES = {"layers": (1, 1), "widths": (4, 8), "num_classes": 3}
GAM = {"attention": "gam", "attention_options": {"ratio": 2, "kernel_size": 3}}
INSIDE = ["layer1.0.attention", "layer2.0.attention"]


def plain(**options: Any) -> torch.nn.Module:
    model = gam_torch.create_model("resnet8", **SIZES | options)
    randomize(model)
    return model


def flax_net(**options: Any) -> nnx.Module:
    return gam_flax.create_model("resnet8", rngs=nnx.Rngs(0), **SIZES | options)


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return model.state_dict()


def under(key: str, layers: list[str]) -> bool:
    return any(key.startswith(f"{layer}.") for layer in layers)


def assert_filled(after: dict, before: dict, source: dict, kept: list[str]) -> None:
    """What lies under `kept` is as it was, all else is the source's, bit for bit."""
    assert set(after) == set(before)
    assert {key for key in after if not under(key, kept)} == {
        k for k in source if not under(k, kept)
    }
    for key, array in after.items():
        expected = before[key] if under(key, kept) else source[key].numpy()
        assert array.tobytes() == expected.tobytes(), key


def assert_raises_and_changes_nothing(
    model: nnx.Module, call: Callable[[], Any], error: type, message: str
) -> None:
    before = {key: array.tobytes() for key, array in to_torch(model).items()}
    with pytest.raises(error, match=message):
        call()
    assert {key: array.tobytes() for key, array in to_torch(model).items()} == before


# keep


@pytest.mark.parametrize(
    "options, kept",
    [(GAM, INSIDE), (GAM | {"attention_at": (2,)}, ["attention2"])],
    ids=["blocks", "stages"],
)
def test_a_plain_backbone_goes_into_a_network_with_attention(options, kept):
    source, model = plain(), flax_net(**options)
    before = to_torch(model)
    report = load_torch(model, source, keep=["attention"])
    assert_filled(to_torch(model), before, state(source), kept)
    assert report.ok and report.kept == kept
    assert set(report.mapped) == set(state(source))
    assert not (report.left or report.missing or report.unexpected or report.notes)
    said = f"{len(state(source))} tensors converted\n"
    said += f"{len(kept)} ({', '.join(kept)}): keep their initialisation"
    assert str(report) == said


@pytest.mark.parametrize("kind", ["cbam", "se", "bam"])
def test_every_kind_of_attention_is_meant(kind):
    model = flax_net(attention=kind, attention_options={"ratio": 2})
    report = load_torch(model, plain(), keep=["attention"])
    assert report.ok and report.kept == INSIDE


def test_attention_and_head_are_kept_though_the_source_has_a_head():
    source, model = plain(num_classes=9), flax_net(**GAM)
    before = to_torch(model)
    report = load_torch(model, source, keep=["attention", "fc"])
    kept = [*INSIDE, "fc"]
    assert sorted(report.kept) == sorted(kept) and report.ok
    assert report.left == ["fc.weight", "fc.bias"]
    assert not report.unexpected and not report.mismatched
    assert_filled(to_torch(model), before, state(source), kept)
    lines = str(report).splitlines()
    assert lines[2:] == ["2 (fc.weight, fc.bias): left in the source"]
    assert "unexpected" not in str(report)


def test_attention_of_the_source_is_left_where_ours_is_kept():
    """Nor is its variant asked for: nothing of it is read."""
    source = plain(**GAM)
    model = flax_net(**GAM)
    before = to_torch(model)
    report = load_torch(model, state(source), keep=["attention"])
    assert_filled(to_torch(model), before, state(source), INSIDE)
    assert report.left == [key for key in state(source) if under(key, INSIDE)]
    assert report.ok and report.variants == {}


def test_one_block_alone_may_be_kept():
    source = plain(**GAM)
    model = flax_net(**GAM)
    before = to_torch(model)
    report = load_torch(model, source, keep=["layer2.0.attention"])
    assert report.kept == ["layer2.0.attention"]
    assert_filled(to_torch(model), before, state(source), ["layer2.0.attention"])


def test_what_lies_under_a_kept_layer_is_named_once():
    report = load_torch(flax_net(**GAM), plain(), keep=["attention", "layer2", "layer2.0"])
    assert report.kept == ["layer1.0.attention", "layer2"]


def test_keep_does_not_hide_what_else_is_wrong():
    source = state(plain())
    del source["layer1.0.conv1.weight"]
    source["extra.weight"] = torch.zeros(2)
    model = flax_net(**GAM)
    message = "missing layer1.0.conv1.weight; unexpected extra.weight"
    assert_raises_and_changes_nothing(
        model, lambda: load_torch(model, source, keep=["attention"]), CheckpointError, message
    )
    report = load_torch(model, source, keep=["attention"], strict=False)
    assert not report.ok
    assert (report.missing, report.unexpected) == (["layer1.0.conv1.weight"], ["extra.weight"])


@pytest.mark.parametrize(
    "keep, error, message",
    [
        (["fc2"], CheckpointError, "keep: the model has no layer 'fc2'"),
        (["attention", "layer1.0.conv"], CheckpointError, "no layer 'layer1.0.conv'"),
        (["fc.weight"], CheckpointError, "no layer 'fc.weight'"),
        ("fc", TypeError, r"keep wants a list of layers, such as \['fc'\]"),
    ],
)
def test_wrong_words_in_keep(keep, error, message):
    model = flax_net(**GAM)
    assert_raises_and_changes_nothing(
        model, lambda: load_torch(model, plain(), keep=keep), error, message
    )


def test_attention_is_kept_only_where_there_is_some():
    model = flax_net()
    call = lambda: load_torch(model, plain(), keep=["attention"])  # noqa: E731
    message = "keep: the model has no attention block"
    assert_raises_and_changes_nothing(model, call, CheckpointError, message)


def test_the_error_says_what_would_help():
    model = flax_net(**GAM)
    advice = re.escape('keep=["attention"] leaves the attention as it is')
    assert_raises_and_changes_nothing(
        model, lambda: load_torch(model, plain()), CheckpointError, advice
    )
    source = state(plain())
    del source["fc.bias"]
    with pytest.raises(CheckpointError) as raised:
        load_torch(model, source)
    assert "keep=" not in str(raised.value)  # it would not help


def test_shapes_alone_have_nothing_to_keep():
    model = nnx.eval_shape(lambda: flax_net(**GAM))
    with pytest.raises(CheckpointError, match="the model holds shapes alone"):
        load_torch(model, plain(), keep=["attention"])
    assert all(
        isinstance(variable.get_value(), jax.ShapeDtypeStruct)
        for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))
    )


# rename


KUANGLIU = {"fc": "linear", "layer2.0.downsample": "layer2.0.shortcut"}


def as_named(source: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    """The tensors with other names for these layers."""
    renamed = {}
    for key, tensor in source.items():
        old = next((name for name in names if under(key, [name])), "")
        renamed[names.get(old, old) + key[len(old) :]] = tensor
    return renamed


@pytest.mark.parametrize("keep", [[], ["attention"], ["attention", "fc"]], ids=str)
def test_names_that_circulate_are_known(keep):
    source = plain()
    model = flax_net(**GAM if keep else {})
    report = load_torch(model, as_named(state(source), KUANGLIU), keep=keep)
    assert report.ok
    assert {note for note in report.notes if "is read as" in note} == {
        "linear is read as fc",
        "layer2.0.shortcut.0 is read as layer2.0.downsample.0",
        "layer2.0.shortcut.1 is read as layer2.0.downsample.1",
    }
    filled = to_torch(model)
    for key, tensor in state(source).items():
        if not under(key, report.kept):
            assert filled[key].tobytes() == tensor.numpy().tobytes(), key
    assert report.left == (["fc.weight", "fc.bias"] if "fc" in keep else [])


OWN = {"conv1": "stem.conv", "layer1": "body.a", "layer2": "body.b"}
BACK = {name: ours for ours, name in OWN.items()}


def _function(path: str) -> str:
    for name, ours in BACK.items():
        if path == name or path.startswith(f"{name}."):
            return ours + path[len(name) :]
    return path


@pytest.mark.parametrize("rename", [BACK, _function], ids=["mapping", "function"])
@pytest.mark.parametrize("options, keep", [({}, []), (GAM, ["attention"])], ids=["plain", "gam"])
def test_rename(rename, options, keep):
    source, model = plain(), flax_net(**options)
    before = to_torch(model)
    named = as_named(state(source), OWN)
    report = load_torch(model, named, rename=rename, keep=keep)
    assert report.ok
    assert_filled(to_torch(model), before, state(source), report.kept)
    other = flax_net(**options)
    call = lambda: load_torch(other, named, keep=keep)  # noqa: E731
    assert_raises_and_changes_nothing(other, call, CheckpointError, "unexpected stem.conv.weight")


def test_rename_and_names_that_circulate_work_together():
    names = {**KUANGLIU, "conv1": "stem"}
    report = load_torch(flax_net(), as_named(state(plain()), names), rename={"stem": "conv1"})
    assert report.ok


def test_two_layers_of_one_name():
    model, source = flax_net(), plain()
    assert_raises_and_changes_nothing(
        model,
        lambda: load_torch(model, source, rename={"layer2.0.conv2": "layer2.0.conv1"}),
        CheckpointError,
        "rename gives two tensors the name layer2.0.conv1.weight",
    )


# Linen


class Net(nn.Module):
    """A layer, an attention block, a head; as torch names them."""

    with_attention: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(4, (3, 3), padding=1, name="conv")(x)
        if self.with_attention:
            x = linen.GAM(ratio=2, kernel_size=3, name="attention")(x)
        return nn.Dense(3, name="fc")(x.mean((1, 2)))


def linen_net(**options: Any) -> dict[str, Any]:
    return Net(**options).init(jax.random.key(0), jnp.zeros((1, 5, 5, 3)))


def small_source() -> torch.nn.Module:
    source = torch.nn.Sequential()
    source.conv, source.fc = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Linear(4, 3)
    randomize(source)
    return source


@pytest.mark.parametrize("keep", [["attention"], ["attention", "fc"]], ids=str)
def test_linen_keeps_alike(keep):
    source, variables = small_source(), linen_net()
    before = to_torch(variables)
    filled, report = load_torch_linen(variables, source, keep=keep)
    assert report.ok and sorted(report.kept) == sorted(keep)
    left = ["fc.weight", "fc.bias"] if "fc" in keep else []
    assert report.left == left and not report.unexpected
    assert_filled(to_torch(filled), before, state(source), keep)
    assert jax.tree.structure(filled) == jax.tree.structure(variables)
    now = to_torch(variables)
    assert all(np.array_equal(now[key], before[key]) for key in before)


def test_linen_renames_alike():
    source = small_source()
    named = as_named(state(source), {"conv": "features.0", "fc": "head"})
    for rename in ({"features.0": "conv", "head": "fc"}, lambda path: LINEN_NAMES.get(path, path)):
        variables, report = load_torch_linen(linen_net(), named, rename=rename, keep=["attention"])
        assert report.ok and report.kept == ["attention"]
        for key, tensor in state(source).items():
            assert to_torch(variables)[key].tobytes() == tensor.numpy().tobytes()


LINEN_NAMES = {"features.0": "conv", "head": "fc"}


def test_linen_gives_the_same_errors():
    variables, source = linen_net(), small_source()
    with pytest.raises(CheckpointError, match=r'keep=\["attention"\]'):
        load_torch_linen(variables, source)
    with pytest.raises(CheckpointError, match="keep: the model has no layer 'head'"):
        load_torch_linen(variables, source, keep=["head"])
    with pytest.raises(TypeError, match="keep wants a list"):
        load_torch_linen(variables, source, keep="fc")
    with pytest.raises(CheckpointError, match="no attention block"):
        load_torch_linen(linen_net(with_attention=False), source, keep=["attention"])


def test_linen_shapes_alone_have_nothing_to_keep():
    variables = jax.eval_shape(lambda: linen_net())
    with pytest.raises(CheckpointError, match="shapes alone"):
        load_torch_linen(variables, small_source(), keep=["attention"])


def test_linen_counters_that_a_file_lacks_begin_at_zero():
    """Also where the variables are shapes alone."""
    module = linen.create_attention("gam", variant="reference", ratio=2, kernel_size=3)
    source = gam_torch.create_attention("gam", 4, variant="reference", ratio=2, kernel_size=3)
    old = {key: t for key, t in state(source).items() if "num_batches" not in key}
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 5, 5, 4)))
    filled, report = load_torch_linen(variables, old, variant="reference")
    assert report.ok
    assert module.apply(filled, jnp.ones((2, 5, 5, 4)), train=True, mutable=["batch_stats"])
    assert not to_torch(filled)["spatial_attention.norm1.num_batches_tracked"]
