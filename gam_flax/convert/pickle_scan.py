"""Follows a pickle on paper before anything is built from it.

torch's restricted unpickler runs no foreign code, but it can be made to hash a tuple that holds
itself twice, forty times over, or to fill memory from a file of a hundred bytes. The scan sees this
beforehand. It also learns which classes the pickle names, which of them it fills like a dict or a
list, and where a legacy file keeps the source code of its modules.
"""

from __future__ import annotations

import io
import pickletools
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gam_flax.convert.errors import CheckpointError, shorten

# What a pickle may name of the standard library: plain data. A file that names anything else there
# is refused. It would be built inert like any unknown class, but its owner should hear of it.
_DATA_MODULES = {"collections", "datetime", "decimal", "enum", "fractions", "pathlib", "uuid"}
_DATA_NAMES = {
    "_codecs": {"encode"},  # how protocol 2 writes bytes
    "_io": {"BytesIO"},
    "argparse": {"Namespace"},
    "builtins": {
        *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list"),
        *("object", "range", "set", "slice", "str", "tuple"),
        "getattr",  # how a method of an object is written, which fused YOLOv5 models have
    },
    "functools": {"partial"},
    "types": {"SimpleNamespace"},
}

_MAX_CLASSES = 1_000  # the largest real files name about a hundred
_MAX_DEPTH = 100  # of tuples: hashing one is recursive C code
_MAX_WEIGHT = 1 << 40  # beyond this no sum is needed, and doubling would make huge integers


@dataclass(slots=True)
class _Value:
    """What is known of a value on the pickle's stack."""

    maker: str = ""  # the class or function that it is, or that made it
    weight: int = 1  # how many values hashing or copying it would touch
    depth: int = 0  # how deep tuples nest in it
    number: int = 0  # the largest integer in it
    says_module: bool = False  # it is the word "module"
    start: int = -1  # where it began, if it is a tuple ("module", class, file, source)


class PickleScan:
    """Follows one or more pickles; `CheckpointError` for what must not be built.

    makers: the classes and functions that are named, in order.
    dicts, lists: those of them whose instances are filled by SETITEMS and by APPENDS.
    sources: where each ("module", class, file, source) of a legacy file begins, and is used.
    """

    def __init__(self) -> None:
        self.makers: dict[str, None] = {}
        self.dicts: set[str] = set()
        self.lists: set[str] = set()
        self.sources: list[tuple[int, int]] = []
        self._work = 0
        self._at = 0

    def follow(self, stream: io.BytesIO | io.BufferedReader) -> None:
        """One pickle, from where `stream` stands to its STOP."""
        first = stream.tell()
        self._stack: list[_Value] = []
        self._below: list[tuple[list[_Value], int]] = []  # under each MARK, and its place
        self._memo: dict[int, _Value] = {}
        for opcode, arg, at in pickletools.genops(stream):
            self._at = at or 0
            if opcode.name not in _STEPS:
                raise CheckpointError(
                    f"refused: its pickle has protocol {opcode.proto}, or is made by hand (it uses "
                    f"{opcode.name}); save it again with torch.save and its default protocol"
                )
            _STEPS[opcode.name](self, arg)
            if self._work > 4 * (self._at - first) + 100_000:  # real: 0.3 a byte
                raise CheckpointError("refused: its pickle unfolds into more than the file holds")

    # The steps: one for each opcode or family of them. `arg` is what pickletools read for it.

    def _plain(self, arg: object) -> None:
        self._stack.append(_Value())

    def _integer(self, arg: int) -> None:
        self._stack.append(_Value(number=max(arg, 0)))

    def _string(self, arg: str) -> None:
        # Eight characters weigh as much as a value.
        self._stack.append(_Value(weight=1 + len(arg) // 8, says_module=arg == "module"))

    def _global(self, arg: str) -> None:
        name = _permitted(*arg.split(" ", 1))
        self.makers[name] = None
        if len(self.makers) > _MAX_CLASSES:
            raise CheckpointError(f"refused: its pickle names more than {_MAX_CLASSES} classes")
        self._stack.append(_Value(name))

    def _put(self, arg: int) -> None:
        self._memo[arg] = self._stack[-1]

    def _get(self, arg: int) -> None:
        self._stack.append(self._memo[arg])

    def _mark(self, arg: None) -> None:
        self._below.append((self._stack, self._at))
        self._stack = []

    def _pop(self, count: int) -> list[_Value]:
        items = self._stack[-count:]
        if len(items) < count:
            raise IndexError("pop from an empty stack")
        del self._stack[-count:]
        return items

    def _pop_to_mark(self) -> list[_Value]:
        items = self._stack
        self._stack, self._at_mark = self._below.pop()
        return items

    def _tuple(self, items: list[_Value]) -> None:
        depth = 1 + max((item.depth for item in items), default=0)
        if depth > _MAX_DEPTH:
            raise CheckpointError(f"refused: its pickle nests tuples more than {_MAX_DEPTH} deep")
        weight = min(1 + sum(item.weight for item in items), _MAX_WEIGHT)
        number = max((item.number for item in items), default=0)
        self._stack.append(_Value(weight=weight, depth=depth, number=number))

    def _marked_tuple(self, arg: None) -> None:
        items = self._pop_to_mark()
        self._tuple(items)
        if len(items) > 1 and items[0].says_module:
            made = self._stack[-1]
            made.start, made.maker = self._at_mark, items[1].maker

    def _set(self, items: list[_Value]) -> None:
        self._work += sum(key.weight for key in items[::2])  # keys are hashed
        self._fill(items, self.dicts)

    def _extend(self, items: list[_Value]) -> None:
        self._fill(items, self.lists)

    def _fill(self, items: list[_Value], kind: set[str]) -> None:
        target = self._stack[-1]
        target.weight = min(target.weight + sum(item.weight for item in items), _MAX_WEIGHT)
        if target.maker:
            kind.add(target.maker)

    def _call(self, arg: None) -> None:
        made_by, args = self._pop(2)
        self._work += args.weight  # set(a_list) copies it, each time that the same list is named
        if made_by.maker == "builtins.bytearray":
            self._work += args.number  # bytearray(n) writes n bytes
        weight = min(1 + args.weight, _MAX_WEIGHT)
        self._stack.append(_Value(made_by.maker, weight, args.depth))

    def _persistent(self, arg: None) -> None:
        (key,) = self._pop(1)
        if key.start >= 0:
            self.sources.append((key.start, self._at))
        self._stack.append(_Value(key.maker))

    def _build(self, arg: None) -> None:
        self._pop(1)

    def _nothing(self, arg: object) -> None:
        pass


# The opcodes that torch's restricted unpickler knows; torch.save writes no other.
_STEPS: dict[str, Callable[[PickleScan, Any], None]] = {
    **dict.fromkeys(("NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT"), PickleScan._plain),
    **dict.fromkeys(("EMPTY_DICT", "EMPTY_LIST", "EMPTY_SET", "EMPTY_TUPLE"), PickleScan._plain),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1"), PickleScan._integer),
    **dict.fromkeys(("BINUNICODE", "SHORT_BINSTRING"), PickleScan._string),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), PickleScan._put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), PickleScan._get),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), PickleScan._call),
    **dict.fromkeys(("PROTO", "STOP"), PickleScan._nothing),
    "GLOBAL": PickleScan._global,
    "BUILD": PickleScan._build,
    "BINPERSID": PickleScan._persistent,
    "MARK": PickleScan._mark,
    "TUPLE": PickleScan._marked_tuple,
    "TUPLE1": lambda scan, _: scan._tuple(scan._pop(1)),
    "TUPLE2": lambda scan, _: scan._tuple(scan._pop(2)),
    "TUPLE3": lambda scan, _: scan._tuple(scan._pop(3)),
    "SETITEM": lambda scan, _: scan._set(scan._pop(2)),
    "SETITEMS": lambda scan, _: scan._set(scan._pop_to_mark()),
    "APPEND": lambda scan, _: scan._extend(scan._pop(1)),
    "APPENDS": lambda scan, _: scan._extend(scan._pop_to_mark()),
}


def _permitted(module: str, name: str) -> str:
    """The dotted name that a GLOBAL asks for, Python 2's names translated as torch does it."""
    if (module, name) in NAME_MAPPING:
        module, name = NAME_MAPPING[module, name]
    else:
        module = IMPORT_MAPPING.get(module, module)
    root = module.partition(".")[0]
    data = root in _DATA_MODULES or name in _DATA_NAMES.get(module, ())
    if root in sys.stdlib_module_names and not data:
        raise CheckpointError(
            f"refused: the pickle asks for {shorten(f'{module}.{name}')}; nothing was run. "
            "Only tensors and plain data are read."
        )
    return f"{module}.{name}"
