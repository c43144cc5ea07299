"""Which tensor of a source goes to which place of a model, laid out and cast as that wants it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gam_flax.convert import leaves
from gam_flax.convert.blocks import (
    CUSTOM,
    Block,
    canonical_tensors,
    decide,
    identify,
    renames,
)
from gam_flax.convert.checkpoint import Checkpoint
from gam_flax.convert.errors import CheckpointError, shorten
from gam_flax.convert.rename import Rename, aliases, renamed
from gam_flax.convert.report import ConversionReport
from gam_flax.convert.source import open_source, variant_of

ATTENTION = "attention"
"""In `keep`: every attention block. Also the name that they have in our networks."""

COUNTER = "num_batches_tracked"
"""The one leaf that either side may lack: old files have none, Flax's own BatchNorm neither."""


@dataclass(frozen=True)
class Leaf:
    """A place in a Flax model: its path, shape and dtype, and whether `leaves` calls it turned."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    turned: bool = False


@dataclass(frozen=True)
class Wanted:
    """What the user asked for, see `load_torch`."""

    variant: str | Mapping[str, str] | None
    strict: bool
    prefix: str | None
    keep: Collection[str]
    rename: Rename


def match(
    places: list[Leaf],
    source: Any,
    wanted: Wanted,
    attributes: Mapping[str, tuple[str, dict[str, Any]]] | None,
) -> tuple[dict[str, np.ndarray], ConversionReport, dict[str, dict[str, float | None]]]:
    """Values by Flax path, the report, and the norms' settings by Flax path.

    `attributes` are the model's own blocks by path, or None where the model cannot be asked.
    """
    checkpoint = open_source(source)
    blocks = identify(checkpoint)
    tensors = canonical_tensors(checkpoint, blocks)
    expected = {leaves.torch_name(place.path): place for place in places}
    where = checkpoint.path or "the source"
    report = ConversionReport(source=checkpoint.path)
    report.kept = _kept(expected, wanted.keep, attributes)
    expected = {key: place for key, place in expected.items() if not _under(key, report.kept)}
    cut = _prefix(tensors, expected, blocks, wanted.prefix, attributes, where)
    if cut:
        report.notes.append(f"{shorten(cut)} taken off the keys")
        tensors = {k[len(cut) :]: array for k, array in tensors.items() if k.startswith(cut)}
    to_ours = _our_names(tensors, expected, wanted.rename, report)
    tensors = _renamed_keys(tensors, to_ours, where)
    report.left = [key for key in tensors if _under(key, report.kept)]
    tensors = {key: array for key, array in tensors.items() if key not in set(report.left)}
    inside = {
        b.prefix[len(cut) :] if b.prefix else "": b
        for b in blocks
        if f"{b.prefix}.".startswith(cut)
    }
    inside = {to_ours(path): block for path, block in inside.items()}
    inside = {path: block for path, block in inside.items() if not _under(path, report.kept)}
    report.variants = _variants(inside, attributes, wanted.variant, where)
    values: dict[str, np.ndarray] = {}
    for key, place in expected.items():
        if key in tensors:
            _take(key, tensors[key], place, values, report)
        elif leaves.split(key)[1] != COUNTER:
            report.missing.append(key)
    report.unexpected = [
        key for key in tensors if key not in expected and leaves.split(key)[1] != COUNTER
    ]
    _note_counters(tensors, expected, report)
    if wanted.strict and not report.ok:
        raise CheckpointError(_complaint(report, where, blocks, attributes))
    norms = _norm_paths(checkpoint, blocks, cut)
    return values, report, {to_ours(path): norm for path, norm in norms.items()}


def _kept(
    expected: Mapping[str, Leaf],
    keep: Collection[str],
    attributes: Mapping[str, tuple[str, dict[str, Any]]] | None,
) -> list[str]:
    """The paths in the model that `keep` names, in the model's order."""
    if isinstance(keep, str):
        raise TypeError(f"keep wants a list of layers, such as [{keep!r}]")
    kept: dict[str, None] = {}
    for name in keep:
        paths = dict.fromkeys(
            path for key in expected for path in _parents(key) if _is_meant(path, name, attributes)
        )
        if not paths:
            what = "attention block" if name == ATTENTION else f"layer {shorten(name)!r}"
            raise CheckpointError(f"keep: the model has no {what}")
        kept.update(paths)
    return [path for path in kept if not any(path.startswith(f"{other}.") for other in kept)]


def _is_meant(
    path: str, name: str, attributes: Mapping[str, tuple[str, dict[str, Any]]] | None
) -> bool:
    if name != ATTENTION:
        return path == name
    last = path.rpartition(".")[2]
    return path in (attributes or {}) or re.fullmatch(rf"{ATTENTION}\d*", last) is not None


def _parents(key: str) -> Iterator[str]:
    """The paths of the layers that a tensor lies under, the outermost first."""
    parts = key.split(".")
    return (".".join(parts[:depth]) for depth in range(1, len(parts)))


def _under(key: str, layers: Collection[str]) -> bool:
    return any(f"{key}.".startswith(f"{layer}.") for layer in layers)


def _our_names(
    tensors: Mapping[str, Any],
    expected: Mapping[str, Leaf],
    rename: Rename,
    report: ConversionReport,
) -> Callable[[str], str]:
    """The model's path of a layer of the source, as the user says and as names circulate."""
    found, ours = (
        dict.fromkeys(leaves.split(key)[0] for key in keys)
        for keys in (tensors, [*expected, *(f"{path}.weight" for path in report.kept)])
    )
    known = aliases({renamed(path, rename): None for path in found}, ours)
    report.notes += [f"{shorten(path)} is read as {name}" for path, name in known.items()]
    return lambda path: renamed(renamed(path, rename), known)


def _renamed_keys(
    tensors: Mapping[str, np.ndarray], to_ours: Callable[[str], str], where: str
) -> dict[str, np.ndarray]:
    named: dict[str, np.ndarray] = {}
    for key, array in tensors.items():
        path, leaf = leaves.split(key)
        name = leaves.join(to_ours(path), leaf)
        if name in named:
            raise CheckpointError(f"{where}: rename gives two tensors the name {shorten(name)}")
        named[name] = array
    return named


def _take(
    key: str,
    array: np.ndarray,
    place: Leaf,
    values: dict[str, np.ndarray],
    report: ConversionReport,
) -> None:
    """Lays one tensor out as its place wants it and writes the outcome into the report."""
    if array.ndim == 4 and len(place.shape) == 2 and array.shape[2:] == (1, 1):
        array = array[:, :, 0, 0]  # a linear layer stored as a 1×1 convolution
    value = leaves.to_flax_layout(place.path, array, turned=place.turned)
    if value.shape != place.shape:
        wanted = leaves.torch_shape(place.path, place.shape, turned=place.turned)
        report.mismatched[key] = (array.shape, wanted)
        return
    if not np.isfinite(value).all():
        report.not_finite.append(key)
    if value.dtype != place.dtype:
        value = _cast(key, value, place.dtype, report)
    report.mapped[key] = place.path
    values[place.path] = value


def _cast(key: str, value: np.ndarray, dtype: np.dtype, report: ConversionReport) -> np.ndarray:
    counts = np.issubdtype(value.dtype, np.integer) and np.issubdtype(dtype, np.integer)
    if not counts:  # an int64 counter in int32 is the leaf table's business, not a cast
        report.cast[key] = (str(value.dtype), str(dtype))
    elif value.size and (value.max() > np.iinfo(dtype).max or value.min() < np.iinfo(dtype).min):
        raise CheckpointError(
            f"{report.source}: {shorten(key)} is {value.max()}, more than {dtype} holds"
        )
    with np.errstate(over="ignore", invalid="ignore"):
        return value.astype(dtype)


def _prefix(
    tensors: Mapping[str, Any],
    expected: Mapping[str, Leaf],
    blocks: list[Block],
    prefix: str | None,
    attributes: Mapping[str, tuple[str, dict[str, Any]]] | None,
    where: str,
) -> str:
    """What to take off the keys, with its dot: the user's word, or what makes most keys fit."""
    if prefix is not None:
        cut = f"{prefix.rstrip('.')}."
        if not any(key.startswith(cut) for key in tensors):
            raise CheckpointError(f"{where}: no key begins with prefix {shorten(cut)!r}")
        return cut
    if any(key in tensors for key in expected):
        return ""
    own = (attributes or {}).get("")
    if own:  # the model is a bare block
        same = [block for block in blocks if block.kind == own[0] and not block.refusal]
        if len(same) == 1:
            return leaves.join(same[0].prefix, "")
        if same:
            names = ", ".join(shorten(block.prefix) for block in same[:8])
            raise CheckpointError(
                f"{where}: it holds {len(same)} blocks of this kind ({names}); "
                "say which with prefix="
            )
    first = next(iter(tensors), "").split(".")
    for depth in range(1, len(first)):
        cut = ".".join(first[:depth]) + "."
        if not all(key.startswith(cut) for key in tensors):
            break
        if any(cut + key in tensors for key in expected):
            return cut
    return ""


def _variants(
    blocks: Mapping[str, Block],
    attributes: Mapping[str, tuple[str, dict[str, Any]]] | None,
    variant: str | Mapping[str, str] | None,
    where: str,
) -> dict[str, str]:
    """The variant of each block, and that the model was built for it.

    A block whose place in the model is the user's own class is the user's own affair.
    """
    if attributes is not None:
        blocks = {path: block for path, block in blocks.items() if path in attributes}
    chosen = decide(list(blocks.values()), variant, where)
    variants = {path: chosen[b.prefix] for path, b in blocks.items() if b.prefix in chosen}
    for path, name in variants.items():
        if attributes is None:
            continue
        kind, built = attributes[path]
        block = blocks[path]
        said = block.behaviour(name)
        if kind == block.kind and said != built:
            differing = ", ".join(
                f"{argument}={built[argument]!r} instead of {said[argument]!r}"
                for argument in said
                if built[argument] != said[argument]
            )
            raise CheckpointError(
                f"{where}: {shorten(path) or 'the block'} is {name!r}, the model was built as "
                f"{variant_of(kind, built) or CUSTOM!r}: {differing}"
            )
    return variants


def _note_counters(
    tensors: Mapping[str, Any], expected: Mapping[str, Leaf], report: ConversionReport
) -> None:
    absent = [k for k in expected if leaves.split(k)[1] == COUNTER and k not in tensors]
    surplus = [k for k in tensors if leaves.split(k)[1] == COUNTER and k not in expected]
    if absent:
        report.notes.append(f"{len(absent)} {COUNTER} are not in the source and stay as they are")
    if surplus:
        report.notes.append(f"{len(surplus)} {COUNTER} of the source have no place in the model")


def _complaint(
    report: ConversionReport,
    where: str,
    blocks: list[Block],
    attributes: Mapping[str, tuple[str, dict[str, Any]]] | None,
) -> str:
    problems = [*report.problems(), *(str(block) for block in blocks if block.refusal)]
    plain = bool(report.missing) and all(
        any(_is_meant(path, ATTENTION, attributes) for path in _parents(key))
        for key in report.missing
    )
    advice = f'; keep=["{ATTENTION}"] leaves the attention as it is' if plain else ""
    return f"{where}: does not fit the model{advice}: {'; '.join(problems)}"


def _norm_paths(
    checkpoint: Checkpoint, blocks: list[Block], cut: str
) -> dict[str, dict[str, float | None]]:
    """The norms' settings under the paths of the model."""
    names = renames(blocks)
    paths = {names.get(path, path): dict(norm) for path, norm in checkpoint.norms.items()}
    return {path[len(cut) :]: norm for path, norm in paths.items() if path.startswith(cut)}
