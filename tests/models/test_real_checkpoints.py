"""Networks that others trained: ported, compared, and right about real photographs."""

from __future__ import annotations

import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import gam_flax
import gam_torch
from gam_flax import cli
from gam_flax.convert import ConversionReport, convert_file, load_torch, to_torch
from gam_flax.parity import ParityReport, compare
from tests.models.real import CLASSES, MOBILENET, RESNET20, batch, checkpoint
from tests.torchvision_oracle import torchvision_models

FILES = {"mobilenet_v2": MOBILENET, "resnet20": RESNET20}
OPTIONS = {"mobilenet_v2": {}, "resnet20": {"num_classes": 10}}
SIDE = {"mobilenet_v2": 96, "resnet20": 32}
NAMES = list(FILES)


def empty_net(name: str, **options) -> nnx.Module:
    """Ours in Flax, shapes alone."""
    options = {**OPTIONS[name], **options}
    return nnx.eval_shape(lambda: gam_flax.create_model(name, rngs=nnx.Rngs(0), **options))


@cache
def _loaded(name: str) -> tuple[nnx.Module, ConversionReport]:
    model = empty_net(name)
    report = load_torch(model, checkpoint(FILES[name]))
    model.eval()
    return model, report


def flax_net(name: str) -> nnx.Module:
    """Filled from the file; the caller's own."""
    return nnx.clone(_loaded(name)[0])


def torch_net(name: str) -> torch.nn.Module:
    """Our torch network with what the Flax one read from the file."""
    with torch.device("meta"):
        model = gam_torch.create_model(name, **OPTIONS[name])
    model = model.to_empty(device="cpu").eval()
    state = {key: torch.tensor(array) for key, array in to_torch(flax_net(name)).items()}
    model.load_state_dict(state, strict=True)
    return model


def raw_file(name: str) -> dict[str, torch.Tensor]:
    """As torch itself reads it."""
    content = torch.load(checkpoint(FILES[name]), weights_only=True, map_location="cpu")
    return content.get("state_dict", content)


def pictures(name: str, count: int = 2) -> np.ndarray:
    side = SIDE[name]
    return np.random.default_rng(0).normal(size=(count, side, side, 3))


def logits(model: nnx.Module, x: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(lambda x: model(x))(jnp.asarray(x)))


# Read


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_the_file_arrives_bit_for_bit(name):
    report = _loaded(name)[1]
    assert report.ok and not report.cast and not report.settings
    state, ours = raw_file(name), to_torch(flax_net(name))
    assert len(report.mapped) == len(state)
    for key, tensor in state.items():
        mine = key.removeprefix("module.").replace("linear.", "fc.")
        assert np.array_equal(ours[mine], tensor.numpy()), key
    counters = {key for key in ours if key.endswith("num_batches_tracked")}
    if name == "resnet20":  # older than these counters
        assert len(ours) == len(state) + len(counters)
        assert not any(ours[key].any() for key in counters)
    else:
        assert set(ours) == set(state)


def test_the_report_says_how_names_were_read():
    checkpoint(RESNET20)
    notes = _loaded("resnet20")[1].notes
    assert "linear is read as fc" in notes
    assert "19 num_batches_tracked are not in the source and stay as they are" in notes


@pytest.mark.parametrize("name", NAMES)
def test_ported_to_a_file_and_read_again(name, tmp_path):
    target = tmp_path / "flax.safetensors"
    convert_file(checkpoint(FILES[name]), target)
    again = empty_net(name)
    assert load_torch(again, target).ok
    expected = to_torch(flax_net(name))
    for key, array in to_torch(again).items():
        assert array.dtype == expected[key].dtype and array.tobytes() == expected[key].tobytes()


@pytest.mark.parametrize("name", NAMES)
def test_a_shallower_network_refuses_the_file(name):
    """Strict means strict: these tensors have no place in it."""
    other = "resnet14" if name == "resnet20" else name
    options = {} if name == "resnet20" else {"width_mult": 0.5}
    model = nnx.eval_shape(
        lambda: gam_flax.create_model(other, num_classes=10, rngs=nnx.Rngs(0), **options)
    )
    with pytest.raises(gam_flax.convert.CheckpointError, match="does not fit"):
        load_torch(model, checkpoint(FILES[name]))


# Computed


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["resnet20", pytest.param("mobilenet_v2", marks=pytest.mark.slow)])
def test_both_frameworks_agree_in_float64(name, train):
    """All layers, gradients and, in training, statistics to 1e-12 of their scale."""
    checkpoint(FILES[name])
    model, ours = torch_net(name), flax_net(name)
    if name == "mobilenet_v2":  # no two frameworks draw the same masks
        model.classifier[0].p = ours.classifier[0].rate = 0.0
    report = compare(model, ours, pictures(name, 4), train=train)
    assert report.ok, str(report)
    found = {row.path for row in report.rows if row.stage == "gradients"}
    assert found == {key for key, _ in model.named_parameters()}


@pytest.mark.parametrize("name", ["resnet20", pytest.param("mobilenet_v2", marks=pytest.mark.slow)])
def test_flax_errs_no_more_than_torch_in_float32(name):
    checkpoint(FILES[name])
    report = compare(
        torch_net(name), flax_net(name), pictures(name), dtype="float32", gradients=False
    )
    assert report.ok, str(report)
    assert output(report).flax_error < 1e-5


def output(report: ParityReport):
    return next(row for row in report.rows if row.stage == "output")


def test_logits_of_torchvision_itself():
    """torchvision's network with torchvision's weights on photographs, against Flax, in float64."""
    theirs = torchvision_models().mobilenet_v2().eval()
    theirs.load_state_dict(raw_file("mobilenet_v2"), strict=True)
    x = batch().astype(np.float64)
    with torch.no_grad():
        expected = theirs.double()(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    with jax.enable_x64(True):
        y = logits(flax_net("mobilenet_v2"), x)
    assert y.dtype == np.float64
    assert np.abs(y - expected).max() <= 1e-12 * np.abs(expected).max()


# Right


@pytest.mark.parametrize("framework", ["flax", "torch"])
def test_photographs_are_recognised(framework):
    checkpoint(MOBILENET)
    x = batch()
    if framework == "flax":
        y = logits(flax_net("mobilenet_v2"), x)
    else:
        with torch.no_grad():
            y = torch_net("mobilenet_v2")(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    assert dict(zip(CLASSES, y.argmax(-1).tolist(), strict=True)) == CLASSES


def test_photographs_that_are_not_preprocessed_are_not_recognised():
    """So that the test above can fail."""
    checkpoint(MOBILENET)
    upside_down = -batch()[:, ::-1]
    found = logits(flax_net("mobilenet_v2"), upside_down).argmax(-1)
    assert not (found == list(CLASSES.values())).all()


# The command


@pytest.mark.parametrize("name", ["resnet20", pytest.param("mobilenet_v2", marks=pytest.mark.slow)])
def test_verify_command(name, monkeypatch, capsys):
    path = checkpoint(FILES[name])
    words = ["gam-flax", "verify", str(path), "--model", name, "--json"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 0, err
    assert json.loads(out)[name]["ok"]


# Seeded faults


def _eps_in_resnet20(model):
    model.layer2[1].bn2.eps = 1.1e-5
    return "layer2.1.bn2"


def _channel_in_resnet20(model):
    kernel = model.layer3[0].conv1.kernel
    kernel[...] = kernel[...].at[..., 7].multiply(1 + 1e-6)
    return "layer3.0.conv1"


def _eps_in_mobilenet(model):
    model.features[5].conv[1][1].eps = 1.1e-5
    return "features.5.conv.1.1"


def _channel_in_mobilenet(model):
    kernel = model.features[2].conv[0][0].kernel
    kernel[...] = kernel[...].at[..., 7].multiply(1 + 1e-6)
    return "features.2.conv.0.0"


@pytest.mark.parametrize(
    "name, fault",
    [
        ("resnet20", _eps_in_resnet20),
        ("resnet20", _channel_in_resnet20),
        pytest.param("mobilenet_v2", _eps_in_mobilenet, marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", _channel_in_mobilenet, marks=pytest.mark.slow),
    ],
)
def test_a_fault_is_seen_where_it_is(name, fault):
    checkpoint(FILES[name])
    model = flax_net(name)
    where = fault(model)
    report = compare(torch_net(name), model, pictures(name, 1), gradients=False)
    assert next(r.path for r in report.rows if r.stage == "forward" and not r.ok) == where
