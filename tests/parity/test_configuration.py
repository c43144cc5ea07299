"""The switches of both frameworks, set and put back, and what a reader is told of the models."""

from __future__ import annotations

import json
from collections.abc import Iterator

import jax
import pytest
import torch

from gam_flax.parity.configuration import (
    Configuration,
    _switches,
    check_configuration,
    comparison_settings,
)
from tests.parity.networks import linen_net, nnx_net, torch_net


@pytest.fixture(autouse=True)
def torch_as_it_starts() -> Iterator[None]:
    before = _switches()
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"
    torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True
    assert _switches() == before


def nothing() -> None:
    pass


def old_flags() -> None:
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = False


def new_flags() -> None:
    torch.backends.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def contradicting_flags() -> None:
    """After which torch raises when it is asked for the old one."""
    torch.backends.cudnn.conv.fp32_precision = "ieee"


@pytest.mark.parametrize("set_flags", [nothing, old_flags, new_flags, contradicting_flags])
@pytest.mark.parametrize("x64", [False, True])
def test_the_switches_are_set_and_put_back(set_flags, x64):
    set_flags()
    before = _switches()
    with torch.autocast("cpu"), torch.no_grad(), jax.numpy_dtype_promotion("strict"):
        inner = _switches()
        with comparison_settings(x64=x64):
            inside = _switches()
            torch.backends.cudnn.benchmark = True  # what a model may do
        assert _switches() == inner
    assert _switches() == before
    assert {v for k, v in inside.items() if k.split(".")[1] in ("generic", "cuda", "mkldnn")} == {
        "ieee"
    }
    expected = {
        "torch.float32_matmul_precision": "highest",
        "torch.cudnn.allow_tf32": "False",
        "torch.cudnn.benchmark": "False",
        "torch.autocast.cpu": "False",
        "torch.default_dtype": "float32",
        "torch.grad": "True",
        "torch.inference_mode": "False",
        "jax.enable_x64": str(x64),
        "jax.default_matmul_precision": "highest",
        "jax.numpy_dtype_promotion": "standard",
    }
    assert {name: inside[name] for name in expected} == expected


def test_the_old_flags_can_be_read_inside():
    with comparison_settings(x64=True):
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32


def test_they_are_put_back_after_an_exception():
    before = _switches()
    with jax.debug_nans(True), torch.inference_mode():
        with pytest.raises(KeyError), comparison_settings(x64=True, default_dtype="float64"):
            assert torch.get_default_dtype() == torch.float64
            assert not jax.config.jax_debug_nans and not torch.is_inference_mode_enabled()
            raise KeyError
        assert jax.config.jax_debug_nans and torch.is_inference_mode_enabled()
    assert _switches() == before


def test_an_unknown_dtype_leaves_everything_as_it_was():
    before = _switches()
    with pytest.raises(AttributeError), comparison_settings(x64=True, default_dtype="float99"):
        pass
    assert _switches() == before


def test_a_plain_pair_has_no_notes():
    model = torch_net()
    found = check_configuration(model, nnx_net(model))
    assert found.notes == ()
    assert (found.torch_mode, found.flax_mode) == ("train", "train")
    assert found.versions["torch"] == torch.__version__.partition("+")[0] or found.versions["torch"]
    assert found.versions["jax"] == jax.__version__ and found.versions["optax"]
    assert found.devices["torch"] == ("cpu",) and found.devices["jax"]
    assert found.threads["torch"] == torch.get_num_threads() and found.threads["jax"] >= 1
    assert (found.found["jax.enable_x64"], found.used["jax.enable_x64"]) == ("False", "True")
    narrow = check_configuration(model, linen_net(model), dtype="float32")
    assert narrow.used["jax.enable_x64"] == "False" and narrow.flax_mode is None


def test_mixed_modes_are_noted():
    model = torch_net().train()
    model.norm.eval()
    twin = nnx_net(model)
    found = check_configuration(model, twin)
    assert (found.torch_mode, found.torch_odd) == ("mixed", ("norm",))
    assert found.notes[0].startswith("torch: 1 of 10 layers differ in train or eval mode")
    assert "norm; the comparison sets them all alike" in found.notes[0]
    twin.eval()
    model.eval()
    found = check_configuration(model, twin)
    assert (found.torch_mode, found.flax_mode, found.notes) == ("eval", "eval", ())


def test_mixed_modes_of_an_nnx_model_are_noted():
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self):
            self.a, self.b = (nnx.BatchNorm(3, rngs=nnx.Rngs(0)) for _ in range(2))
            self.drop = nnx.Dropout(0.5)

    twin = Net()
    twin.b.eval()
    found = check_configuration(torch_net(), twin)
    assert (found.flax_mode, found.flax_odd) == ("mixed", ("b.use_running_average",))
    assert "b.use_running_average" in found.notes[0]


def test_what_a_reader_should_know():
    model = torch_net()
    twin = nnx_net(model)
    torch.nn.utils.parametrizations.weight_norm(model.conv1)
    model.conv2.register_forward_hook(lambda *_: None)
    model.fc.half().requires_grad_(False)
    old_flags()
    with torch.autocast("cpu"), jax.default_matmul_precision("bfloat16"):
        notes = check_configuration(model, twin).notes
    for expected in [
        "torch: float32 products were allowed in fewer bits (torch.float32_matmul_precision",
        "jax: matrix products were asked for in precision bfloat16",
        "torch: autocast was on",
        "torch: conv1: a weight is computed from others (a parametrization)",
        "torch: conv2: a hook runs with the layer",
        "torch: float16 weights: fc.weight, fc.bias",
        "torch: fc.weight, fc.bias: frozen",
    ]:
        assert sum(note.startswith(expected) for note in notes) == 1, expected
    assert len(notes) == 7


def test_wrappers_are_noted():
    model = torch_net()
    (note,) = check_configuration(torch.nn.DataParallel(model), nnx_net(model)).notes
    assert note == "torch: a parallel wrapper is around the model: compare its module"
    (note,) = check_configuration(torch.compile(model, backend="eager"), nnx_net(model)).notes
    assert note == "torch: torch.compile wraps the model: compare its _orig_mod"


def test_json():
    model = torch_net()
    found = check_configuration(model, nnx_net(model))
    assert json.loads(found.to_json())["versions"] == found.versions
    assert Configuration.from_json(found.to_json()) == found
