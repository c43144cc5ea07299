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
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath, PureWindowsPath
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from gam_flax.convert import torch_file
from gam_flax.convert.errors import CheckpointError, shorten
from gam_flax.convert.file_kind import SAVE_AGAIN, file_kind
from gam_flax.convert.yolo_told import told_by_module

# Where training code puts the weights, best first: averaged weights are those people evaluate.
_WRAPPERS = (
    *("ema", "ema_state_dict", "model_ema", "state_dict_ema"),
    *("state_dict", "model_state_dict", "model", "net", "network", "params", "weights", "module"),
)
_TRAINING = re.compile(r"optim|sched|scaler|^opt$|^opt_|^amp$", re.IGNORECASE)  # never weights
_TRANSPORT = re.compile(r"(?:(?:module|_orig_mod)\.)*")  # DataParallel, torch.compile

_MAX_WRAPPERS = 100  # the loop {"model": itself} has no end

_SAFETENSORS_DTYPES = {
    "BOOL": np.bool_,
    **{f"{kind}{8 * n}": np.dtype(f"{kind.lower()}{n}") for kind in "UI" for n in (1, 2, 4, 8)},
    **{f"F{8 * n}": np.dtype(f"f{n}") for n in (2, 4, 8)},
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
    norms: torch_file.Norms
    layout: str


def read_checkpoint(path: str | os.PathLike, *, entry: str | None = None) -> Checkpoint:
    """Reads the weights in a file; sharded ones by their `*.index.json`, or the folder that has it.

    Read are safetensors and both containers of torch.save, with a state_dict in them, training
    dictionaries around one, or a whole pickled model, of a class that need not exist any more. The
    content decides, not the suffix. Of several candidates averaged weights ("ema") come first, then
    "state_dict", "model" and the like; optimizers never count. `entry` names another choice.

    Raises `CheckpointError`, one line that names the file: for a missing, damaged, hostile or
    foreign file, for sparse and quantized tensors, colliding names, or an unclear choice.
    """
    name = os.fsdecode(path)
    with _naming(name):
        file = _only_checkpoint_in(name) if os.path.isdir(name) else name
        kind = file_kind(file)
        found = _read_shards(file, entry) if kind == "json" else _read_file(file, kind, entry)
        return _plain(replace(found, path=name))


def from_mapping(mapping: Mapping, *, path: str = "") -> Checkpoint:
    """The same for a dictionary in memory: its arrays may be torch's, numpy's or jax's."""
    with _naming(path or "the state_dict in memory"):
        return _plain(replace(_weights_in(mapping, None, "memory"), path=path))


def from_module(module: Any) -> Checkpoint:
    """The same for a live `torch.nn.Module`; the settings of its norms come with it."""
    with _naming(f"the {type(module).__name__} in memory"):
        return _plain(_weights_in(module, None, "memory"))


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turns whatever goes wrong into one line that begins with `name`."""
    shown = shorten(name, 300)
    try:
        yield
    except CheckpointError as error:
        error.args = (f"{shown}: {error}",)
        raise
    except OSError as error:
        raise CheckpointError(f"{shown}: {error.strerror or shorten(error)}") from error
    except Exception as error:  # on damaged files torch and zipfile raise nearly everything
        said = str(error).split("WeightsUnpickler error: ")[-1].strip().partition("\n")[0]
        raise CheckpointError(
            f"{shown}: damaged, or not a checkpoint ({type(error).__name__}: "
            f"{shorten(said, 160)}); copy it again, or where it still loads, {SAVE_AGAIN}"
        ) from error


# Files


def _only_checkpoint_in(folder: str) -> str:
    names = sorted(os.listdir(folder))
    found = [name for name in names if name.endswith(".index.json")]
    found = found or [name for name in names if name.endswith(".safetensors")]
    if len(found) != 1:
        listed = shorten(", ".join(found)) if found else "none"
        raise CheckpointError(
            f"a folder, with {listed} for *.index.json or *.safetensors: name the file to read"
        )
    return os.path.join(folder, found[0])


def _read_file(name: str, kind: str, entry: str | None) -> Checkpoint:
    if kind == "json":
        raise CheckpointError("a JSON file, where a checkpoint was expected")
    if kind == "safetensors":
        contents, metadata = _read_safetensors(name)
    else:
        contents = torch_file.read(name, kind)
        metadata = _strings(contents.get("gam_attention") if isinstance(contents, dict) else None)
    room = 4 * os.path.getsize(name) + 2**20
    return _weights_in(contents, entry, kind, metadata, room)


def _strings(value: object) -> dict[str, str]:
    if not isinstance(value, dict):
        return {}
    return {k: v for k, v in value.items() if isinstance(k, str) and isinstance(v, str)}


def _read_safetensors(name: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Views of the mapped file. The library checks the header; its own arrays would be copies."""
    try:
        with safe_open(name, framework="np") as checked:
            metadata = checked.metadata() or {}
    except SafetensorError as error:
        raise CheckpointError(
            f"not a sound safetensors file ({shorten(error, 160)}): copy it again"
        ) from error
    data = np.asarray(np.memmap(name, np.uint8, mode="c"))
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    header = json.loads(data[8:start].tobytes(), object_pairs_hook=_without_repeats)
    tensors = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise CheckpointError(
                f"'{shorten(key)}' is {entry['dtype']}, which numpy does not hold"
            )
        first, last = entry["data_offsets"]
        dtype = _SAFETENSORS_DTYPES[entry["dtype"]]
        tensors[key] = data[start + first : start + last].view(dtype).reshape(entry["shape"])
    return tensors, metadata


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries: dict[str, Any] = {}
    for name, value in pairs:
        if name in entries:
            raise CheckpointError(f"the JSON in it has '{shorten(name)}' twice")
        entries[name] = value
    return entries


def _read_shards(name: str, entry: str | None) -> Checkpoint:
    """The tensors that an index lists, in its order, each from the shard that it gives."""
    try:
        with open(name, encoding="utf-8") as file:
            index = json.load(file, object_pairs_hook=_without_repeats)
    except (RecursionError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError("its JSON is damaged: copy it again") from error
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError("JSON without a weight_map, so not the index of a sharded checkpoint")
    shards = {}
    for key, place in places.items():
        if not isinstance(place, str) or not place or _is_path(place):
            raise CheckpointError(
                f"refused: the index has '{shorten(key)}' in '{shorten(place)}', "
                "which is no name of a file beside it"
            )
        if place not in shards:
            with _naming(place):
                shard = os.path.join(os.path.dirname(name), place)
                shards[place] = _read_file(shard, file_kind(shard), entry)
        if key not in shards[place].tensors:
            raise CheckpointError(
                f"'{shorten(key)}' is not in '{shorten(place)}', where the index has it: "
                "copy both again"
            )
    tensors = {key: shards[place].tensors[key] for key, place in places.items()}
    first = next(iter(shards.values()))
    return replace(first, container=f"sharded {first.container}", tensors=tensors)


def _is_path(shard: str) -> bool:
    """Whether a shard's name leads out of the folder, on this system or another."""
    return shard in (".", "..") or any(
        shard != flavour(shard).name for flavour in (PurePosixPath, PureWindowsPath)
    )


# The weights in a nest of dictionaries


def _weights_in(
    contents: object,
    entry: str | None,
    container: str,
    metadata: Mapping[str, str] = MappingProxyType({}),
    room: float = math.inf,
) -> Checkpoint:
    """The weights in `contents`, under the names they have there, as at most `room` bytes."""
    weights, wrappers = _select(contents, entry)
    norms: torch_file.Norms = {}
    if isinstance(weights, torch_file.Standin):
        told = weights.state
        weights, norms = torch_file.flatten(weights)
        metadata = {**metadata, **told_by_module(told, norms)}
    elif _is_module(weights):
        weights, norms = weights.state_dict(), torch_file.norms_of(weights)
    tensors: dict[str, np.ndarray] = {}
    for key, value in weights.items() if isinstance(weights, Mapping) else ():
        if _is_tensor(value):
            if not isinstance(key, str):
                raise CheckpointError(f"a tensor is named by {shorten(repr(key))}, not by a string")
            tensors[key] = _array(value, key, room)
            room -= tensors[key].nbytes
    if not tensors:
        raise CheckpointError(f"there are no tensors in it; save the weights with {SAVE_AGAIN}")
    layout = "flax" if metadata.get("format") == "flax" else "torch"
    return Checkpoint("", container, tensors, wrappers, dict(metadata), norms, layout)


def _select(contents: object, entry: str | None) -> tuple[Any, tuple[str, ...]]:
    """The module or mapping that has the weights, and the names that lead to it."""
    holders = _holders(contents)
    node, path = contents, []
    while isinstance(node, Mapping):
        inner = _inner(node, holders)
        name = entry if entry in inner else _next(node, inner)
        if name is None:
            break
        if name == entry:
            entry = None
        node = inner[name]
        path.append(name)
        if len(path) > _MAX_WRAPPERS:
            raise CheckpointError(f"refused: its dictionaries nest more than {_MAX_WRAPPERS} deep")
    if entry is not None:
        named = _inner(contents, holders) if isinstance(contents, Mapping) else ()
        listed = shorten(", ".join(named), 300) or "none"
        raise CheckpointError(f"no entry '{shorten(entry)}' with tensors in it; entries: {listed}")
    return node, tuple(path)


def _next(node: Mapping, inner: Mapping[str, Any]) -> str | None:
    """Under which name to look on; None where `node` itself has the weights."""
    for name in _WRAPPERS:
        if name in inner:
            return name
    sizes = [math.prod(value.shape) for value in node.values() if _is_tensor(value)]
    if not inner or max(sizes, default=0) > 1:  # a lone number is a best accuracy or the like
        return None
    if len(inner) > 1:
        listed = shorten(", ".join(inner), 300)
        raise CheckpointError(f"several entries have tensors: {listed}; choose one with entry=")
    return next(iter(inner))


def _inner(node: Mapping, holders: set[int]) -> dict[str, Any]:
    """What in `node` may have weights, by name."""
    return {
        name: value
        for name, value in node.items()
        if isinstance(name, str) and id(value) in holders and not _is_training(name, value)
    }


def _holders(contents: object) -> set[int]:
    """The ids of the modules, and of the mappings from which tensors can be reached without a list.

    One walk down the dictionaries, however they share and loop, and one back up from the tensors.
    """
    parents: dict[int, list[int]] = {id(contents): []}
    nodes = [contents] if isinstance(contents, Mapping) else []
    found: list[int] = []
    for node in nodes:  # which grows meanwhile
        for name, value in node.items():
            if _is_tensor(value):
                found.append(id(node))
            elif _is_module(value):
                parents.setdefault(id(value), []).append(id(node))
                found.append(id(value))
            elif isinstance(value, Mapping) and not _is_training(name, value):
                if id(value) not in parents:
                    nodes.append(value)
                parents.setdefault(id(value), []).append(id(node))
    holders: set[int] = set()
    while found:
        node = found.pop()
        if node not in holders:
            holders.add(node)
            found += parents[node]
    return holders


def _is_training(name: object, value: object) -> bool:
    """Whether this is an optimizer's state or the like: it has tensors, but no weights."""
    if isinstance(name, str) and _TRAINING.search(name):
        return True
    return isinstance(value, Mapping) and "param_groups" in value and "state" in value


def _is_module(value: object) -> bool:
    return torch_file.is_module(value) or _is_a(value, "torch.nn", "Module")


def _is_tensor(value: object) -> bool:
    kinds = (("numpy", "ndarray"), ("torch", "Tensor"), ("jax", "Array"))
    return any(_is_a(value, module, name) for module, name in kinds)


def _is_a(value: object, module: str, name: str) -> bool:
    """isinstance, for a class of a library that may not be there, or not be loaded yet."""
    return isinstance(value, getattr(sys.modules.get(module), name, ()))


def _array(value: Any, key: str, room: float) -> np.ndarray:
    if _is_a(value, "torch", "Tensor"):
        return torch_file.to_numpy(value, key, room)
    array = np.asarray(value)
    if array.dtype.kind not in "biufcV" or array.dtype.type is np.void:  # V: ml_dtypes' types too
        raise CheckpointError(f"'{shorten(key)}' is an array of {array.dtype}, not of numbers")
    return array


# Names


def _plain(found: Checkpoint) -> Checkpoint:
    """Takes off the prefixes of DataParallel and torch.compile; files of our own have none."""
    if found.layout == "flax":
        return found
    prefix = _shared_prefix(list(found.tensors))
    steps = [f"{step}." for step in prefix.split(".")[:-1]]
    if any("_orig_mod" in key[len(prefix) :].split(".")[:-1] for key in found.tensors):
        steps.append("_orig_mod.")

    def plain(key: str) -> str:
        *modules, leaf = key.removeprefix(prefix).split(".")
        return ".".join([*(module for module in modules if module != "_orig_mod"), leaf])

    origins: dict[str, str] = {}
    for key in found.tensors:
        other = origins.setdefault(plain(key), key)
        if other != key:
            raise CheckpointError(
                f"'{shorten(other)}' and '{shorten(key)}' are the same without their prefixes: "
                "rename one of them"
            )
    return replace(
        found,
        tensors={name: found.tensors[key] for name, key in origins.items()},
        norms={plain(f"{path}.").removesuffix("."): norm for path, norm in found.norms.items()},
        stripped=(*found.stripped, *steps),
    )


def _shared_prefix(keys: list[str]) -> str:
    """The longest run of transport prefixes that every key begins with."""
    run = _TRANSPORT.match(keys[0])
    shared = os.path.commonprefix([run.group() if run else "", *keys])
    return shared[: shared.rfind(".") + 1]
