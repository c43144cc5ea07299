"""Which attention blocks a checkpoint holds, and what its weights cannot tell."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from gam_flax.convert import leaves
from gam_flax.convert.checkpoint import Checkpoint
from gam_flax.convert.errors import CheckpointError, shorten
from gam_flax.convert.layouts import LAYOUTS, UNSEEN, VARIANTS, Layout, Mismatch, behaviour
from gam_flax.convert.source import open_source, told_by_metadata, variant_of

CUSTOM = "custom"
"""What a block is called whose source says of it what no named variant is."""

FAMILIES = {
    "reference": "A",
    "gated": "B",
    "grouped": "C0",
    "replicate": "D",
    "shuffled": "F",
}
"""The letters of GAM's families, as `docs/families.md` has them; C0 with groups is C."""


@dataclass(frozen=True)
class Block:
    """An attention block found in a checkpoint.

    prefix: the path of the block; "" where the whole file is the block.
    kind: "gam", "cbam", "se" or "bam".
    layout: how it is stored, see `layouts`.
    variants: what the weights could mean; one name where that is settled.
    options: the constructor's arguments that the weights show, channels first.
    layers: path of each layer in the file → its canonical path.
    unseen: the arguments that no weight shows, where the source itself says them, as live modules
        of ours and files that this package wrote do.
    refusal: for something that has the names of a block and is none: what it is instead, or
        what does not fit. Such a block is not converted.
    """

    prefix: str
    kind: str
    layout: str
    variants: tuple[str, ...]
    options: Mapping[str, Any]
    layers: Mapping[str, str]
    unseen: Mapping[str, Any] | None = None
    refusal: str | None = None

    @property
    def channels(self) -> int:
        return self.options["channels"]

    @property
    def ratio(self) -> float:
        return self.options["ratio"]

    @property
    def groups(self) -> int:
        return self.options.get("groups", 1)

    @property
    def kernel_size(self) -> int | None:
        return self.options.get("kernel_size")

    @property
    def families(self) -> tuple[str, ...]:
        """The letters of the GAM families it could be; the variants' names for other blocks."""
        if self.kind != "gam":
            return self.variants
        letters = {**FAMILIES, "grouped": "C"} if self.groups > 1 else FAMILIES
        return tuple(letters.get(variant, variant) for variant in self.variants)

    @property
    def ambiguous(self) -> bool:
        return len(self.variants) > 1

    def arguments(self, variant: str) -> dict[str, Any]:
        """The constructor's arguments for this block, read as `variant`."""
        return {**self.options, **self.behaviour(variant)}

    def behaviour(self, variant: str) -> Mapping[str, Any]:
        """The arguments that no weight shows: the source's word, else the variant's."""
        return behaviour(self.kind, variant) if self.unseen is None else self.unseen

    def __str__(self) -> str:
        name = shorten(self.prefix) or "(the whole file)"
        if self.refusal:
            return f"{name}: not a {self.kind.upper()} this package knows: {self.refusal}"
        numbers = ", ".join(f"{key} {value}" for key, value in self.options.items())
        names = " or ".join(
            variant if family == variant else f"{variant} ({family})"
            for variant, family in zip(self.variants, self.families, strict=True)
        )
        return f"{name}: {self.kind.upper()}, layout {self.layout}, {names}; {numbers}"


def identify(source: Any) -> list[Block]:
    """Every GAM, CBAM, SE and BAM in `source`, at any depth, in the order of the file.

    Args:
        source: a path, a state_dict, a `Checkpoint` or a torch module.

    Returns:
        Blocks. `block.variants` has more than one name where the weights cannot decide (GAM's
        families A, B, C0 and F have the same weights); `block.refusal` says why a look-alike
        is none. A variant written into the file by this package counts as decided.

    Raises:
        CheckpointError: the file cannot be read, or a block is there in two layouts at once.
    """
    checkpoint = open_source(source)
    shapes = {key: array.shape for key, array in checkpoint.tensors.items()}
    paths = {leaves.split(key)[0]: None for key in shapes}
    told = told_by_metadata(checkpoint)
    blocks: list[Block] = []
    claimed: set[str] = set()

    def take(candidates: Iterator[tuple[Layout, str]]) -> None:
        for layout, prefix in candidates:
            layers = {leaves.join(prefix, old): new for old, new in layout.layers.items()}
            if not claimed.isdisjoint(layers):
                _check_not_twice(blocks, prefix, layout, layers, checkpoint)
                continue
            try:
                options = layout.describe(_canonical_shapes(layers, shapes))
            except Mismatch as mismatch:
                if not layout.distinctive:
                    continue
                block = _refused(prefix, layout.kind, layout.name, layers, str(mismatch))
            else:
                options.update(_norm_settings(checkpoint, layers))
                unseen = told.get(prefix)
                if unseen is None or unseen.keys() != UNSEEN[layout.kind].keys():
                    variants, unseen = _possible(layout, options), None
                else:
                    variants = (variant_of(layout.kind, unseen) or CUSTOM,)
                block = Block(prefix, layout.kind, layout.name, variants, options, layers, unseen)
            blocks.append(block)
            claimed.update(layers)

    take(_candidates(paths, lambda layout: layout.kind != "se"))
    for block in _look_alikes(paths, shapes, claimed):
        blocks.append(block)
        claimed.update(block.layers)
    take(_candidates(paths, lambda layout: layout.kind == "se"))  # fc1 and fc2 are in many things
    order = {path: i for i, path in enumerate(paths)}
    return sorted(blocks, key=lambda b: min(order[path] for path in b.layers if path in order))


@lru_cache
def _anchor(layout: int) -> re.Pattern[str]:
    first = next(iter(LAYOUTS[layout].layers))
    return re.compile(rf"(?:(.*)\.)?{re.escape(first)}", re.DOTALL)


def _candidates(
    paths: Mapping[str, Any], wanted: Callable[[Layout], bool]
) -> Iterator[tuple[Layout, str]]:
    """Layouts whose layers are all there, the ones with most layers first."""
    ranked = sorted(range(len(LAYOUTS)), key=lambda i: -len(LAYOUTS[i].layers))
    for number in filter(lambda i: wanted(LAYOUTS[i]), ranked):
        layout = LAYOUTS[number]
        required = [old for old, new in layout.layers.items() if new != OPTIONAL_LAYER[layout.kind]]
        for path in paths:
            found = _anchor(number).fullmatch(path)
            if found is None:
                continue
            prefix = found[1] or ""
            if all(leaves.join(prefix, layer) in paths for layer in required):
                yield layout, prefix


OPTIONAL_LAYER = {"gam": None, "cbam": "spatial_attention.norm", "se": None, "bam": None}


def _canonical_shapes(
    layers: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    canonical = {
        f"{new}.{leaf}": shapes[f"{old}.{leaf}"]
        for old, new in layers.items()
        for leaf in ("weight", "bias")
        if f"{old}.{leaf}" in shapes
    }
    for new in layers.values():
        if f"{new}.weight" not in canonical and not new.endswith(".norm"):
            raise Mismatch(f"{new} has no weight")
    return canonical


def _refused(prefix: str, kind: str, layout: str, layers: Mapping[str, str], why: str) -> Block:
    return Block(prefix, kind, layout, (), {}, layers, refusal=why)


def _possible(layout: Layout, options: Mapping[str, Any]) -> tuple[str, ...]:
    """The variants left, given the shapes."""
    variants = layout.variants
    if layout.kind == "gam" and options["groups"] > 1 and layout.name != "canonical":
        variants = ("grouped",)
    if layout.kind == "gam" and options["channels"] % 4:
        variants = tuple(v for v in variants if behaviour("gam", v)["shuffle"] is None)
    return variants


def _norm_settings(checkpoint: Checkpoint, layers: Mapping[str, str]) -> dict[str, Any]:
    """eps and momentum of the block's norms, where the file has them and they agree."""
    found = [checkpoint.norms[old] for old in layers if old in checkpoint.norms]
    settings: dict[str, Any] = {}
    for name in ("eps", "momentum"):
        values = {norm.get(name) for norm in found}
        if found and len(values) == 1:
            settings[f"norm_{name}"] = values.pop()
    return settings


def _check_not_twice(
    blocks: list[Block],
    prefix: str,
    layout: Layout,
    layers: Mapping[str, str],
    checkpoint: Checkpoint,
) -> None:
    """A block stored in two layouts at once: both would get the same canonical names."""
    for block in blocks:
        same = block.prefix == prefix and block.kind == layout.kind
        if same and not block.refusal and len(set(layers) - set(block.layers)) > 0:
            both = next(old for old in layers if old not in block.layers)
            raise CheckpointError(
                f"{checkpoint.path or 'the state_dict'}: {shorten(both)} and the layout "
                f"{block.layout} of {shorten(prefix) or 'the file'} would get the same names; "
                "take one of them out"
            )


def _look_alikes(
    paths: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], claimed: set[str]
) -> Iterator[Block]:
    """What has the names of a GAM and no known layout, with what it is as far as one can tell."""
    owners: dict[str, dict[str, str]] = {}
    pattern = re.compile(
        r"(?:(.*)\.)?(?:(channel_attention|channels_attnetion|cam)|(spatial_attention|sam))"
        r"\.[^.]+(?:\..*)?",
        re.DOTALL,
    )
    halves: dict[str, set[str]] = {}
    for path in paths:
        found = pattern.fullmatch(path)
        if found is None or path in claimed:
            continue
        prefix = found[1] or ""
        owners.setdefault(prefix, {})[path] = path
        halves.setdefault(prefix, set()).add("channel" if found[2] else "spatial")
    for prefix, layers in owners.items():
        if halves[prefix] == {"channel", "spatial"}:
            reason = _what_it_is(prefix, layers, shapes)
            yield _refused(prefix, "gam", "unknown", layers, reason)


def _what_it_is(
    prefix: str, layers: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> str:
    def shape(layer: str) -> tuple[int, ...]:
        return shapes.get(leaves.join(prefix, f"{layer}.weight"), ())

    if len(shape("channel_attention.fc")) == 4 and shape("spatial_attention.cv1")[1:2] == (2,):
        return "it is ultralytics' CBAM: one 1×1 convolution of the average, no perceptron"
    spatial = [
        shapes.get(f"{layer}.weight", ())
        for layer in layers
        if re.search(r"(^|\.)(spatial_attention|sam)\.", layer)
    ]
    if any(len(s) == 4 and s[1] == 2 for s in spatial):
        return "its spatial convolution sees two maps: a CBAM in a layout that is not known here"
    if len(shape("spatial_attention.0")) == 4 and len(shape("spatial_attention.1")) == 4:
        return "it is a GAM without BatchNorm, which is not supported"
    if any(len(s) in (3, 5) for s in spatial):
        return "its convolutions are 1-D or 3-D; only 2-D ones are supported"
    if any(re.search(r"(^|\.)(cam|sam)\.", layer) for layer in layers):
        return "it computes both gates from its input, side by side, which is not supported"
    return "its layers are " + ", ".join(shorten(layer, 40) for layer in list(layers)[:4])


def renames(blocks: list[Block]) -> dict[str, str]:
    """Path of each layer of the blocks in the file → its canonical path."""
    return {
        old: leaves.join(block.prefix, new)
        for block in blocks
        if not block.refusal
        for old, new in block.layers.items()
    }


def canonical_tensors(checkpoint: Checkpoint, blocks: list[Block]) -> dict[str, np.ndarray]:
    """The tensors of `checkpoint` with the layers of `blocks` under their canonical names.

    Raises:
        CheckpointError: two keys get the same name.
    """
    names = renames(blocks)
    tensors: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}
    for key, array in checkpoint.tensors.items():
        path, leaf = leaves.split(key)
        name = leaves.join(names.get(path, path), leaf)
        if name in tensors:
            raise CheckpointError(
                f"{checkpoint.path or 'the state_dict'}: {shorten(origin[name])} and "
                f"{shorten(key)} both become {shorten(name)}; take one of them out"
            )
        tensors[name] = array
        origin[name] = key
    return tensors


def alone(checkpoint: Checkpoint, block: Block, variant: str) -> Checkpoint:
    """One block of a checkpoint as if the file held nothing else, under canonical names."""
    cut = leaves.join(block.prefix, "")
    tensors = canonical_tensors(checkpoint, [block])
    return replace(
        checkpoint,
        tensors={k[len(cut) :]: array for k, array in tensors.items() if k.startswith(cut)},
        metadata={"behaviour": json.dumps({"": dict(block.behaviour(variant))})},
        norms={},
    )


def decide(
    blocks: list[Block], variant: str | Mapping[str, str] | None, where: str
) -> dict[str, str]:
    """The variant of each block that is not refused: prefix → name.

    Args:
        variant: the user's word: one name for all blocks that know it, or kind → name.

    Raises:
        CheckpointError: a block is ambiguous and no word was given, or the word contradicts
            what the weights show.
    """
    chosen: dict[str, str] = {}
    for block in blocks:
        if block.refusal:
            continue
        word = variant.get(block.kind) if isinstance(variant, Mapping) else variant
        if word is not None and word not in VARIANTS[block.kind]:
            if isinstance(variant, Mapping) or not any(word in v for v in VARIANTS.values()):
                raise CheckpointError(
                    f"{where}: variant {shorten(word)!r} is none of {block.kind.upper()}'s: "
                    f"{', '.join(VARIANTS[block.kind])}"
                )
            word = None
        chosen[block.prefix] = _decide_one(block, word, where)
    return chosen


def _decide_one(block: Block, word: str | None, where: str) -> str:
    name = shorten(block.prefix) or "the block"
    if word is None:
        if block.ambiguous:
            raise CheckpointError(
                f"{where}: {name} could be {' or '.join(block.variants)}: their weights look the "
                f"same and compute different functions; say which with variant= "
                "(--variant), or let `gam-flax verify` decide from a saved input and output"
            )
        return block.variants[0]
    wanted = behaviour(block.kind, word)
    if all(block.behaviour(v) != wanted for v in block.variants):
        raise CheckpointError(
            f"{where}: {name} is {' or '.join(block.variants)} (layout {block.layout}, groups "
            f"{block.groups}), not {word!r}"
        )
    return word
