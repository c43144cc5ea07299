"""Small pictures in the true formats, and runs over them."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from gam_flax.convert import read_checkpoint
from gam_flax.train import Settings, read_metrics
from tests.paths import ROOT

SIDE = 12


def pictures(count: int, *, side: int = SIDE, channels: int = 1, seed: int = 0):
    """Noise with a bright row that tells the class: N H W C, and N."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count).astype(np.uint8)
    images = rng.integers(0, 40, (count, side, side, channels)).astype(np.uint8)
    images[np.arange(count), labels] = 255
    return images, labels


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return head + array.tobytes()


def write_fashion(folder: Path, train: int = 128, test: int = 32) -> Path:
    """The four files, gzipped."""
    folder.mkdir(parents=True, exist_ok=True)
    for part, count, seed in (("train", train, 0), ("t10k", test, 1)):
        images, labels = pictures(count, seed=seed)
        for name, array in (("images-idx3", images[..., 0]), ("labels-idx1", labels)):
            raw = gzip.compress(idx(array), compresslevel=1, mtime=0)
            (folder / f"{part}-{name}-ubyte.gz").write_bytes(raw)
    return folder


class Python2Pickler(pickle._Pickler):  # type: ignore[name-defined]
    """Writes bytes as Python 2 wrote its strings: the true archives are such."""

    dispatch = dict(pickle._Pickler.dispatch)  # type: ignore[attr-defined]

    def save_bytes(self, value: bytes) -> None:
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)
        self.memoize(value)

    dispatch[bytes] = save_bytes


def python2_pickle(content: Any) -> bytes:
    import io

    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(content)
    return file.getvalue().replace(b"numpy._core.multiarray", b"numpy.core.multiarray")


def cifar_batch(count: int, *, seed: int = 0, labels: bytes = b"labels") -> bytes:
    images, classes = pictures(count, side=32, channels=3, seed=seed)
    rows = np.ascontiguousarray(images.transpose(0, 3, 1, 2).reshape(count, -1))
    return python2_pickle({b"data": rows, labels: [int(n) for n in classes]})


TINY = {"layers": [1], "widths": [4], "attention_options": {"ratio": 2, "kernel_size": 3}}


def tiny(data: Path, **changes: Any) -> Settings:
    """A network of 700 parameters, three epochs of eight steps."""
    usual: dict[str, Any] = {
        "data": "fashion-mnist",
        "data_dir": str(data),
        "model": "resnet8",
        "attention": "gam",
        "model_options": TINY,
        "epochs": 3,
        "batch_size": 16,
    }
    return Settings(**{**usual, **changes})


def words(settings: Settings, out: Path, *more: str) -> list[str]:
    """`gam-flax train` with these settings, as a command line."""
    found = []
    for name, value in json.loads(settings.to_json()).items():
        if isinstance(value, dict):
            value = json.dumps(value)
        if value not in (None, False):
            found += [f"--{name.replace('_', '-')}", str(value)]
    code = "from gam_flax.cli import main; main()"
    return [sys.executable, "-c", code, "train", *found, "--out", str(out), *more]


def environment(cache: Path, **more: str) -> dict[str, str]:
    """For processes that are to start quickly: one compiles for all."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_DEFAULT_PRNG_IMPL": "rbg",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)


def outcome(out: Path) -> dict[str, Any]:
    """All that two equal runs share, to the last bit."""
    lines = read_metrics(out / "metrics.jsonl")
    for line in lines:
        line.pop("images_per_second", None)
    found: dict[str, Any] = {"lines": lines}
    for name in ("last", "best"):
        checkpoint = read_checkpoint(out / f"{name}.safetensors")
        found[name] = {key: array.tobytes() for key, array in checkpoint.tensors.items()}
        found[f"{name} says"] = checkpoint.metadata
    return found
