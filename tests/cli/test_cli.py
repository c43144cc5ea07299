"""The command: what it prints, what it writes, and its exit status."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import gam_torch
from gam_flax import cli
from tests.convert.wild import UltralyticsCBAM, WildConvSE, WildGAM, randomize
from tests.paths import DATA, ROOT

C = 16


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process; gives status, standard output and error."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["gam-flax", *map(str, words)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def best(tmp_path):
    torch.save(
        {f"model.9.{k}": v for k, v in WildGAM(C).state_dict().items()}, tmp_path / "best.pt"
    )
    return tmp_path / "best.pt"


def assert_one_line(err, *words):
    assert err.startswith("gam-flax: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_inspect(run, best):
    status, out, _ = run("inspect", best)
    assert status == 0
    assert "model.9" in out
    assert "A B C0 F" in out
    assert "--variant" in out
    status, out, _ = run("inspect", best, "--json")
    (block,) = json.loads(out)["blocks"]
    assert block["variants"] == ["reference", "gated", "grouped", "shuffled"]
    assert (block["channels"], block["ratio"], block["kernel_size"]) == (C, 4, 7)


def test_inspect_says_where_there_is_none(run):
    path = DATA / "resnet20-12fca82f.th"
    if not path.exists():
        pytest.skip("the folder with other people's checkpoints is not here")
    status, out, _ = run("inspect", path)
    assert (status, "no attention block found" in out) == (0, True)
    assert "module." in out


def test_inspect_names_look_alikes(run, tmp_path):
    torch.save(UltralyticsCBAM(C).state_dict(), tmp_path / "a.pt")
    status, out, _ = run("inspect", tmp_path / "a.pt")
    assert status == 0
    assert "ultralytics' CBAM" in out


def test_convert_asks_instead_of_guessing(run, best, tmp_path):
    target = tmp_path / "best.safetensors"
    status, _, err = run("convert", best, target)
    assert status == 2
    assert_one_line(err, "best.pt", "model.9", "gated", "--variant")
    assert not target.exists()
    status, out, _ = run("convert", best, target, "--variant", "gated")
    assert status == 0
    assert "18 tensors converted" in out
    status, _, err = run("convert", best, target, "--variant", "gated")
    assert status == 2
    assert_one_line(err, "best.safetensors", "--force")
    assert run("convert", best, target, "--variant", "gated", "--force")[0] == 0


def test_convert_json_and_two_kinds(run, tmp_path):
    net = torch.nn.Sequential(WildGAM(C), WildConvSE(C))
    torch.save(net.state_dict(), tmp_path / "a.pt")
    words = ("--variant", "gam=gated", "--variant", "se=mobilenet_v3", "--json")
    status, out, _ = run("convert", tmp_path / "a.pt", tmp_path / "b.safetensors", *words)
    assert status == 0
    assert json.loads(out)["variants"] == {"0": "gated", "1": "mobilenet_v3"}
    status, _, err = run("convert", tmp_path / "a.pt", tmp_path / "c.safetensors", "--variant", "x")
    assert status == 2
    assert_one_line(err, "'x'")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("inspect", "nowhere.pt"), "nowhere.pt"),
        (("convert", "nowhere.pt", "b.safetensors"), "nowhere.pt"),
        (("convert", "nowhere.pt", "b.onnx"), "b.onnx"),
        (("convert", "nowhere.pt", "b.safetensors", "--to", "onnx"), "--to"),
        (("convert", "nowhere.pt", "b.safetensors", "--dtype", "int8"), "--dtype"),
        (("verify", "nowhere.pt"), "nowhere.pt"),
        (("convert", "a", "b", "--variant", "x", "--variant", "y"), "kind=variant"),
        (("bogus",), "bogus"),
        (("convert",), "source"),
        (("inspect", "a", "--bogus"), "--bogus"),
    ],
)
def test_bad_calls_are_one_line_and_status_2(run, words, expected):
    status, out, err = run(*words)
    assert (status, out) == (2, "")
    assert_one_line(err, expected)


def test_verify_blocks(run, best):
    status, out, _ = run("verify", best, "--variant", "shuffled", "--json")
    assert status == 0
    (report,) = json.loads(out).values()
    assert report["ok"]
    status, out, _ = run("verify", best, "--variant", "shuffled")
    assert (status, "model.9 as shuffled" in out) == (0, True)


def test_verify_a_network(run, tmp_path):
    net = gam_torch.create_model("resnet8", attention="gam", num_classes=3)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    words = ("--model", "resnet8", "--variant", "paper", "--json")
    status, out, err = run("verify", tmp_path / "net.pt", *words)
    assert status == 0, err
    (report,) = json.loads(out).values()
    assert report["ok"]
    assert any(row["path"] == "layer3.0.attention.spatial_attention" for row in report["rows"])


TRUTHS = {
    "reference": {},
    "gated": {"gated": True},
    "grouped": {"shuffled": "gate"},
    "shuffled": {"gated": True, "shuffled": "features"},
}


@pytest.mark.parametrize("eps", [1e-5, 1e-3])
@pytest.mark.parametrize("truth", TRUTHS)
def test_verify_decides_from_a_saved_pair(run, tmp_path, truth, eps):
    block = randomize(WildGAM(C, **TRUTHS[truth])).float()
    for norm in (block.spatial_attention[1], block.spatial_attention[4]):
        norm.eps = eps
    torch.save({f"m.{k}": v for k, v in block.state_dict().items()}, tmp_path / "a.pt")
    x = torch.randn(2, C, 6, 7, generator=torch.Generator().manual_seed(1))
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "y.npy", block(x).detach().numpy())
    pair = ("--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy")
    status, out, err = run("verify", tmp_path / "a.pt", *pair, "--json")
    assert status == 0, err
    told = json.loads(out)
    assert told["variant"] == truth
    best, second, *_ = told["candidates"]
    assert best["eps"] == eps
    assert best["distance"] < 1e-5 < second["distance"]
    status, out, _ = run("verify", tmp_path / "a.pt", *pair)
    assert (status, f"It is {truth}." in out) == (0, True)


def test_a_pair_of_another_block_fits_none(run, tmp_path, best):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((2, C, 6, 7)))
    np.save(tmp_path / "y.npy", np.random.default_rng(1).standard_normal((2, C, 6, 7)))
    pair = ("--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy")
    status, out, _ = run("verify", best, *pair)
    assert (status, "None of them" in out) == (1, True)


def test_bad_pairs(run, tmp_path, best):
    np.save(tmp_path / "x.npy", np.zeros((2, 3, 6, 7)))
    (tmp_path / "y.npy").write_bytes(b"not an array")
    status, _, err = run("verify", best, "--input", tmp_path / "x.npy")
    assert status == 2
    assert_one_line(err, "--output")
    pair = ("--input", tmp_path / "x.npy", "--output", tmp_path / "y.npy")
    status, _, err = run("verify", best, *pair)
    assert status == 2
    assert_one_line(err, "y.npy")
    np.save(tmp_path / "y.npy", np.zeros((2, 3, 6, 7)))
    status, _, err = run("verify", best, *pair)
    assert status == 2
    assert_one_line(err, "(2, 3, 6, 7)", "16")
    objects = np.array([{"a": 1}], dtype=object)
    np.save(tmp_path / "y.npy", objects, allow_pickle=True)
    status, _, err = run("verify", best, *pair)
    assert status == 2
    assert_one_line(err, "y.npy")


def test_ctrl_c_is_quiet(run, monkeypatch, best):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "open_source", stop)
    status, _, err = run("inspect", best)
    assert (status, err) == (130, "")


def test_the_installed_command():
    ran = subprocess.run(
        [sys.executable, "-m", "gam_flax.cli", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert ran.returncode == 0
    for command in ("inspect", "convert", "verify", "demo"):
        assert command in ran.stdout
