"""Checkpoint files written: whole or not at all, never over another without being told."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gam_flax.convert.errors import CheckpointError, shorten

if TYPE_CHECKING:
    import torch


@contextmanager
def whole_file(path: str | os.PathLike, *, force: bool) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without an error.

    Raises:
        CheckpointError: `path` exists and `force` is not given, or it cannot be written.
    """
    path = Path(path)
    check_free(path, force=force)
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:40]}.", dir=path.parent)
    except OSError as error:
        raise CheckpointError(f"{shorten(path)}: cannot be written: {error.strerror}") from error
    os.close(handle)
    try:
        yield Path(name)
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except OSError as error:
        raise CheckpointError(f"{shorten(path)}: cannot be written: {error.strerror}") from error
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)


def check_free(path: str | os.PathLike, *, force: bool) -> None:
    """Raises CheckpointError where `path` exists and may not be replaced."""
    if Path(path).is_dir():
        raise CheckpointError(f"{shorten(path)}: is a folder; name a file in it")
    if Path(path).exists() and not force:
        raise CheckpointError(f"{shorten(path)}: exists; say force (--force) to replace it")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_safetensors(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    *,
    force: bool,
) -> None:
    """Writes a safetensors file; arrays may be views in any order."""
    from safetensors.numpy import save_file

    dense = {key: np.asarray(array, order="C") for key, array in tensors.items()}
    with whole_file(path, force=force) as part:
        save_file(dense, part, metadata=dict(metadata))


def write_torch(
    path: str | os.PathLike,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    *,
    force: bool,
) -> None:
    """Writes {"state_dict": …, "gam_attention": metadata} for `torch.load(weights_only=True)`."""
    import torch

    state = {key: to_torch_tensor(array) for key, array in tensors.items()}
    with whole_file(path, force=force) as part:
        torch.save({"state_dict": state, "gam_attention": dict(metadata)}, part)


def to_torch_tensor(array: np.ndarray) -> torch.Tensor:
    """A torch tensor of its own memory; bfloat16 and float8, which torch does not take, by bits."""
    import torch

    array = np.array(array, order="C")  # torch wants memory that may be written
    if array.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        bits = np.uint16 if array.dtype.itemsize == 2 else np.uint8
        return torch.from_numpy(array.view(bits)).view(getattr(torch, array.dtype.name))
    return torch.from_numpy(array)
