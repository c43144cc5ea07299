"""`gam-flax parity`: what it imports, prints and writes, and its exit status."""

from __future__ import annotations

import json
import sys

import pytest

import gam_flax.parity.comparison
from gam_flax import cli
from gam_flax.parity.report import ParityReport

NETS = """
from tests.parity.networks import NNXNet, linen_net, torch_net

def drop():
    return torch_net(dropout=0.5)

def other_eps():
    model = torch_net()
    model.norm.eps = 1e-3
    return model

def plain():
    return NNXNet()

def with_rngs(rngs):
    assert rngs.params
    return NNXNet()

def linen():
    return linen_net(torch_net())

def renamed():
    return linen_net(torch_net(), own_names=True)

def narrower():
    return NNXNet(use_bias=False)

def broken():
    raise OSError("no such disk\\nreally")

def number():
    return 7

def needs(size):
    pass

constant = 3
"""


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs `gam-flax parity` in a folder with nets.py; gives status, standard output and error."""
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "lost.py").write_text("import numpy\nimport nowhere_at_all\n")
    (tmp_path / "odd.py").write_text("x = 1\ndef f(:\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)

    def call(torch, flax, *words, shape="2,3,9,9"):
        shape = ("--input-shape", shape) if shape else ()
        words = ["gam-flax", "parity", torch, flax, *shape, *map(str, words)]
        monkeypatch.setattr(sys, "argv", words)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    yield call
    sys.modules.pop("nets", None)


@pytest.fixture
def options(monkeypatch):
    """The options that reach `compare`, which is not run."""
    seen = {}

    def compare(torch_model, flax_model, inputs, **given):
        seen.update(given, inputs=inputs)
        return ParityReport((), (), "float64", False, 4.0)

    monkeypatch.setattr(gam_flax.parity.comparison, "compare", compare)
    return seen


@pytest.mark.parametrize("flax", ["plain", "with_rngs", "linen"])
def test_a_good_port(run, flax):
    status, out, err = run("nets:torch_net", f"nets:{flax}")
    assert (status, err) == (0, "")
    assert "10 tensors of torch's loaded" in out and "parity: all" in out
    assert "conv1.weight" not in out and "conv2" in out  # a tree: layers, not weights


def test_another_eps_is_found_though_the_weights_are_loaded(run):
    status, out, _ = run("nets:other_eps", "nets:plain", "--json")
    assert status == 1
    report = ParityReport.from_json(out)
    assert report.first_divergence is not None and report.first_divergence.path == "norm"
    assert all(row.ok for row in report.rows if row.stage == "parameters")


def test_weights_as_they_are(run):
    status, out, _ = run("nets:torch_net", "nets:plain", "--no-load", "--json")
    assert status == 1
    row = ParityReport.from_json(out).first_divergence
    assert row is not None and (row.stage, row.path) == ("parameters", "conv1.weight")


def test_a_parameter_without_a_partner_is_a_finding(run):
    status, out, _ = run("nets:torch_net", "nets:narrower")
    assert status == 1
    assert "9 tensors" in out and "fc.bias" in out and "missing: not in Flax" in out


def test_files_are_written_whole_and_not_replaced_unasked(run, tmp_path):
    words = ("--plot", "out.png", "--markdown", "out.md")
    assert run("nets:torch_net", "nets:plain", *words)[0] == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out.md").read_text().startswith("parity: all")
    for option in (words[:2], words[2:]):
        status, out, err = run("nets:torch_net", "nets:plain", *option)
        assert (status, out, "--force" in err) == (2, "", True)
    assert run("nets:torch_net", "nets:plain", *words, "--force")[0] == 0


def test_rename(run, tmp_path):
    names = {"conv1": "Conv_0", "norm": "BatchNorm_0", "conv2": "Conv_1", "fc": "Dense_0"}
    (tmp_path / "names.json").write_text(json.dumps(names))
    assert run("nets:torch_net", "nets:renamed", "--rename", "names.json")[0] == 0
    assert run("nets:torch_net", "nets:renamed")[0] == 1


def test_options_reach_compare_only_when_given(run, options):
    assert run("nets:torch_net", "nets:plain")[0] == 0
    assert options.pop("inputs").shape == (2, 9, 9, 3)
    assert options == {"train": False, "dtype": "float64", "rename": None}
    words = ("--train", "--dtype", "float32", "--steps", 3, "--optimizer", "adamw")
    assert run("nets:torch_net", "nets:plain", *words, shape="2,5")[0] == 0
    assert options.pop("inputs").shape == (2, 5)
    rest = {"train": True, "dtype": "float32", "rename": None}
    assert options == rest | {"steps": 3, "optimizer": "adamw"}


GOOD = ("nets:torch_net", "nets:plain")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("nets", "nets:plain"), "nets: name a function as MODULE:FUNCTION"),
        (("nothing_here:f", "nets:plain"), "nothing_here:f: no module nothing_here, here or"),
        (("nets.inner:f", "nets:plain"), "nets.inner:f: no module nets.inner"),
        (("lost:f", "nets:plain"), "No module named 'nowhere_at_all' (lost.py:2)"),
        (("odd:f", "nets:plain"), "importing odd raised: SyntaxError"),
        (("nets:absent", "nets:plain"), "nets:absent: nets has no absent"),
        (("nets:constant", "nets:plain"), "nets:constant: constant is not a function"),
        (("nets:broken", "nets:plain"), "OSError: no such disk really (nets.py:"),
        (("nets:torch_net", "nets:needs"), "nets:needs raised: TypeError: needs() missing"),
        (("nets:number", "nets:plain"), "nets:number: gave a int, not a torch.nn.Module"),
        (("nets:torch_net", "nets:number"), "nets:number: gave a int, not an nnx.Module or a pair"),
        ((*GOOD, "--dtype", "int8"), "--dtype int8: must be one of"),
        ((*GOOD, "--optimizer", "adam"), "--optimizer goes with --steps"),
        ((*GOOD, "--steps", "0"), "--steps"),
        ((*GOOD, "--plot", "out.pdf"), "out.pdf: a picture is written as .png or .svg"),
        ((*GOOD, "--rename", "names.json"), "names.json: not a .json file"),
        (("nets:drop", "nets:plain", "--train"), "ValueError: drop draws random numbers"),
    ],
)
def test_bad_calls_are_one_line_and_status_2(run, words, expected):
    status, _, err = run(*words)
    assert status == 2
    assert err.startswith("gam-flax: ") and err.count("\n") == 1
    assert expected in err


@pytest.mark.parametrize("shape", ["", "2x3", "2,3,0,9", "2,3,,9", "2,3,-1,9"])
def test_wrong_shapes_of_text(run, shape):
    status, _, err = run(*GOOD, "--input-shape", shape, shape=None)
    assert status == 2 and "such as 2,3,64,64" in err


def test_a_shape_that_the_model_does_not_take(run):
    status, _, err = run(*GOOD, shape="2,4,9,9")
    assert status == 2 and err.count("\n") == 1
    assert "the comparison stopped: RuntimeError: " in err and "4 channels" in err
    status, _, err = run(*GOOD, shape=None)
    assert status == 2 and "input-shape" in err
