"""Builds hostile checkpoint files, byte by byte. Reading one must end in one line, and run nothing.

The pickles are put together from opcodes, because `pickle` would not write most of them.
"""

from __future__ import annotations

import functools
import io
import json
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

MAGIC = 0x1950A86A20F9469CFC6C


class Call:
    """Pickles as a call: what runs the moment that a careless reader loads it."""

    def __init__(self, function: Callable, *args: object) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Callable, tuple]:
        return self.function, self.args


# Containers


def zip_container(
    pickled: bytes,
    storages: Mapping[str, bytes] | None = None,
    *,
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """What torch.save would have written around this pickle and these storages."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
        archive.writestr("archive/version", "3\n")
    return stream.getvalue()


def legacy_container(pickled: bytes, storages: Mapping[str, bytes] | None = None) -> bytes:
    """The same in the format before PyTorch 1.6; storages of float32."""
    storages = storages or {}
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    head = b"".join(pickle.dumps(part, protocol=2) for part in (MAGIC, 1001, system))
    tail = b"".join(struct.pack("<q", len(data) // 4) + data for data in storages.values())
    return head + pickled + pickle.dumps(list(storages), protocol=2) + tail


# Pickles


def program(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def text(value: str) -> bytes:
    encoded = value.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def integer(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x10" + value.to_bytes(16, "little", signed=True)


def tuple_of(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def dict_of(**entries: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def call(function: bytes, *args: bytes) -> bytes:
    return function + tuple_of(*args) + b"R"


def tensor(
    shape: tuple[int, ...] = (2,),
    stride: tuple[int, ...] = (1,),
    *,
    stored: int = 2,
    offset: int = 0,
    location: str = "cpu",
    key: str = "0",
    legacy: bool = False,
) -> bytes:
    """A float32 tensor of this shape and stride over a storage of `stored` numbers."""
    view = (b"N",) if legacy else ()
    storage = tuple_of(
        text("storage"),
        name("torch", "FloatStorage"),
        *(text(key), text(location), integer(stored), *view),
    )
    return call(
        name("torch._utils", "_rebuild_tensor_v2"),
        storage + b"Q",
        integer(offset),
        tuple_of(*map(integer, shape)),
        tuple_of(*map(integer, stride)),
        b"\x89",
        call(name("collections", "OrderedDict")),
    )


def doubled(levels: int) -> bytes:
    """((x, x), (x, x)) and so on: `levels` deep, 2**levels leaves, four bytes a level."""
    steps = (b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(levels))
    return b"K\x01" + b"".join(steps)


def module(parameters: bytes = b"}", modules: bytes = b"}") -> bytes:
    """A module of a class that nobody has."""
    state = dict_of(_parameters=parameters, _buffers=b"}", _modules=modules)
    return name("lost.models", "Net") + b")\x81" + state + b"b"


@functools.cache
def bombs(*, legacy: bool = False) -> dict[str, bytes]:
    """Files, in either container, that take little room and all of the time or the memory."""
    weight = tensor(legacy=legacy)
    net, open_state = name("lost.models", "Net") + b")\x81", b"}(" + text("_parameters")
    nameless = b"}(" + b"".join(text(f"p{i}") + b"N" for i in range(1_500)) + b"u"
    sharing = b"".join(
        text(f"m{i}") + net + open_state + b"h\x00" + text("_modules") + b"}ub"
        for i in range(1_500)
    )
    nested = net + open_state + b"}" + text("_modules") + b"}" + text("m")
    pickles = {
        "a key that takes 2**60 steps to hash": program(b"}", doubled(60), b"K\x01s"),
        "a key whose hash overflows the stack": program(b"}K\x01" + b"\x85" * 10**6 + b"K\x01s"),
        "a set of such keys": program(call(name("__builtin__", "set"), b"](" + doubled(60) + b"e")),
        "a list copied again and again": program(
            b"](" + b"K\x01" * 20_000 + b"eq\x00" + name("__builtin__", "set") + b"q\x01",
            b"h\x01h\x00\x85R" * 20_000,
        ),
        "a text encoded again and again": program(
            text("x" * 100_000) + b"q\x00" + name("_codecs", "encode") + b"q\x01",
            b"h\x01h\x00\x85R" * 20_000,
        ),
        "64 GiB of zeros": program(call(name("__builtin__", "bytearray"), integer(2**36))),
        "lists in lists, named twice each": program(
            b"]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(100)),
        ),
        "a list that contains itself": program(b"]q\x00h\x00a"),
        "a dictionary that contains itself": program(b"}q\x00" + text("model") + b"h\x00s"),
        "weights in a dictionary that contains itself": program(
            b"}q\x00" + text("model") + b"h\x00s" + text("w") + weight + b"s"
        ),
        "dictionaries 3,000 deep": program((b"}" + text("model")) * 3_000 + weight + b"s" * 3_000),
        "10,000 classes": program(*(name("a", f"C{i}") for i in range(10_000))),
        "a module that contains itself": program(
            net + b"q\x00" + dict_of(_parameters=b"}", _modules=dict_of(again=b"h\x00")) + b"b",
        ),
        "modules in modules, named twice each": program(
            module(dict_of(w=weight)) + b"q\x00",
            *(
                module(modules=dict_of(a=b"h%c" % i, b=b"h%c" % i)) + b"q%c" % (i + 1)
                for i in range(100)
            ),
        ),
        "modules 3,000 deep": program(nested * 3_000 + b"N" + b"sub" * 3_000),
        "1,500 modules that share 1,500 names": program(
            nameless + b"q\x00" + module(modules=b"}(" + sharing + b"u")
        ),
    }
    container = legacy_container if legacy else zip_container
    return {
        what: container(pickled, {"0": bytes(8)} if weight in pickled else {})
        for what, pickled in pickles.items()
    }


# Safetensors


def safetensors(header: Any, body: bytes = b"", *, length: int | None = None) -> bytes:
    """A file with this header, which may be anything, and a length that may lie about it."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + body


def entry(shape: list[int], first: int, last: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


LIES: dict[str, bytes] = {
    "a header longer than the file": safetensors({}, length=2**20),
    "a header of 2**63 bytes": safetensors({}, length=2**63),
    "a header cut short": safetensors({"w": entry([2], 0, 8)}, bytes(8), length=20),
    "data beyond the end": safetensors({"w": entry([2], 0, 8)}, bytes(4)),
    "data that nobody names": safetensors({"w": entry([2], 0, 8)}, bytes(16)),
    "a shape that does not fit": safetensors({"w": entry([3], 0, 8)}, bytes(8)),
    "a shape beyond 64 bits": safetensors({"w": entry([2**40, 2**40], 0, 8)}, bytes(8)),
    "tensors over each other": safetensors(
        {"w": entry([2], 0, 8), "v": entry([2], 0, 8)}, bytes(8)
    ),
    "offsets backwards": safetensors({"w": entry([2], 8, 0)}, bytes(8)),
    "negative offsets": safetensors({"w": entry([2], -8, 0)}, bytes(8)),
    "an unknown dtype": safetensors({"w": entry([2], 0, 8, "F99")}, bytes(8)),
    "a dtype that numpy has not": safetensors({"w": entry([2], 0, 1, "F4")}, bytes(1)),
    "a name given twice": safetensors(
        b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
        b'"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "brackets 10,000 deep": safetensors(b'{"w":' + b"[" * 10_000),
    "a header that is no UTF-8": safetensors(b'{"\xff":1}'),
    "no tensors": safetensors({}),
}
