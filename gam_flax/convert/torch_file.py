"""Files written by `torch.save`, read without running anything that is in them.

A `.pt` file is a pickle, and a pickle is a program. `PickleScan` follows it on paper and refuses
what is hostile; then `torch.load(weights_only=True)` builds the objects. That unpickler knows
tensors and plain containers only. For every other class in the file it is handed a `Standin`, which
keeps what it is given and does nothing: so whole pickled models are read without their classes.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import threading
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from gam_flax.convert.errors import CheckpointError, shorten
from gam_flax.convert.file_kind import SAVE_AGAIN
from gam_flax.convert.pickle_scan import PickleScan

Norms = dict[str, dict[str, float | None]]

_MAX_WALK = 10_000_000  # characters of module paths to write out; real models need 100,000

_LOCK = threading.Lock()  # torch's list of permitted classes is one for the whole process


class Standin:
    """An inert object in the place of an unknown class's: it keeps its state and does nothing."""

    __slots__ = ("state",)
    state: dict[str, Any]

    def __new__(cls, *args: object, **kwargs: object) -> Standin:
        self = object.__new__(cls)
        self.state = {}
        return self

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and state:  # attributes, slots
            state = state[0]
        if isinstance(state, dict):
            self.state = state


def is_module(value: object) -> bool:
    """Whether `value` stands in for a pickled `torch.nn.Module`."""
    return isinstance(value, Standin) and all(
        isinstance(value.state.get(name), dict) for name in ("_modules", "_parameters")
    )


def flatten(module: Standin) -> tuple[dict[str, Any], Norms]:
    """A pickled module's tensors as `state_dict()` names and orders them, and its norms' settings.

    Raises `CheckpointError` where names collide or are no strings, and for a tree without end.
    """
    tensors: dict[str, Any] = {}
    norms: Norms = {}
    walked = 0
    stack: list[tuple[str, Standin]] = [("", module)]
    while stack:
        prefix, node = stack.pop()
        parameters, buffers, children = (
            _entries(node, member) for member in ("_parameters", "_buffers", "_modules")
        )
        names = (*parameters, *buffers, *children)
        walked += 1 + sum(len(prefix) + len(name) + 1 for name in names)
        if walked > _MAX_WALK:  # before the work, which modules that share their names multiply
            raise CheckpointError("refused: its model contains itself, or nests without end")
        if (eps := _number(node.state.get("eps"))) is not None:
            norms[prefix[:-1]] = {"eps": eps, "momentum": _number(node.state.get("momentum"))}
        transient = node.state.get("_non_persistent_buffers_set")
        if isinstance(transient, set):
            buffers = {name: value for name, value in buffers.items() if name not in transient}
        for name, value in (*parameters.items(), *buffers.items()):
            if prefix + name in tensors:
                raise CheckpointError(f"its model has two tensors '{shorten(prefix + name)}'")
            if value is not None:
                tensors[prefix + name] = value
        for name, child in reversed(children.items()):
            if is_module(child):
                stack.append((f"{prefix}{name}.", child))
    return tensors, norms


def _entries(module: Standin, member: str) -> dict[str, Any]:
    entries = module.state.get(member)
    if not isinstance(entries, dict):
        return {}
    for name in entries:
        if not isinstance(name, str):
            raise CheckpointError(
                f"'{member}' in its model has the name {shorten(repr(name))}, which is no string"
            )
    return entries


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and type(value) is not bool else None


def norms_of(module: Any) -> Norms:
    """The settings of a live `torch.nn.Module`'s norms: of every submodule with a number `eps`."""
    return {
        path: {"eps": eps, "momentum": _number(getattr(child, "momentum", None))}
        for path, child in module.named_modules(remove_duplicate=False)
        if (eps := _number(getattr(child, "eps", None))) is not None
    }


def to_numpy(tensor: Any, key: str, room: float = math.inf) -> np.ndarray:
    """A torch tensor as an array of the same dtype, over the same memory where it is on the CPU.

    Raises `CheckpointError` for what is not dense numbers (sparse, quantized, meta), and for what
    would fill more than `room` bytes: a view can repeat one stored number without end.
    """
    import torch

    shown = shorten(key)
    if tensor.layout != torch.strided:
        raise CheckpointError(f"'{shown}' is sparse: call .to_dense() on it before saving")
    if tensor.is_quantized:
        raise CheckpointError(f"'{shown}' is quantized: call .dequantize() on it before saving")
    if tensor.device.type == "meta":
        raise CheckpointError(
            f"'{shown}' is on the meta device, without numbers: fill the model first"
        )
    if tensor.nbytes > room:
        raise CheckpointError(
            f"refused: with '{shown}' its tensors stretch to more than four times the file"
        )
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    name = str(tensor.dtype).removeprefix("torch.")
    if name == "bfloat16" or name.startswith("float8_"):  # torch hands them to numpy as bits only
        bits = torch.int16 if name == "bfloat16" else torch.uint8
        return tensor.view(bits).numpy().view(getattr(ml_dtypes, name))
    try:
        return tensor.numpy()
    except TypeError as error:
        raise CheckpointError(
            f"'{shown}' is {name}: convert it to float32 before saving"
        ) from error


def read(path: str, container: str) -> Any:
    """What `torch.save` wrote to `path`: tensors on the CPU, unknown classes as `Standin`s.

    `container` is "zip" or "legacy". A zip's tensors are views of the file, mapped copy-on-write.
    """
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            "needs PyTorch to be read: pip install 'gam-attention[torch]', "
            "or convert it to safetensors where PyTorch is installed"
        ) from error
    scan = PickleScan()
    with open(path, "rb") as file:
        if container == "zip":
            scan.follow(io.BytesIO(_checked_pickle(path)))
            # For this suffix torch.load would call another library, whatever the file is.
            source: Any = file if path.endswith(".safetensors") else path
        else:
            for _ in range(5):  # magic number, version, system, the object, the storages' keys
                scan.follow(file)
            end = file.tell()
            file.seek(0)
            head = _without_sources(file.read(end), scan.sources)
            source = io.BufferedReader(_Spliced(head, file, end))
        with _permitting(_standins(scan)):
            return torch.load(
                source, map_location="cpu", weights_only=True, mmap=isinstance(source, str)
            )


@contextlib.contextmanager
def _permitting(classes: list[Any]) -> Iterator[None]:
    """Lets torch's unpickler use `classes`, and none of those the user has permitted elsewhere."""
    from torch import serialization

    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of unusual pickle protocols: what fails raises as well
        permitted = serialization.get_safe_globals()
        serialization.clear_safe_globals()
        try:
            with serialization.safe_globals(classes):
                yield
        finally:
            serialization.add_safe_globals(permitted)


def _standins(scan: PickleScan) -> list[tuple[Any, str]]:
    """An inert class for every name in the pickle; torch asks only for those that it does not know.

    torch fills nothing but exact dicts and lists, so these stand in for subclasses of theirs.
    """
    classes: list[tuple[Any, str]] = [(_second, "gam_flax.second")] if scan.sources else []
    for name in scan.makers:
        if name in scan.dicts:
            body = {"__new__": lambda cls, *args, **kwargs: OrderedDict()}
            classes.append((type("DictStandin", (), body), name))
        elif name in scan.lists:
            body = {"__new__": lambda cls, *args, **kwargs: []}
            classes.append((type("ListStandin", (), body), name))
        else:
            classes.append((type("Standin", (Standin,), {"__slots__": ()}), name))
    return classes


def _second(*items: Any) -> Any:
    return items[1]


def _without_sources(head: bytes, sources: list[tuple[int, int]]) -> bytes:
    """`head`, with plain classes where a legacy file has ("module", class, file, source) for them.

    torch's restricted unpickler refuses these tuples, of which a whole model has many. Each becomes
    the argument of a call, by REDUCE in the place of BINPERSID, that gives back its second item.
    """
    edits = [(start, start, b"cgam_flax\nsecond\n") for start, _ in sources]
    edits += [(use, use + 1, b"R") for _, use in sources]
    pieces, at = [], 0
    for start, end, new in sorted(edits):
        pieces += [head[at:start], new]
        at = end
    return b"".join([*pieces, head[at:]])


class _Spliced(io.RawIOBase):
    """A file whose first bytes, up to `end`, are replaced by `head`."""

    def __init__(self, head: bytes, file: io.BufferedReader, end: int) -> None:
        self._head, self._file, self._end, self._at = head, file, end, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("seek from the end")
        self._at = offset + (self._at if whence == io.SEEK_CUR else 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        if self._at < len(self._head):
            piece = self._head[self._at : self._at + len(view)]
            view[: len(piece)] = piece
            count = len(piece)
        else:
            self._file.seek(self._at - len(self._head) + self._end)
            count = self._file.readinto(view)
        self._at += count
        return count


def _checked_pickle(path: str) -> bytes:
    """The pickle in a zip container, if that is sound: plain entries with the right checksums."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        root = names[0].partition("/")[0] if names else ""
        if f"{root}/constants.pkl" in names:
            raise CheckpointError(
                f"a TorchScript archive: load it with torch.jit.load, then {SAVE_AGAIN}"
            )
        if any(name.endswith(".npy") for name in names):
            raise CheckpointError(
                "a numpy archive: load it with numpy.load, and pass on the arrays"
            )
        if f"{root}/data.pkl" not in names:
            raise CheckpointError("a zip archive that torch.save did not write: it has no data.pkl")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise CheckpointError(
                "refused: it is compressed, which torch.save never does; unpack it"
            )
        if len(set(names)) < len(names):
            raise CheckpointError("refused: two entries of the zip archive have the same name")
        if sum(entry.file_size for entry in entries) > os.path.getsize(path):
            raise CheckpointError(
                "refused: the entries of the zip archive claim more than the file has"
            )
        for entry in entries:
            _verify(archive, entry)
        return archive.read(f"{root}/data.pkl")


def _verify(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    """Reads an entry to its end, where zipfile compares the checksum. torch itself never does."""
    if not entry.CRC:
        del entry.CRC  # torch was told to save without checksums, and zipfile is to ask for none
    with archive.open(entry) as file:
        while file.read(1 << 20):
            pass
