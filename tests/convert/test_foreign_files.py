"""Files that are something else than checkpoints: told apart, in one line."""

from __future__ import annotations

import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest

from gam_flax.convert.checkpoint import read_checkpoint
from gam_flax.convert.errors import CheckpointError
from tests.convert.test_hostile_files import _saved, refusal

# Files that are something else


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        (b"", "net.pt", "empty"),
        (b"\n", "net.pt", "neither PyTorch nor safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\n", "net.pt", "git lfs pull"),
        (b"\n<!DOCTYPE html><html>404</html>", "net.pt", "web page"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "net.h5", "HDF5"),
        (b"\x93NUMPY\x01\x00" + bytes(99), "net.npy", "numpy array"),
        (b"\x1c\x00\x00\x00TFL3" + bytes(99), "net.tflite", "TensorFlow Lite"),
        (b"\x08\x07\x12\x07pytorch" + bytes(99), "net.onnx", "ONNX"),
        (b"\x1f\x8b\x08" + bytes(99), "net.pt.gz", "gzip"),
        (b"GGUF" + bytes(99), "net.gguf", "GGUF"),
        (b'{"epochs": 3}', "config.json", "weight_map"),
        (pickle.dumps({"w": 1}, protocol=2), "net.pt", "a pickle that torch.save did not write"),
        (b"def main():\n    pass\n", "net.py", "neither PyTorch nor safetensors"),
    ],
)
def test_foreign_files_are_told_apart(write, content, name, said):
    assert said in refusal(write(content, name))


def test_foreign_archives_are_told_apart(tmp_path):
    path = tmp_path / "net.npz"
    np.savez(path, w=np.zeros(2))
    assert "numpy archive" in refusal(path)
    path = tmp_path / "net.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "no data.pkl" in refusal(path)
    path = tmp_path / "net.tar"
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"))
    assert "a tar archive" in refusal(path)
    path = tmp_path / "script.pt"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/__torch__.py"):
            archive.writestr(f"script/{name}", "")
    assert "TorchScript" in refusal(path)


def test_paths_that_are_no_files(tmp_path):
    assert "No such file" in refusal(tmp_path / "absent.pt")
    assert "with none for *.index.json" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe.pt")
    assert "not a regular file" in refusal(tmp_path / "pipe.pt")
    (tmp_path / "loop.pt").symlink_to("loop.pt")
    refusal(tmp_path / "loop.pt")
    with pytest.raises(CheckpointError, match="embedded null"):
        read_checkpoint("a\0b.pt")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(write):
    path = write(_saved("safetensors"))
    path.chmod(0)
    assert "Permission denied" in refusal(path)
