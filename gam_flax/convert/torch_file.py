"""Files written by `torch.save`, read without running anything that is in them.

A `.pt` file is a pickle, and a pickle is a program. It is read here in two steps:

1. `_Scan` follows the pickle on paper, with the standard library's disassembler: which classes it names, which
   of them are filled like a dict or a list, how much work it asks for. Functions of the standard library and
   loads that would exhaust the machine are refused at this point.
2. `torch.load(weights_only=True)` builds the objects. It knows tensors and plain containers only; for every
   other class the file names, it is handed a `Standin`, which keeps what it is given and does nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickletools
import sys
import threading
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import ml_dtypes
import numpy as np

from gam_flax.convert.errors import CheckpointError, shorten

Norms = dict[str, dict[str, "float | None"]]

# What of the standard library a checkpoint may name: data, inert here like every other class.
_DATA_MODULES = {"collections", "datetime", "decimal", "enum", "fractions", "pathlib", "uuid"}
_DATA_CLASSES = {
    "_codecs.encode",
    "_io.BytesIO",
    "argparse.Namespace",
    "functools.partial",
    "io.BytesIO",
    "types.SimpleNamespace",
    *(
        f"builtins.{name}"
        for name in "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple".split()
    ),
}

_MAX_CLASSES = 1_000  # the largest real files name about a hundred
_MAX_DEPTH = 100  # of tuples: hashing one is recursive C code
_MAX_WEIGHT = 1 << 40  # weights stop growing here, so that they stay machine integers
_MAX_WALK = 50_000_000  # characters of module paths to write out; real models need about 100,000

_PICK = ("gam_flax", "legacy_module")  # the name under which `_second` is known to the unpickler
_LOCK = threading.Lock()  # torch's list of allowed classes is one for the whole process


class Standin:
    """An inert object in the place of a class that is not to be imported: it keeps its state, and does nothing."""

    __slots__ = ("state",)

    def __new__(cls, *args: object, **kwargs: object) -> Standin:
        self = object.__new__(cls)
        self.state = {}
        return self

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and state:  # (dictionary, slots)
            state = state[0]
        if isinstance(state, dict):
            self.state = state


def is_module(value: object) -> bool:
    """Whether `value` stands in for a pickled `torch.nn.Module`."""
    return isinstance(value, Standin) and all(
        isinstance(value.state.get(name), dict) for name in ("_modules", "_parameters")
    )


def flatten(module: Standin) -> tuple[dict[str, Any], Norms]:
    """A pickled module's tensors under the keys and in the order of `state_dict()`, and the settings of its norms.

    Every submodule with a numeric `eps` counts as a norm. Raises `CheckpointError` where two tensors have the same
    key, where a name is no string, and for a tree that repeats itself without end.
    """
    tensors: dict[str, Any] = {}
    norms: Norms = {}
    walked = 0
    stack: list[tuple[str, Any]] = [("", module)]
    while stack:
        prefix, node = stack.pop()
        state = node.state
        if _is_number(state.get("eps")):
            momentum = state.get("momentum")
            norms[prefix[:-1]] = {
                "eps": float(state["eps"]),
                "momentum": float(momentum) if _is_number(momentum) else None,
            }
        transient = state.get("_non_persistent_buffers_set", ())
        buffers = [(k, v) for k, v in _entries(state, "_buffers", prefix) if k not in transient]
        for name, value in [*_entries(state, "_parameters", prefix), *buffers]:
            if prefix + name in tensors:
                raise CheckpointError(f"two tensors of the pickled model are called {shorten(prefix + name)!r}")
            if value is not None:
                tensors[prefix + name] = value
        children = [(f"{prefix}{k}.", v) for k, v in _entries(state, "_modules", prefix) if is_module(v)]
        stack.extend(reversed(children))
        walked += len(prefix) + 1 + sum(len(path) for path, _ in children)
        if walked > _MAX_WALK:
            raise CheckpointError("refused: the pickled model contains itself, or is nested beyond any real model")
    return tensors, norms


def _entries(state: dict, member: str, prefix: str) -> Iterator[tuple[str, Any]]:
    members = state.get(member)
    for name, value in members.items() if isinstance(members, dict) else ():
        if not isinstance(name, str):
            raise CheckpointError(f"{shorten(prefix + member)!r} of the pickled model has a key that is no string")
        yield name, value


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def norms_of(module: Any) -> Norms:
    """The same settings, from a live `torch.nn.Module`."""
    norms: Norms = {}
    for path, child in module.named_modules():
        eps, momentum = getattr(child, "eps", None), getattr(child, "momentum", None)
        if isinstance(eps, float):
            norms[path] = {"eps": eps, "momentum": float(momentum) if _is_number(momentum) else None}
    return norms


def to_numpy(tensor: Any, key: str) -> np.ndarray:
    """A torch tensor as an array of the same dtype, over the same memory where it lies on the CPU.

    Raises `CheckpointError` for what is not one dense block of numbers: sparse, quantized, meta.
    """
    import torch

    shown = shorten(key)
    if tensor.layout != torch.strided:
        raise CheckpointError(f"{shown!r} is sparse ({tensor.layout}): call .to_dense() on it before saving")
    if tensor.is_quantized:
        raise CheckpointError(f"{shown!r} is quantized ({tensor.dtype}): call .dequantize() on it before saving")
    if tensor.device.type == "meta":
        raise CheckpointError(f"{shown!r} is on the meta device and holds no numbers: save the model once it is filled")
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    name = str(tensor.dtype).removeprefix("torch.")
    if name == "bfloat16" or name.startswith("float8_"):  # numpy knows them through ml_dtypes only: go by the bits
        bits = torch.int16 if name == "bfloat16" else torch.uint8
        return tensor.view(bits).numpy().view(getattr(ml_dtypes, name))
    try:
        return tensor.numpy()
    except TypeError as error:
        raise CheckpointError(f"{shown!r} is {tensor.dtype}, which numpy does not hold: convert it before saving") from error


def read(path: str, container: str) -> Any:
    """The object that `torch.save` wrote to `path`; its tensors on the CPU, its unknown classes as `Standin`s.

    `container` is "zip" or "legacy". The tensors of a zip are views of the file, mapped copy-on-write.
    """
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            "needs PyTorch to be read: pip install 'gam-attention[torch]', "
            "or convert it to safetensors where PyTorch is installed"
        ) from error
    with contextlib.ExitStack() as stack:
        source: Any = path
        if container == "zip":
            pickle = _checked_pickle(path)
            scan = _Scan()
            scan.follow(io.BytesIO(pickle))
            mapped = not path.endswith(".safetensors")  # for this suffix torch.load calls another library
            if not mapped:
                source = stack.enter_context(open(path, "rb"))
        else:
            file = stack.enter_context(open(path, "rb"))
            scan = _Scan()
            for _ in range(5):  # magic number, protocol, system, the object, the storages' keys
                scan.follow(file)
            end = file.tell()
            file.seek(0)
            source = io.BufferedReader(_Spliced(scan.without_sources(file.read(end)), file, end))
            mapped = False
        stack.enter_context(_only(scan.standins()))
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mapped)


@contextlib.contextmanager
def _only(standins: list[tuple[Any, str]]) -> Iterator[None]:
    """Lets the unpickler know `standins` and nothing else, not even classes that the user has allowed elsewhere."""
    from torch import serialization

    with _LOCK, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # unusual pickle protocols: what fails raises as well
        allowed = serialization.get_safe_globals()
        serialization.clear_safe_globals()
        try:
            with serialization.safe_globals(standins):
                yield
        finally:
            serialization.add_safe_globals(allowed)


def _checked_pickle(path: str) -> bytes:
    """The pickle inside a zip container, once the container is known to be sound: plain entries, right checksums."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        root = names[0].partition("/")[0] if names else ""
        if f"{root}/constants.pkl" in names:
            raise CheckpointError(
                "a TorchScript archive: load it with torch.jit.load, then torch.save(model.state_dict(), ...)"
            )
        if any(name.endswith(".npy") for name in names):
            raise CheckpointError("a numpy .npz archive: load it with numpy.load and pass the arrays as a dict")
        if f"{root}/data.pkl" not in names:
            raise CheckpointError("a zip archive that torch.save did not write (it has no data.pkl)")
        if len(set(names)) < len(names) or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise CheckpointError("refused: its entries are compressed or repeated, which torch.save never does")
        if sum(entry.file_size for entry in entries) > os.path.getsize(path):
            raise CheckpointError("refused: its entries claim more bytes than the file has")
        pickle = b""
        for entry in entries:
            if not entry.CRC:
                del entry.CRC  # torch was told to save without checksums: zipfile then checks nothing
            with archive.open(entry) as record:
                if entry.filename == f"{root}/data.pkl":
                    pickle = record.read()
                while record.read(1 << 20):  # to the end, where zipfile compares the checksum; torch does not
                    pass
        return pickle


class _Spliced(io.RawIOBase):
    """A file whose first bytes, up to `end`, are replaced by `head`."""

    def __init__(self, head: bytes, file: IO[bytes], end: int) -> None:
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
            count = self._file.readinto(view)  # type: ignore[attr-defined]
        self._at += count
        return count


def _second(*items: Any) -> Any:
    return items[1]


@dataclass(slots=True)
class _Slot:
    """What is known of a value on the pickle's stack."""

    maker: str = ""  # the class or function that it is, or that made it
    weight: int = 1  # how many values hashing or copying it would touch
    depth: int = 0  # how deep tuples nest in it
    number: int = 0  # the largest integer in it
    text: str = ""  # kept for the word "module" only
    start: int = -1  # where the tuple ("module", class, file, source) began


class _Scan:
    """Follows pickles without building anything; `CheckpointError` for what is not to be built."""

    def __init__(self) -> None:
        self.makers: dict[str, None] = {}  # in the order of the file
        self.dicts: set[str] = set()  # the makers of what is filled like a dict
        self.lists: set[str] = set()
        self.sources: list[tuple[int, int]] = []  # where ("module", class, file, source) begins and is used
        self._work = 0

    def follow(self, stream: IO[bytes]) -> None:
        """One pickle, from where `stream` stands to its STOP."""
        first = stream.tell()
        self._stack: list[_Slot] = []
        self._frames: list[tuple[list[_Slot], int]] = []  # the stacks below each MARK, and where it is
        self._memo: dict[int, _Slot] = {}
        for opcode, arg, self._at in pickletools.genops(stream):
            if opcode.name not in _STEPS:
                raise CheckpointError(
                    f"refused: pickled with protocol {opcode.proto} or by hand (it uses {opcode.name}); "
                    "save it again with torch.save and its default protocol"
                )
            _STEPS[opcode.name](self, arg)
            if self._work > 4 * (self._at - first) + 100_000:
                raise CheckpointError("refused: the pickle unfolds into far more than the file holds")

    def standins(self) -> list[tuple[Any, str]]:
        """A stand-in for each class named, and its name, as `torch.serialization.safe_globals` takes them.

        Those torch knows are never asked for. torch fills only what is exactly a dict or a list, so a subclass of
        one (defaultdict, AttributeDict) is stood in for by the plain thing.
        """
        pairs: list[tuple[Any, str]] = [(_second, ".".join(_PICK))] if self.sources else []
        for name in self.makers:
            base, body = Standin, {"__slots__": ()}
            if name in self.dicts:
                base, body = object, {"__new__": lambda cls, *args, **kwargs: OrderedDict()}
            elif name in self.lists:
                base, body = object, {"__new__": lambda cls, *args, **kwargs: []}
            pairs.append((type("Standin", (base,), body), name))
        return pairs

    def without_sources(self, head: bytes) -> bytes:
        """`head`, with classes as such where a legacy file has ("module", class, file, source).

        torch's restricted unpickler refuses these tuples, which the legacy format has for every class of a pickled
        model. So each one becomes the argument of a call that gives back its second item.
        """
        call = "c{}\n{}\n".format(*_PICK).encode()
        edits = [(start, start, call) for start, _ in self.sources]
        edits += [(use, use + 1, b"R") for _, use in self.sources]  # REDUCE in the place of BINPERSID
        pieces, at = [], 0
        for start, end, new in sorted(edits):
            pieces += [head[at:start], new]
            at = end
        return b"".join([*pieces, head[at:]])

    # One method an opcode, or a family of them. `arg` is what pickletools read for it.

    def _plain(self, arg: object) -> None:
        self._stack.append(_Slot())

    def _integer(self, arg: int) -> None:
        self._stack.append(_Slot(number=max(arg, 0)))

    def _string(self, arg: str) -> None:
        weight = 1 + len(arg) // 8  # eight characters weigh as much as a value
        self._stack.append(_Slot(text="module" if arg == "module" else "", weight=weight))

    def _global(self, arg: str) -> None:
        name = _permitted(*arg.split(" ", 1))
        self.makers[name] = None
        if len(self.makers) > _MAX_CLASSES:
            raise CheckpointError(f"refused: the pickle names more than {_MAX_CLASSES} classes")
        self._stack.append(_Slot(name))

    def _put(self, arg: int) -> None:
        self._memo[arg] = self._stack[-1]

    def _get(self, arg: int) -> None:
        self._stack.append(self._memo[arg])

    def _mark(self, arg: None) -> None:
        self._frames.append((self._stack, self._at))
        self._stack = []

    def _tuple(self, arg: None) -> None:
        items = self._stack
        self._stack, mark = self._frames.pop()
        slot = _tuple(items)
        if len(items) > 1 and items[0].text:
            slot.start, slot.maker = mark, items[1].maker
        self._stack.append(slot)

    def _short_tuple(self, size: int) -> None:
        self._stack[-size:] = [_tuple(self._stack[-size:])]

    def _setitem(self, arg: None) -> None:
        key, value = self._stack[-2:]
        del self._stack[-2:]
        self._fill([key, value], self.dicts)
        self._work += key.weight  # hashed

    def _setitems(self, arg: None) -> None:
        items = self._stack
        self._stack, _ = self._frames.pop()
        self._fill(items, self.dicts)
        self._work += sum(key.weight for key in items[::2])

    def _append(self, arg: None) -> None:
        self._fill([self._stack.pop()], self.lists)

    def _appends(self, arg: None) -> None:
        items = self._stack
        self._stack, _ = self._frames.pop()
        self._fill(items, self.lists)

    def _fill(self, items: list[_Slot], kind: set[str]) -> None:
        target = self._stack[-1]
        target.weight = min(target.weight + sum(item.weight for item in items), _MAX_WEIGHT)
        if target.maker:
            kind.add(target.maker)

    def _call(self, arg: None) -> None:
        args, maker = self._stack.pop(), self._stack.pop().maker
        self._work += args.weight  # copied or hashed, if it is one of the few calls that torch really makes
        if maker == "builtins.bytearray":
            self._work += args.number  # bytearray(n) writes n bytes
        self._stack.append(_Slot(maker, min(args.weight + 1, _MAX_WEIGHT), args.depth))

    def _persistent(self, arg: None) -> None:
        key = self._stack.pop()
        if key.start >= 0:
            self.sources.append((key.start, self._at))
        self._stack.append(_Slot(key.maker))

    def _build(self, arg: None) -> None:
        self._stack.pop()

    def _nothing(self, arg: object) -> None:
        pass


# The opcodes that torch's restricted unpickler knows.
_STEPS: dict[str, Callable[[_Scan, Any], None]] = {
    **dict.fromkeys(("NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT"), _Scan._plain),
    **dict.fromkeys(("EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET", "EMPTY_TUPLE"), _Scan._plain),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), _Scan._integer),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINSTRING"), _Scan._string),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Scan._put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Scan._get),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Scan._call),
    **dict.fromkeys(("PROTO", "STOP"), _Scan._nothing),
    "TUPLE1": lambda scan, _: scan._short_tuple(1),
    "TUPLE2": lambda scan, _: scan._short_tuple(2),
    "TUPLE3": lambda scan, _: scan._short_tuple(3),
    "TUPLE": _Scan._tuple,
    "MARK": _Scan._mark,
    "GLOBAL": _Scan._global,
    "SETITEM": _Scan._setitem,
    "SETITEMS": _Scan._setitems,
    "APPEND": _Scan._append,
    "APPENDS": _Scan._appends,
    "BUILD": _Scan._build,
    "BINPERSID": _Scan._persistent,
}


def _permitted(module: str, name: str) -> str:
    """The dotted name that a GLOBAL asks for, Python 2's names translated as torch does it."""
    if (module, name) in NAME_MAPPING:
        module, name = NAME_MAPPING[module, name]
    else:
        module = IMPORT_MAPPING.get(module, module)
    dotted = f"{module}.{name}"
    root = module.partition(".")[0]
    if root in sys.stdlib_module_names and root not in _DATA_MODULES and dotted not in _DATA_CLASSES:
        raise CheckpointError(
            f"refused: the pickle asks for {shorten(dotted)}; nothing was run. Only tensors and plain data are read."
        )
    return dotted


def _tuple(items: list[_Slot]) -> _Slot:
    depth = 1 + max((item.depth for item in items), default=0)
    if depth > _MAX_DEPTH:
        raise CheckpointError(f"refused: the pickle nests tuples more than {_MAX_DEPTH} deep")
    return _Slot(
        weight=min(1 + sum(item.weight for item in items), _MAX_WEIGHT),
        depth=depth,
        number=max((item.number for item in items), default=0),
    )
