"""Any checkpoint, read into numpy arrays under plain `state_dict` keys.

    kind of file, by its content  →  the object in it  →  its weights  →  plain keys

Safetensors files need numpy and safetensors only; `.pt` files need torch (see `torch_file.py`).
Nothing in a file is ever run. What cannot be read raises `CheckpointError`, in one line.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import ml_dtypes
import numpy as np

from gam_flax.convert import torch_file
from gam_flax.convert.errors import CheckpointError, shorten

# Where training code puts the weights, best first: averaged weights are those people evaluate.
_WRAPPERS = "ema ema_state_dict model_ema state_dict_ema state_dict model_state_dict model net".split()
_WRAPPERS += "network params weights module".split()
_TRAINING = re.compile(r"optim|sched|scaler|^opt$|^opt_|^amp$", re.IGNORECASE)  # never weights
_TRANSPORT = re.compile(r"(?:(?:module|_orig_mod)\.)*")  # DataParallel, torch.compile

_TORCH_MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19."  # torch.serialization.MAGIC_NUMBER, pickled
_SAVE_AGAIN = "torch.save(model.state_dict(), ...)"
_ONLY = "only PyTorch and safetensors checkpoints are read"

# What a file seems to be that is no checkpoint, by the bytes at an offset, or by its suffix.
_STRANGERS = (
    (0, b"version https://git-lfs", "a git-lfs pointer, not the file itself: run git lfs pull"),
    (0, b"<", "a web page: download the file itself"),
    (257, b"ustar", f"a tar archive; if torch.save wrote it (2016), load it there and {_SAVE_AGAIN}"),
    (0, b"\x89HDF", f"an HDF5 file (Keras?); {_ONLY}"),
    (0, b"\x93NUMPY", f"a single numpy array; {_ONLY}"),
    (0, b"GGUF", f"a GGUF file; {_ONLY}"),
    (4, b"TFL3", f"a TensorFlow Lite model; {_ONLY}"),
    (0, b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (0, b"BZh", "compressed with bzip2: unpack it first"),
    (0, b"\xfd7zXZ", "compressed with xz: unpack it first"),
    (0, b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (0, b"Rar!", "a RAR archive: unpack it first"),
    (0, b"\x80", f"a pickle that torch.save did not write: load it where it was made and {_SAVE_AGAIN}"),
)
_SUFFIXES = {
    ".onnx": f"an ONNX model; {_ONLY}",
    ".msgpack": "a Flax msgpack file; its weights are Flax weights already",
    ".pb": f"a TensorFlow graph; {_ONLY}",
}

_SAFETENSORS_DTYPES = {
    "BOOL": np.bool_,
    **{f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}") for kind in "UI" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "C64": np.complex64,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint under plain keys, and what else the file tells.

    path: as it was given; "" for what came from memory.
    container: "zip", "legacy", "safetensors" or "memory"; "sharded " before the first three.
    tensors: in the order of the file, in its dtypes (bfloat16 and float8 are those of ml_dtypes).
        Where possible they are views of the mapped file: copied when written to, valid as long as
        the file is left alone.
    stripped: the wrappers and prefixes taken off, in order, such as ("state_dict", "module.").
    metadata: `__metadata__` of safetensors; in torch files the strings under "gam_attention".
    norms: path of a norm layer → its "eps" and "momentum". Whole modules tell, a state_dict cannot.
    layout: "flax" for the files that this package saves in Flax's layout, else "torch".
    """

    path: str
    container: str
    tensors: dict[str, np.ndarray]
    stripped: tuple[str, ...]
    metadata: dict[str, str]
    norms: dict[str, dict[str, float | None]]
    layout: str


def read_checkpoint(path: str | os.PathLike, *, entry: str | None = None) -> Checkpoint:
    """Reads the weights in a file; sharded ones by the `*.index.json`, or the folder that has it.

    Read are safetensors and both containers of torch.save, with a state_dict in them, training
    dictionaries around one, or a whole pickled model, of a class that need not exist any more. The
    content decides, not the suffix. Of several candidates averaged weights ("ema") come first, then
    "state_dict", "model" and the like; optimizers never count. `entry` names another choice.

    Raises `CheckpointError`, one line that names the file: for a missing, damaged, hostile or foreign
    file, for sparse and quantized tensors, for names that collide, for a choice that is unclear.
    """
    name = os.fsdecode(path)
    with _naming(name):
        file = _only_checkpoint_in(name) if os.path.isdir(name) else name
        if _kind(file) == "sharded":
            container, contents, metadata = _read_shards(file)
        else:
            container, contents, metadata = _read_file(file)
        weights, wrappers = _select(contents, entry)
        tensors, norms = _arrays(weights, 4 * os.path.getsize(file) + 2**20)
        return _checkpoint(name, container, tensors, norms, wrappers, metadata)


def from_mapping(mapping: Mapping, *, path: str = "") -> Checkpoint:
    """The same for a state_dict in memory, or dictionaries around one: torch, numpy or jax arrays."""
    with _naming(path or "the state_dict in memory"):
        weights, wrappers = _select(mapping, None)
        tensors, norms = _arrays(weights, math.inf)
        return _checkpoint(path, "memory", tensors, norms, wrappers, {})


def from_module(module: Any) -> Checkpoint:
    """The same for a live `torch.nn.Module`, with the settings of its norms."""
    with _naming(f"the {type(module).__name__} in memory"):
        tensors, norms = _arrays(module, math.inf)
        return _checkpoint("", "memory", tensors, norms, [], {})
