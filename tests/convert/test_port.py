"""Files ported, saved and loaded again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

import gam_flax
import gam_torch
from gam_flax.convert import (
    CheckpointError,
    convert_file,
    identify,
    load,
    load_torch,
    read_checkpoint,
    save,
    to_torch,
)
from tests.convert.wild import UltralyticsCBAM, WildGAM, randomize
from tests.paths import DATA, ROOT

C = 16
X = np.random.default_rng(0).standard_normal((2, 6, 7, C)).astype(np.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_to_flax_and_back_is_every_byte(tmp_path, dtype):
    theirs = randomize(gam_torch.GAM(C)).to(dtype)
    torch.save({"state_dict": theirs.state_dict()}, tmp_path / "a.pt")
    convert_file(tmp_path / "a.pt", tmp_path / "b.safetensors", variant="reference")
    convert_file(tmp_path / "b.safetensors", tmp_path / "c.pt", to="torch")
    back = torch.load(tmp_path / "c.pt", weights_only=True)["state_dict"]
    assert back.keys() == theirs.state_dict().keys()
    for key, tensor in theirs.state_dict().items():
        assert back[key].dtype == tensor.dtype
        assert torch.equal(back[key], tensor)


def test_a_converted_block_is_a_model_again(tmp_path):
    theirs = randomize(WildGAM(C, gated=True, shuffled="features")).float()
    torch.save(theirs.state_dict(), tmp_path / "a.pt")
    convert_file(tmp_path / "a.pt", tmp_path / "b.safetensors", variant="shuffled")
    model = load(tmp_path / "b.safetensors")
    assert (model.channel_gate, model.shuffle) == ("sigmoid", "features")
    model.eval()
    expected = theirs(torch.from_numpy(X.transpose(0, 3, 1, 2))).detach().numpy()
    assert np.abs(np.asarray(model(jnp.asarray(X))).transpose(0, 3, 1, 2) - expected).max() < 1e-4


def test_what_was_decided_stays_decided(tmp_path):
    torch.save({"net.att." + k: v for k, v in WildGAM(C).state_dict().items()}, tmp_path / "a.pt")
    convert_file(tmp_path / "a.pt", tmp_path / "b.safetensors", variant="gated")
    (block,) = identify(tmp_path / "b.safetensors")
    assert block.variants == ("gated",)
    with pytest.raises(CheckpointError, match="gated"):
        load_torch(gam_flax.GAM(C, rngs=nnx.Rngs(0)), tmp_path / "b.safetensors")


def test_eps_travels_with_the_file(tmp_path):
    module = WildGAM(C)
    for norm in (module.spatial_attention[1], module.spatial_attention[4]):
        norm.eps = 1e-3
    convert_file(module, tmp_path / "b.safetensors", variant="reference")
    assert load(tmp_path / "b.safetensors").spatial_attention.norm2.eps == 1e-3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtype(tmp_path, dtype):
    report = convert_file(WildGAM(C), tmp_path / "b.safetensors", variant="reference", dtype=dtype)
    tensors = read_checkpoint(tmp_path / "b.safetensors").tensors
    assert tensors["spatial_attention.conv1.kernel"].dtype.name == dtype
    assert tensors["spatial_attention.norm1.num_batches_tracked"].dtype == np.int64
    assert bool(report.cast) == (dtype != "float32")


def test_a_cast_that_overflows_is_an_error(tmp_path):
    module = WildGAM(C)
    module.channel_attention[0].weight.data[0, 0] = 1e6
    with pytest.raises(CheckpointError, match="channel_attention.fc1.weight .*float16"):
        convert_file(module, tmp_path / "b.safetensors", variant="reference", dtype="float16")
    assert os.listdir(tmp_path) == []


def test_a_file_that_exists_stays(tmp_path):
    target = tmp_path / "b.safetensors"
    target.write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        convert_file(WildGAM(C), target, variant="reference")
    with pytest.raises(CheckpointError, match="exists"):
        save(gam_flax.GAM(C, rngs=nnx.Rngs(0)), target)
    assert target.read_text() == "mine"
    convert_file(WildGAM(C), target, variant="reference", force=True)
    assert len(read_checkpoint(target).tensors) == 18


def test_nothing_half_written(tmp_path, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.numpy.save_file", full_disk)
    with pytest.raises(CheckpointError, match="No space left"):
        convert_file(WildGAM(C), tmp_path / "b.safetensors", variant="reference")
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written"):
        convert_file(WildGAM(C), tmp_path / "no" / "b.safetensors", variant="reference")


def test_look_alikes_are_not_ported(tmp_path):
    with pytest.raises(CheckpointError, match="ultralytics' CBAM"):
        convert_file(UltralyticsCBAM(C), tmp_path / "b.safetensors")


def test_keys_that_become_one(tmp_path):
    state = {"a.weight": torch.zeros(3), "a.scale": torch.zeros(3)}
    with pytest.raises(CheckpointError, match="a.scale"):
        convert_file(state, tmp_path / "b.safetensors")


@pytest.mark.parametrize("name", ["mobilenet_v2-b0353104.pth", "resnet20-12fca82f.th"])
def test_real_networks_there_and_back(tmp_path, name):
    if not (DATA / name).exists():
        pytest.skip("the folder with other people's checkpoints is not here")
    report = convert_file(DATA / name, tmp_path / "b.safetensors")
    assert any("no attention block" in note for note in report.notes)
    convert_file(tmp_path / "b.safetensors", tmp_path / "c.pt", to="torch")
    theirs = read_checkpoint(DATA / name).tensors
    back = torch.load(tmp_path / "c.pt", weights_only=True)["state_dict"]
    assert back.keys() == theirs.keys()
    assert all(back[k].numpy().tobytes() == v.tobytes() for k, v in theirs.items())


@pytest.mark.parametrize(
    "model",
    [
        lambda rngs: gam_flax.GAM.from_variant("grouped", C, rngs=rngs),
        lambda rngs: gam_flax.CBAM.from_variant("timm", C, norm_eps=1e-3, rngs=rngs),
        lambda rngs: gam_flax.SqueezeExcitation(C, param_dtype=jnp.bfloat16, rngs=rngs),
        lambda rngs: gam_flax.BAM(C, dtype=jnp.bfloat16, combine="sum", rngs=rngs),
        lambda rngs: gam_flax.create_model(
            "resnet8", attention="gam", attention_options={"ratio": 4}, num_classes=3, rngs=rngs
        ),
    ],
    ids=["gam", "cbam", "se", "bam", "resnet"],
)
def test_save_and_load_give_the_same_model(tmp_path, model):
    ours = model(nnx.Rngs(0))
    save(ours, tmp_path / "m.safetensors")
    again = load(tmp_path / "m.safetensors")
    assert nnx.graphdef(again) == nnx.graphdef(ours)
    before, after = to_torch(ours), to_torch(again)
    assert before.keys() == after.keys()
    assert all(before[k].tobytes() == after[k].tobytes() for k in before)


def test_a_model_of_the_users_own_is_saved_without_a_constructor(tmp_path):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.att = gam_flax.GAM(C, channel_gate="sigmoid", rngs=rngs)

    ours = Net(nnx.Rngs(0))
    save(ours, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match="does not say how its model is built"):
        load(tmp_path / "m.safetensors")
    other = Net(nnx.Rngs(1))
    assert load_torch(other, tmp_path / "m.safetensors").ok  # the variant is in the file


@pytest.mark.parametrize(
    "metadata",
    [
        {"build": "os.system", "arguments": '{"command": "id"}'},
        {"build": "GAM", "arguments": '{"channels": -4}'},
        {"build": "GAM", "arguments": '{"channels": 16, "spam": 1}'},
        {"build": "GAM", "arguments": "not json"},
        {"build": "GAM", "arguments": "[1]"},
        {"build": "GAM", "arguments": '{"channels": 100000000}'},
        {"build": "GAM", "arguments": '{"channels": 16}', "behaviour": '{"": "spam"}'},
        {"build": "GAM", "arguments": '{"channels": 16}', "norms": '{"a": 3}'},
    ],
)
def test_metadata_of_strangers(tmp_path, metadata):
    tensors = {"channel_attention.fc1.kernel": np.zeros((C, 4), np.float32)}
    save_file(tensors, tmp_path / "m.safetensors", {"format": "flax", **metadata})
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path / "m.safetensors")
    assert "m.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_metadata_are_plain_strings(tmp_path):
    save(gam_flax.GAM(C, rngs=nnx.Rngs(0)), tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", framework="numpy") as file:
        metadata = file.metadata()
    assert metadata["format"] == "flax"
    assert json.loads(metadata["arguments"])["channels"] == C


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_hundred_megabytes_in_little_memory(tmp_path, suffix):
    """Peak memory above the idle process stays under 2.5 times the file."""
    state = {f"layer{i}.weight": torch.ones(512, 512, 5, 5) for i in range(4)}
    source = tmp_path / f"big{suffix}"
    if suffix == ".pt":
        torch.save(state, source)
    else:
        save_file({k: v.numpy() for k, v in state.items()}, source)
    script = f"""
        import resource, sys
        import torch, safetensors.numpy  # what reading loads in any case
        from gam_flax.convert import convert_file
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        before = peak()
        convert_file({str(source)!r}, {str(tmp_path / "out.safetensors")!r})
        print(peak() - before)
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert int(ran.stdout) < 2.5 * source.stat().st_size
