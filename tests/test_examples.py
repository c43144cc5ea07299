"""The examples run as they stand, with small data."""

from __future__ import annotations

import gzip
import re
import subprocess
import sys

import numpy as np
import pytest

from gam_flax.convert import identify, read_checkpoint
from tests.paths import ROOT


def write_idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(head + array.tobytes(), compresslevel=1))


def run(script, *words, cwd):
    return subprocess.run(
        [sys.executable, "-W", "error", ROOT / "examples" / script, *map(str, words)],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )


def said_by(script, *words, cwd):
    ran = run(script, *words, cwd=cwd)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def last_number(line):
    return float(re.findall(r"[-+.e0-9]+", line.strip().rstrip("%"))[-1])


def line_with(words, said):
    return next(line for line in said.splitlines() if words in line)


def test_01_the_port_agrees(tmp_path):
    said = said_by("01_port_a_checkpoint.py", cwd=tmp_path)
    difference = re.search(r"logit: (.*), of (.*)", said)
    assert float(difference[1]) < 1e-5 * float(difference[2])
    assert "the same bits" in said


@pytest.mark.parametrize("script", ["02_gam_in_nnx.py", "03_gam_in_linen.py"])
def test_own_networks_learn(script, tmp_path):
    said = said_by(script, cwd=tmp_path)
    losses = [last_number(line) for line in said.splitlines() if line.startswith("step")]
    assert losses[-1] < 0.5 * losses[0]
    assert last_number(line_with("accuracy", said)) > 30


@pytest.mark.slow
def test_04_trains_and_goes_on(tmp_path):
    words = ("04_resnet_on_fashion_mnist.py", "--epochs", 1)
    said = said_by(*words, cwd=tmp_path)
    assert said.count("predicted") == 8
    again = said_by(*words, cwd=tmp_path)
    assert "going on from step 10" in again
    assert again.splitlines()[-8:] == said.splitlines()[-8:]


@pytest.mark.slow
def test_05_compares_and_keeps_what_is_finished(tmp_path):
    words = ("05_which_attention_helps.py",)
    said = said_by(*words, "--seeds", 1, cwd=tmp_path)
    more = said_by(*words, "--seeds", 2, cwd=tmp_path)
    assert said.count("a new run") == more.count("a new run") == 6
    out = tmp_path / "runs" / "comparison" / "taste"
    rows = [line.split("|")[1:-1] for line in (out / "comparison.md").read_text().splitlines()[2:8]]
    assert [row[0].strip() for row in rows] == [
        *("none", "SE", "CBAM", "BAM"),
        *("GAM, paper", "GAM, code"),
    ]
    assert all("±" in row[2] and "?" not in row[2] for row in rows)
    parameters = [int(row[1].replace(",", "")) for row in rows]
    assert parameters == sorted(parameters)
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_06_several_devices_are_as_one(tmp_path):
    said = said_by("06_several_devices.py", "--steps", 2, cwd=tmp_path)
    assert "4 devices:" in said
    assert last_number(line_with("largest difference", said)) < 1e-4


@pytest.mark.slow
def test_06_several_processes_are_one_run(tmp_path):
    said = said_by("06_several_devices.py", "--processes", 2, cwd=tmp_path)
    assert said.count("epoch 2 of 2: test loss") == 1  # the first process speaks
    assert (tmp_path / "runs" / "hosts" / "best.safetensors").exists()


def test_07_draws(tmp_path):
    said = said_by("07_attention_maps.py", cwd=tmp_path)
    assert "picture_0.png: boot" in said
    assert "attention3: GAM" in said
    assert len(list((tmp_path / "runs" / "maps").glob("*.png"))) == 3
    assert "--force" in run("07_attention_maps.py", cwd=tmp_path).stderr


def test_08_serves_the_same_numbers(tmp_path):
    said = said_by("08_export_and_serve.py", cwd=tmp_path)
    assert said.count("boot") == 1
    assert last_number(line_with("largest difference", said)) < 1e-6


def test_09_the_classifiers_training_runs_and_resumes(tmp_path):
    """On images whose class can be seen: a bright row that tells it."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 640), ("t10k", 200)):
        labels = rng.integers(0, 10, count).astype(np.uint8)
        images = rng.integers(0, 40, (count, 28, 28)).astype(np.uint8)
        images[np.arange(count), labels * 2 + 4] = 255
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
    ran = run("09_train_the_shipped_classifier.py", "--data", tmp_path, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    written = tmp_path / "runs" / "fashion_gam" / "taste" / "fashion_gam.pt"
    assert [block.variants for block in identify(written)] == [("reference",)] * 3
    first = read_checkpoint(written).tensors["fc.weight"].copy()
    assert (tmp_path / "runs" / "fashion_gam" / "taste" / "last.pt").exists()
    again = run("09_train_the_shipped_classifier.py", "--data", tmp_path, cwd=tmp_path)
    assert "epoch 1:" not in again.stdout  # that epoch was kept
    assert np.array_equal(read_checkpoint(written).tensors["fc.weight"], first)


def test_09_missing_data_is_one_line(tmp_path):
    ran = run("09_train_the_shipped_classifier.py", "--data", tmp_path, cwd=tmp_path)
    assert ran.returncode == 1
    assert ran.stderr.count("\n") == 1
    assert "train-images-idx3-ubyte.gz" in ran.stderr


@pytest.mark.slow
def test_10_both_frameworks_measure_the_same(tmp_path):
    said = said_by("10_train_a_detector.py", cwd=tmp_path)
    ours, theirs = (line_with(f"{name}: mAP@0.5", said) for name in ("Flax", "PyTorch"))
    assert ours.removeprefix("Flax") == theirs.removeprefix("PyTorch")
    assert list((tmp_path / "runs").glob("detector_*/detections.png"))
