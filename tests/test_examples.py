"""The examples run as they stand, with small data."""

from __future__ import annotations

import gzip
import subprocess
import sys

import numpy as np

from gam_flax.convert import identify, read_checkpoint
from tests.paths import ROOT


def write_idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(head + array.tobytes(), compresslevel=1))


def run(script, *words, cwd):
    return subprocess.run(
        [sys.executable, ROOT / "examples" / script, *map(str, words)],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )


def test_the_classifiers_training_runs_and_resumes(tmp_path):
    """On images whose class can be seen: a bright row that tells it."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 640), ("t10k", 200)):
        labels = rng.integers(0, 10, count).astype(np.uint8)
        images = rng.integers(0, 40, (count, 28, 28)).astype(np.uint8)
        images[np.arange(count), labels * 2 + 4] = 255
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
    ran = run("train_fashion_gam.py", "--data", tmp_path, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    written = tmp_path / "runs" / "fashion_gam" / "taste" / "fashion_gam.pt"
    assert [block.variants for block in identify(written)] == [("reference",)] * 3
    first = read_checkpoint(written).tensors["fc.weight"].copy()
    assert (tmp_path / "runs" / "fashion_gam" / "taste" / "last.pt").exists()
    again = run("train_fashion_gam.py", "--data", tmp_path, cwd=tmp_path)
    assert "epoch 1:" not in again.stdout  # that epoch was kept
    assert np.array_equal(read_checkpoint(written).tensors["fc.weight"], first)


def test_missing_data_is_one_line(tmp_path):
    ran = run("train_fashion_gam.py", "--data", tmp_path, cwd=tmp_path)
    assert ran.returncode == 1
    assert ran.stderr.count("\n") == 1
    assert "train-images-idx3-ubyte.gz" in ran.stderr
