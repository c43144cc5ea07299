"""`gam-flax train`: options, answers, exit status."""

from __future__ import annotations

import json
import sys

import pytest

from gam_flax import cli
from gam_flax.train import errors
from tests.train.made import tiny, words, write_fashion


@pytest.fixture
def call(monkeypatch, capsys):
    def run(*given):
        monkeypatch.setattr(sys, "argv", ["gam-flax", "train", *map(str, given)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    return run


def test_a_run_by_options(call, tmp_path):
    settings = tiny(write_fashion(tmp_path / "data", 32, 16), epochs=1, warmup=0.5, ema=0.5)
    given = words(settings, tmp_path / "run", "--json")
    status, out, err = call(*given[given.index("train") + 1 :])
    assert status == 0
    assert json.loads(out)["step"] == 2 and json.loads(out)["finished"]
    assert "epoch 1 of 1" in err
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == json.loads(settings.to_json())


@pytest.mark.parametrize(
    "given, said",
    [
        (["--data", "imagenet"], "data imagenet: must be one of fashion-mnist"),
        (["--data", "mnist"], "data mnist: say where it is (--data-dir)"),
        (["--data", "mnist", "--data-dir", "/no"], "/no/train-images-idx3-ubyte: not found"),
        (["--data", "mnist", "--model-options", "[1]"], "model-options: expected a JSON object"),
        (["--data", "mnist", "--model-options", "{"], "model-options: not JSON"),
        (["--data", "mnist", "--optimizer", "lion"], "optimizer lion: must be one of sgd, adamw"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(call, tmp_path, given, said):
    status, _, err = call(*given, "--out", tmp_path / "run")
    assert status == 2 and err.count("\n") == 1
    assert err.startswith("gam-flax: ") and said in err
    assert not (tmp_path / "run").exists()


def test_tensorboard_if_asked(call, tmp_path, monkeypatch):
    settings = tiny(write_fashion(tmp_path / "data", 32, 16), epochs=1)
    given = words(settings, tmp_path / "run", "--tensorboard")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorboardX", None)
        status, _, err = call(*given[given.index("train") + 1 :])
    assert status == 2
    assert "tensorboardX is not installed: pip install 'gam-attention[tensorboard]'" in err
    pytest.importorskip("tensorboardX")
    status, _, err = call(*given[given.index("train") + 1 :])
    assert status == 0, err
    (file,) = (tmp_path / "run" / "tensorboard").iterdir()
    content = file.read_bytes()
    for name in (b"train/loss", b"train/learning_rate", b"test/accuracy"):
        assert name in content


def test_a_missing_library_is_one_line(call, monkeypatch, tmp_path):
    monkeypatch.setattr(errors, "LIBRARIES", ("optax", "grain_which_is_not_there"))
    monkeypatch.setitem(cli.EXTRAS, "grain_which_is_not_there", "train")
    status, _, err = call("--data", "mnist", "--out", tmp_path / "run")
    assert status == 2 and err.count("\n") == 1
    assert "grain_which_is_not_there is not installed: pip install 'gam-attention[train]'" in err
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'gam-attention\[train\]'"):
        errors.require_libraries()
