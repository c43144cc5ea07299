"""What a file is, by its first bytes: suffixes of checkpoints promise little."""

from __future__ import annotations

import os
import stat

from gam_flax.convert.errors import CheckpointError

SAVE_AGAIN = "torch.save(model.state_dict(), ...)"

_TORCH_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19."  # torch.serialization.MAGIC_NUMBER, pickled
_ONLY = "only PyTorch and safetensors checkpoints are read"

# What seems to be no checkpoint, by the bytes at an offset, or else by the suffix.
_STRANGERS = (
    (0, b"version https://git-lfs", "a git-lfs pointer, not the file itself: run git lfs pull"),
    (0, b"<", "a web page: download the file itself"),
    (257, b"ustar", f"a tar archive; if it is torch.save's of 2016, load it there, {SAVE_AGAIN}"),
    (0, b"\x89HDF", f"an HDF5 file (Keras?); {_ONLY}"),
    (0, b"\x93NUMPY", f"a single numpy array; {_ONLY}"),
    (0, b"GGUF", f"a GGUF file; {_ONLY}"),
    (4, b"TFL3", f"a TensorFlow Lite model; {_ONLY}"),
    (0, b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (0, b"BZh", "compressed with bzip2: unpack it first"),
    (0, b"\xfd7zXZ", "compressed with xz: unpack it first"),
    (0, b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (0, b"Rar!", "a RAR archive: unpack it first"),
    (0, b"\x80", f"a pickle that torch.save did not write: where it loads, {SAVE_AGAIN}"),
)
_SUFFIXES = {
    ".onnx": f"an ONNX model; {_ONLY}",
    ".msgpack": "a Flax msgpack file; its weights are Flax weights already",
    ".pb": f"a TensorFlow graph; {_ONLY}",
}


def file_kind(path: str) -> str:
    """One of "zip" and "legacy" (torch.save's), "safetensors", and "json", perhaps an index.

    Raises `CheckpointError` for everything else, saying what it seems to be.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise CheckpointError("not a regular file")
    with open(path, "rb") as file:
        head = file.read(512)
    text = head.lstrip()
    if not head:
        raise CheckpointError("the file is empty: copy it again")
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if _TORCH_MAGIC in head[:32]:
        return "legacy"
    length, brace = head[:8], head[8:9]
    if brace == b"{" and any(byte == 0 or byte > 126 for byte in length):  # and so no text
        return "safetensors"
    if text.startswith(b"{"):
        return "json"
    for at, magic, what in _STRANGERS:
        if (head[at:] if at else text).startswith(magic):
            raise CheckpointError(f"seems to be {what}")
    if what := _SUFFIXES.get(os.path.splitext(path)[1].lower()):
        raise CheckpointError(f"seems to be {what}")
    raise CheckpointError(f"neither PyTorch nor safetensors: it begins {head[:16]!r}")
