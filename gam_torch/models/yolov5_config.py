"""What a YOLOv5 YAML says: the layers, and the channels that flow between them. Plain data.

    anchors:                              pixels, width and height by turns, a line a level
    backbone: [[from, number, module, arguments], …]
    head:     the same, counted on; the last is Detect

`from` is the layer whose output is taken, −1 for the one before; `number` is multiplied by
`depth_multiple`, the first argument, which is the output's channels, by `width_multiple`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

YOLOV5_MULTIPLES = {
    "yolov5n": (0.33, 0.25),
    "yolov5s": (0.33, 0.50),
    "yolov5m": (0.67, 0.75),
    "yolov5l": (1.0, 1.0),
    "yolov5x": (1.33, 1.25),
}
"""Depth and width of the networks of releases 6 and 7, which are alike but for these."""

ANCHORS = (
    (10, 13, 16, 30, 33, 23),
    (30, 61, 62, 45, 59, 119),
    (116, 90, 156, 198, 373, 326),
)

BACKBONE = (
    (-1, 1, "Conv", (64, 6, 2, 2)),
    (-1, 1, "Conv", (128, 3, 2)),
    (-1, 3, "C3", (128,)),
    (-1, 1, "Conv", (256, 3, 2)),
    (-1, 6, "C3", (256,)),
    (-1, 1, "Conv", (512, 3, 2)),
    (-1, 9, "C3", (512,)),
    (-1, 1, "Conv", (1024, 3, 2)),
    (-1, 3, "C3", (1024,)),
    (-1, 1, "SPPF", (1024, 5)),
)

HEAD = (
    (-1, 1, "Conv", (512, 1, 1)),
    (-1, 1, "nn.Upsample", (None, 2, "nearest")),
    ((-1, 6), 1, "Concat", (1,)),
    (-1, 3, "C3", (512, False)),
    (-1, 1, "Conv", (256, 1, 1)),
    (-1, 1, "nn.Upsample", (None, 2, "nearest")),
    ((-1, 4), 1, "Concat", (1,)),
    (-1, 3, "C3", (256, False)),
    (-1, 1, "Conv", (256, 3, 2)),
    ((-1, 14), 1, "Concat", (1,)),
    (-1, 3, "C3", (512, False)),
    (-1, 1, "Conv", (512, 3, 2)),
    ((-1, 10), 1, "Concat", (1,)),
    (-1, 3, "C3", (1024, False)),
    ((17, 20, 23), 1, "Detect", ("nc", "anchors")),
)

ATTENTIONS = {
    **dict.fromkeys(("GAM_Attention", "GAMAttention", "GAM"), "gam"),
    "CBAM": "cbam",
    **dict.fromkeys(("SE", "SELayer", "SEAttention", "SqueezeExcitation"), "se"),
    "BAM": "bam",
}
"""What forks call a block → its name in `create_attention`."""

ARGUMENTS: dict[str, tuple[str, ...]] = {
    "Conv": ("kernel_size", "stride", "padding", "groups"),
    "Focus": ("kernel_size", "stride", "padding", "groups"),
    "Bottleneck": ("shortcut", "groups", "expansion"),
    "C3": ("shortcut", "groups", "expansion"),
    "SPP": ("kernel_sizes",),
    "SPPF": ("kernel_size",),
    "nn.Upsample": ("size", "scale", "mode"),
    "Concat": ("axis",),
    "Detect": ("num_classes", "anchors"),
}
"""Module → the names of its arguments in a YAML, after the output's channels where it has those."""

SIZES = ("kernel_size", "stride", "groups")
"""The arguments that are whole numbers above 0."""

SCALED = ("Conv", "Focus", "Bottleneck", "C3", "SPP", "SPPF")
"""The modules whose first argument is the output's channels."""


class LayerPlan(NamedTuple):
    """One layer.

    sources: the layers whose outputs it takes, −1 for the picture.
    kind: a key of `ARGUMENTS`, or an attention's name in `create_attention`.
    in_channels: of each source.
    repeats: of the bottlenecks in a C3, else of the layer itself.
    arguments: by name; those of an attention are options of `create_attention`.
    stride: pixels of the picture between two of the output's, a side.
    """

    index: int
    sources: tuple[int, ...]
    kind: str
    in_channels: tuple[int, ...]
    out_channels: int
    repeats: int
    arguments: Mapping[str, Any]
    stride: int


class Plan(NamedTuple):
    """The layers in order, and what a user should know of lines that were not followed."""

    layers: tuple[LayerPlan, ...]
    notices: tuple[str, ...]


def read_config(config: str | os.PathLike | Mapping[str, Any]) -> dict[str, Any]:
    """A YOLOv5 configuration: "nc", "depth_multiple", "width_multiple", "anchors", "backbone",
    "head".

    Args:
        config: a key of `YOLOV5_MULTIPLES`, the path of a YAML file, or what one holds.

    Raises:
        ValueError: it cannot be read, or an entry is missing or not what it should be.
    """
    where = "the configuration" if isinstance(config, Mapping) else str(config)
    found: dict[str, Any]
    if isinstance(config, Mapping):
        found = dict(config)
    elif config in YOLOV5_MULTIPLES:
        depth, width = YOLOV5_MULTIPLES[str(config)]
        found = {"depth_multiple": depth, "width_multiple": width}
        found |= {"nc": 80, "anchors": ANCHORS, "backbone": BACKBONE, "head": HEAD}
    else:
        found = _read_yaml(Path(config))
    for name, usual in (("depth_multiple", 1.0), ("width_multiple", 1.0)):
        found.setdefault(name, usual)
        _check(_is_number(found[name]) and found[name] > 0, where, name, found, "a number above 0")
    whole = isinstance(found.get("nc"), int) and found["nc"] > 0
    _check(whole, where, "nc", found, "the number of classes")
    _check(_are_anchors(found.get("anchors")), where, "anchors", found, "pairs of sizes, by level")
    for part in ("backbone", "head"):
        lines = found.get(part)
        good = _is_list(lines) and lines and all(_is_list(x) and len(x) == 4 for x in lines)
        _check(bool(good), where, part, found, "lines of [from, number, module, arguments]")
    names = ("nc", "depth_multiple", "width_multiple", "anchors", "backbone", "head")
    return {name: _plain(found[name]) for name in names}


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        known = ", ".join(YOLOV5_MULTIPLES)
        raise ValueError(
            f"{path}: cannot be read ({error}); expected a YAML file or one of {known}"
        ) from error
    except yaml.YAMLError as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{path}: not YAML: {said[:200]}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: holds no mapping, expected nc, anchors, backbone and head")
    return found


def _check(good: bool, where: str, name: str, found: Mapping[str, Any], expected: str) -> None:
    if not good:
        shown = f"is {str(found[name])[:80]!r}" if name in found else "is missing"
        raise ValueError(f"{where}: {name} {shown}, expected {expected}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and _is_number(value) and value > 0


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _are_anchors(value: Any) -> bool:
    return (
        _is_list(value)
        and len(value) > 0
        and all(_is_list(level) and len(level) >= 2 and len(level) % 2 == 0 for level in value)
        and len({len(level) for level in value}) == 1
        and all(_is_number(size) and size > 0 for level in value for size in level)
    )


def _plain(value: Any) -> Any:
    """With lists and dictionaries alone, as JSON has them."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if _is_list(value) else value


def lines_of(config: Mapping[str, Any]) -> list[Any]:
    """The lines of backbone and head, in the order of their indices."""
    return [*config["backbone"], *config["head"]]


def kind_of(line: Sequence[Any]) -> str:
    """The kind of a line as `LayerPlan` names it."""
    name = str(line[2]).rpartition(".")[2]
    return "nn.Upsample" if name == "Upsample" else ATTENTIONS.get(name, name)


def is_attention(line: Sequence[Any]) -> bool:
    """Whether the line is of an attention block."""
    return kind_of(line) in ATTENTIONS.values()


def insert_attention(
    config: Mapping[str, Any], line: str = "GAM", at: Sequence[int] | None = None
) -> dict[str, Any]:
    """The configuration with an attention block more.

    Args:
        config: what `read_config` gives.
        line: what the YAML is to call it, a key of `ATTENTIONS`.
        at: the layers before which a block is to stand, counted as in `config`; None for the
            last layer of the backbone, which is SPPF.

    Raises:
        ValueError: there is no such layer.
    """
    first_of_head = len(config["backbone"])
    count = len(lines_of(config))
    places = sorted({first_of_head - 1} if at is None else set(at))
    for place in places:
        if not 0 < place < count:
            raise ValueError(f"at {place}: must be one of the layers 1 … {count - 1}")

    def moved(index: int) -> int:
        return index + sum(place <= index for place in places)

    def source(index: int, owner: int) -> int:
        if index == -1:
            return -1
        return moved(index) if index >= 0 else moved(owner + index) - moved(owner)

    parts: dict[str, list[Any]] = {"backbone": [], "head": []}
    for i, (sources, *rest) in enumerate(lines_of(config)):
        part = parts["backbone" if i < first_of_head else "head"]
        if i in places:
            part.append([-1, 1, line, []])
        shifted = [source(j, i) for j in sources] if _is_list(sources) else source(sources, i)
        part.append([shifted, *rest])
    return {**config, **parts}


def layer_moves(plain: Mapping[str, Any], other: Mapping[str, Any]) -> dict[int, int]:
    """Index in `plain` → index in `other` of each layer, where the two differ in attention blocks
    alone.

    Raises:
        ValueError: another layer is not the same in both.
    """
    ours, theirs = (
        [(i, line) for i, line in enumerate(lines_of(some)) if not is_attention(line)]
        for some in (plain, other)
    )
    for (i, line), (j, twin) in zip(ours, theirs, strict=False):
        if kind_of(line) != kind_of(twin):
            raise ValueError(f"layer {i} is {line[2]}, where layer {j} of the other is {twin[2]}")
    if len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} layers beside attention, {len(theirs)} in the other")
    return {i: j for (i, _), (j, _) in zip(ours, theirs, strict=True)}


def plan(config: Mapping[str, Any], in_channels: int = 3) -> Plan:
    """The layers that a configuration describes.

    Raises:
        ValueError: a line is not understood; begins with the layer's index.
    """
    layers: list[LayerPlan] = []
    notices: list[str] = []
    for i, line in enumerate(lines_of(config)):
        try:
            layers.append(_layer(i, line, layers, config, in_channels, notices))
        except (ValueError, TypeError) as error:
            raise ValueError(f"layer {i}, {str(line)[:100]}: {error}") from error
    if layers[-1].kind != "Detect":
        raise ValueError(f"layer {len(layers) - 1} is {layers[-1].kind}, expected Detect as last")
    return Plan(tuple(layers), tuple(notices))


def _layer(
    index: int,
    line: Sequence[Any],
    before: Sequence[LayerPlan],
    config: Mapping[str, Any],
    in_channels: int,
    notices: list[str],
) -> LayerPlan:
    origin, number, _, written = line
    if not _is_size(number):
        raise ValueError(f"its number is {number!r}, expected 1 or more")
    if origin == []:
        raise ValueError("takes the output of no layer")
    sources = tuple(_source(j, index) for j in (origin if _is_list(origin) else [origin]))
    channels = tuple(in_channels if j < 0 else before[j].out_channels for j in sources)
    strides = [1 if j < 0 else before[j].stride for j in sources]
    kind = kind_of(line)
    if kind not in (*ARGUMENTS, *ATTENTIONS.values()):
        known = ", ".join((*ARGUMENTS, *ATTENTIONS))
        raise ValueError(f"{line[2]!r} is not a module known here: {known}")
    if len(sources) > 1 and kind not in ("Concat", "Detect"):
        raise ValueError(f"{kind} takes one input, got {len(sources)}")
    if kind != "Detect" and len(set(strides)) > 1:
        raise ValueError(f"its inputs have strides {strides}, expected the same")
    words = {"None": None, "nc": config["nc"], "anchors": config["anchors"]}
    values = [words.get(v, v) if isinstance(v, str) else v for v in _as_list(written)]
    repeats = max(round(number * config["depth_multiple"]), 1) if number > 1 else number
    out = sum(channels) if kind == "Concat" else channels[0]
    if kind in SCALED:
        if not values or not _is_size(values[0]):
            raise ValueError(f"{kind} wants the output's channels first")
        out = scaled(values.pop(0), config["width_multiple"])
    if kind in ATTENTIONS.values():
        arguments = _options(index, kind, values, channels[0], config, notices)
    else:
        arguments = _named(kind, values)
    if kind == "Detect":
        _of_detect(arguments, config["nc"], len(sources))
    stride = _stride(kind, arguments, strides[0])
    return LayerPlan(index, sources, kind, channels, out, repeats, arguments, stride)


def _as_list(written: Any) -> list[Any]:
    if not _is_list(written):
        raise ValueError(f"its arguments are {str(written)[:60]!r}, expected a list")
    return list(written)


def _source(index: Any, owner: int) -> int:
    whole = isinstance(index, int) and not isinstance(index, bool)
    found = owner + index if whole and index < 0 else index
    if not whole or not -1 <= found < owner or (found == -1 and owner):
        raise ValueError(f"takes the output of {index}, expected a layer before it")
    return found


def scaled(channels: float, width: float) -> int:
    """`channels` times `width`, rounded up to a multiple of eight."""
    return math.ceil(channels * width / 8) * 8


def _named(kind: str, values: Sequence[Any]) -> dict[str, Any]:
    names = ARGUMENTS[kind]
    if len(values) > len(names):
        raise ValueError(f"{kind} has no argument {values[len(names)]!r}")
    named = dict(zip(names, values, strict=False))
    if kind == "nn.Upsample":
        scale = named.get("scale")
        if named.get("size") is not None or named.get("mode") != "nearest" or scale != 2:
            raise ValueError(f"Upsample {list(values)}: only [None, 2, nearest] is supported")
        return {}
    if kind == "Concat":
        if named.get("axis", 1) != 1:
            raise ValueError(f"Concat of axis {named['axis']}: only channels, 1, are supported")
        return {}
    for name, value in named.items():
        if not _is_argument(name, value):
            raise ValueError(f"{kind} with {name} {value!r}")
    return named


def _is_argument(name: str, value: Any) -> bool:
    if name == "padding":
        return value is None or value == 0 or _is_size(value)
    if name == "kernel_sizes":
        return _is_list(value) and all(map(_is_size, value))
    if name == "expansion":
        return _is_number(value) and value > 0
    return _is_size(value) if name in SIZES else True


def _of_detect(named: Mapping[str, Any], classes: int, levels: int) -> None:
    if len(named) < 2:
        raise ValueError("Detect wants [nc, anchors]")
    if named["num_classes"] != classes:
        raise ValueError(f"Detect of {named['num_classes']!r} classes where nc is {classes}")
    anchors = named["anchors"]
    if not _are_anchors(anchors) or len(anchors) != levels:
        raise ValueError(f"Detect of {levels} inputs wants anchors of as many, got {anchors}")


def _options(
    index: int,
    kind: str,
    values: list[Any],
    channels: int,
    config: Mapping[str, Any],
    notices: list[str],
) -> dict[str, Any]:
    """An attention's own options: the mapping at the end of its arguments.

    Forks write the input's channels, as they are or before `width_multiple`, often twice, and
    after them numbers that mean something else in each; these are left out, with a notice.
    """
    options = dict(values.pop()) if values and isinstance(values[-1], Mapping) else {}
    width = config["width_multiple"]

    def fits(value: Any) -> bool:
        return _is_number(value) and channels in (value, scaled(value, width))

    if values and not fits(values[0]):
        raise ValueError(
            f"written for {values[0]!r} channels, but its input has {channels}; expected "
            f"{channels}, or what times {width} gives that"
        )
    ignored = values[2 if len(values) > 1 and fits(values[1]) else 1 :]
    if ignored:
        said = ", ".join(map(str, ignored))
        notices.append(
            f"layer {index}: {said} ignored; options of {kind} are a mapping at the end, such "
            "as {ratio: 4}"
        )
    return options


def _stride(kind: str, arguments: Mapping[str, Any], stride: int) -> int:
    if kind == "nn.Upsample":
        if stride % 2:
            raise ValueError("Upsample of an input as large as the picture")
        return stride // 2
    return stride * arguments.get("stride", 1) * (2 if kind == "Focus" else 1)
