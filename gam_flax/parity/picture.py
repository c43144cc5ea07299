"""A report as one picture: the error of every layer by depth, stage under stage."""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import ml_dtypes

from gam_flax.convert.errors import CheckpointError, shorten
from gam_flax.convert.files import check_free, whole_file
from gam_flax.parity.judge import FLOAT64_UNIT
from gam_flax.parity.report import ParityReport, Row

# Grey, blue and a red that stays apart from both for every eye (after Okabe and Ito).
_TORCH, _FLAX, _WRONG = "#6E6E6E", "#0072B2", "#D55E00"
_INPUT, _OUTPUT, _LOSS = "input", "output", "loss"  # the ends of the horizontal axis
_MODEL = "(model)"
_LONG = 26  # characters of a label
_LOWEST = 1e-20  # what is less is drawn as 0
_DENSE = 100  # points in a curve from which on it has no markers

_PANELS = (
    (("parameters",), "weights before the run"),
    (("forward", "output", "loss"), "forward pass: what each layer returns →"),
    (("single-step",), "each layer by itself, given what torch's was given →"),
    (("gradients", "input gradient"), "gradients, computed from right to left ←"),
    (("running statistics",), "running statistics after the pass"),
    (("optimizer state",), "the optimizer's state"),
    (("training",), "after training"),
    (("evaluation",), "evaluation after training"),
)
_UNDER_THE_RULE = {"forward", "output", "loss", "single-step", "input gradient", "gradients"}
_UNDER_THE_RULE |= {"running statistics", "optimizer state", "training", "evaluation"}
"""Stages whose limit is the one that `judge.Judge` documents."""


def draw(report: ParityReport, path: str | os.PathLike, *, force: bool = False) -> None:
    """Draws the errors of a report by depth, a panel a stage.

    From left to right the layers, in the order in which torch computes them; upwards the largest
    error of what belongs to a layer, relative to the scale of its tensor. In float64 that is the
    difference between Flax and torch, in the narrower types the error of each against the float64
    run. Where nothing differs at all the point lies on a line of its own at the bottom, what
    cannot be measured (missing, another shape, NaN) on one at the top.

    Args:
        path: a .png or .svg.
        force: replace a file that exists.

    Raises:
        CheckpointError: another suffix, or `path` exists, or it cannot be written.
    """
    check_picture(path, force=force)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    kind = Path(path).suffix[1:].lower()
    order = _order(report.rows)
    depth = _Depth(order, _common(order))
    panels = list(_panels(report, depth))
    scale = _Scale.of(report, panels)
    width = min(max(3 + 0.14 * len(order), 8), 20)
    with rc_context({"svg.hashsalt": "parity"}), whole_file(path, force=force) as part:
        size = (width, 1.9 * max(len(panels), 1) + 2.2)
        figure = Figure(figsize=size, layout="constrained")
        column = figure.subplots(max(len(panels), 1), squeeze=False)[:, 0]
        for i, (axis, panel) in enumerate(zip(column, panels, strict=False)):
            _curves(axis, report, panel, scale)
            _heights(axis, scale)
            _head(axis, report, panel, width)
            _mark_first(axis, report, panel, scale)
            followed = i + 1 < len(panels) and panels[i + 1].depth is panel.depth
            _names(axis, report, panel.depth, width, shown=not followed)
        if not panels:
            column[0].set_axis_off()
        _legend(figure, column, width)
        below = f" (0: less than {_LOWEST:.0e})" if scale.has_zero else ""
        figure.supylabel(f"largest error, relative to the tensor's scale{below}", fontsize=9)
        title = textwrap.fill(report.headline, int(width * 13))
        figure.suptitle(title, fontsize=11, x=0.01, ha="left", parse_math=False)
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(part, format=kind, dpi=110, metadata=metadata)


def check_picture(path: str | os.PathLike, *, force: bool) -> None:
    """Raises CheckpointError where `path` is no .png or .svg, or exists and may not be replaced,
    and ModuleNotFoundError where matplotlib is not installed: before the work, not after it."""
    import_module("matplotlib")
    if Path(path).suffix.lower() not in (".png", ".svg"):
        raise CheckpointError(f"{shorten(path)}: a picture is written as .png or .svg")
    check_free(path, force=force)


# The horizontal axis


@dataclass(frozen=True)
class _Depth:
    """The layers from left to right; `root` is what all paths begin with, left out in labels."""

    places: list[str]
    root: str = ""
    about: str = "in the order in which torch computes them"

    def at(self, row: Row) -> int | None:
        """The place of a row, None where it has none."""
        return next((self._index[n] for n in _names_of(row) if n in self._index), None)

    @cached_property
    def _index(self) -> dict[str, int]:
        """Also without the marks of call and part: a weight belongs to the first call."""
        exact = {place: x for x, place in enumerate(self.places)}
        plain = {_layer(place): x for x, place in reversed([*enumerate(self.places)])}
        return plain | exact

    def label(self, place: str) -> str:
        """A path as it is written under the axis: the block's number, and the end."""
        path = place.removeprefix(self.root) or "(model)"
        if len(path) <= _LONG:
            return path
        parts = path.split(".")
        kept = 1 + max((i for i, part in enumerate(parts[:-1]) if part.isdigit()), default=-1)
        head = ".".join(parts[:kept])
        tail = parts.pop()
        while len(parts) > kept and len(head) + len(parts[-1]) + len(tail) < _LONG:
            tail = f"{parts.pop()}.{tail}"
        return shorten(head + "…" + tail if len(parts) > kept else path, _LONG + 8)


@dataclass(frozen=True)
class _Panel:
    title: str
    rows: list[Row]
    depth: _Depth


def _panels(report: ParityReport, depth: _Depth) -> Iterator[_Panel]:
    """Those along the layers, and then what has no place there, one after the other."""
    rest = []
    for stages, title in _PANELS:
        rows = [row for row in report.rows if row.stage in stages]
        if stages == ("parameters",) and all(row.ok for row in rows):
            continue  # there is nothing to measure in what is equal
        placed = [row for row in rows if depth.at(row) is not None]
        if placed:
            yield _Panel(title, placed, depth)
        if others := [row for row in rows if depth.at(row) is None]:
            own = _Depth([row.path for row in others], about="")
            rest.append(_Panel(f"{stages[0]}, one after the other →", others, own))
    yield from rest


def _names_of(row: Row) -> Iterator[str]:
    """The names under which a row may have a place, the narrowest first."""
    ends = {"input gradient": _INPUT, "loss": _LOSS, "output": _OUTPUT}
    if row.stage in ends:
        yield ends[row.stage]
        return
    path = row.path.removesuffix(" (input)")
    yield path if _layer(path) else _OUTPUT
    yield _layer(path)
    if row.stage not in ("forward", "single-step"):
        while path := path.rpartition(".")[0]:
            yield path
    if row.stage in ("parameters", "gradients", "running statistics"):
        yield _MODEL


def _layer(place: str) -> str:
    """Without the marks of the call and of the part."""
    return re.sub(r"(#\d+)?(\[[^]]*\])*$", "", place)


def _order(rows: Sequence[Row]) -> list[str]:
    """All places in the order of computing: that of the forward pass, and of the tensors for
    layers that return nothing themselves."""
    order = [row.path for row in rows if row.stage == "forward"]
    ends = {next(_names_of(row)) for row in rows} & {_INPUT, _OUTPUT, _LOSS}
    for stage in ("single-step", "parameters", "gradients"):
        at = 0
        for row in rows:
            if row.stage != stage or not _layer(row.path):
                continue
            of_layer = row.path.removesuffix(" (input)")
            place = of_layer if stage == "single-step" else row.path.rpartition(".")[0] or _MODEL
            known = {_layer(name): x for x, name in reversed([*enumerate(order)])}
            known |= {name: x for x, name in enumerate(order)}
            if place not in known:
                order.insert(at, place)
            at = 1 + known.get(place, at)
    order = [_INPUT] * (_INPUT in ends) + order
    return order + [end for end in (_OUTPUT, _LOSS) if end in ends]


def _common(places: Sequence[str]) -> str:
    """What the paths of all layers begin with."""
    ends = (_INPUT, _OUTPUT, _LOSS, _MODEL)
    parents = [place.split(".")[:-1] for place in places if place not in ends]
    shared = os.path.commonprefix(parents) if len(parents) > 1 else []
    return "".join(f"{part}." for part in shared)


# Heights


@dataclass(frozen=True)
class _Scale:
    """The vertical axis, the same in all panels: `zero` is where 0 is drawn, `top` what has no
    number; `low` and `high` are the powers of ten between them."""

    low: int
    high: int
    has_zero: bool
    has_top: bool
    exact: bool
    unit: float

    @classmethod
    def of(cls, report: ParityReport, panels: Sequence[_Panel]) -> _Scale:
        exact = report.dtype == "float64"
        unit = FLOAT64_UNIT if exact else float(ml_dtypes.finfo(report.dtype).eps)
        shown = [row for panel in panels for row in panel.rows]
        drawn = [error for row in shown for error in _errors(row, exact)]
        measured = [e for e in drawn if _LOWEST < e < math.inf]
        return cls(
            low=math.floor(math.log10(min([unit / 10, *measured]))),
            high=math.ceil(math.log10(max([unit * 10, *measured]))),
            has_zero=any(e <= _LOWEST for e in drawn),
            has_top=any(not e < math.inf for e in drawn),
            exact=exact,
            unit=unit,
        )

    @property
    def zero(self) -> float:
        return 10.0 ** (self.low - self._step)

    @property
    def top(self) -> float:
        return 10.0 ** (self.high + self._step)

    @property
    def _step(self) -> float:
        return max((self.high - self.low) / 8, 1)

    @property
    def limits(self) -> tuple[float, float]:
        """The ends of the axis."""
        edge = 10 ** (self._step / 2)
        low = self.zero if self.has_zero else 10.0**self.low
        high = self.top if self.has_top else 10.0**self.high
        return low / edge, high * edge

    def y(self, error: float) -> float:
        """Where an error is drawn."""
        return self.curve(error) if error < math.inf else self.top

    def curve(self, error: float) -> float:
        """The same in a curve, which has a gap where there is no number."""
        if not error < math.inf:
            return math.nan
        return error if error > _LOWEST else self.zero


def _errors(row: Row, exact: bool) -> tuple[float, ...]:
    if row.verdict == "nan":
        return (math.inf,)
    return (row.max_error,) if exact else (row.torch_error, row.flax_error)


# Drawing


def _curves(axis: Any, report: ParityReport, panel: _Panel, scale: _Scale) -> None:
    """The worst tensor of each layer as a curve, each tensor that diverges as a diamond."""

    def height(row: Row) -> float:
        return _errors(row, scale.exact)[-1]

    def points(rows: Iterable[Row]) -> list[tuple[int, float]]:
        return [(panel.depth.at(row) or 0, scale.y(height(row))) for row in rows]

    loud = [row for row in panel.rows if row.verdict != "noise"]
    loud.sort(key=lambda row: height(row) if height(row) < math.inf else -1)
    worst = {panel.depth.at(row) or 0: row for row in loud}
    xs = sorted(worst)
    ms = 0 if len(xs) > _DENSE else 3.5
    torch = [worst[x].torch_error for x in xs]
    if not scale.exact:
        ys = [scale.curve(error) for error in torch]
        axis.plot(xs, ys, color=_TORCH, marker="s", ms=ms, lw=1.2, label="error of torch")
    ys = [scale.curve(height(worst[x])) for x in xs]
    name = "difference between Flax and torch" if scale.exact else "error of Flax"
    axis.plot(xs, ys, color=_FLAX, marker="o", ms=ms, lw=1.4, label=name)
    if panel.rows[0].stage in _UNDER_THE_RULE:
        dashed = {"color": "black", "lw": 0.9, "ls": (0, (4, 3))}
        if scale.exact:
            axis.axhline(scale.unit, **dashed, label=f"allowed: {scale.unit:.0e}")
        else:
            label = f"allowed: {report.multiple:g} × torch's error + eps"
            ys = [report.multiple * error + scale.unit for error in torch]
            axis.plot(xs, ys, **dashed, marker="_" if len(xs) == 1 else "", ms=9, label=label)
    if quiet := points(row for row in panel.rows if row.verdict == "noise"):
        hollow = {"ls": "", "marker": "o", "ms": 4, "mfc": "white", "mec": _FLAX}
        axis.plot(*zip(*quiet, strict=True), **hollow, label="rounding noise on both sides, agrees")
    if wrong := points(row for row in panel.rows if not row.ok):
        diamond = {"ls": "", "marker": "D", "ms": 4.5, "color": _WRONG}
        axis.plot(*zip(*wrong, strict=True), **diamond, label="diverges")
    axis.set_yscale("log")


def _heights(axis: Any, scale: _Scale) -> None:
    """The ticks of the vertical axis, with lines of their own for 0 and for what has no number."""
    stride = max(1, math.ceil((scale.high - scale.low) / 6))
    ticks = [(10.0**p, f"1e{p}") for p in range(scale.low, scale.high + 1, stride)]
    for y, text, drawn in (
        (scale.zero, "0", scale.has_zero),
        (scale.top, "no number", scale.has_top),
    ):
        if drawn:
            ticks.append((y, text))
            axis.axhline(y, color="black", lw=0.5, alpha=0.4)
    axis.set_yticks([y for y, _ in ticks], [text for _, text in ticks], fontsize=7)
    axis.set_yticks([], minor=True)
    axis.grid(axis="y", lw=0.3)
    axis.set_axisbelow(True)
    axis.set_ylim(*scale.limits)


def _head(axis: Any, report: ParityReport, panel: _Panel, width: float) -> None:
    """The title; over the panel of the first divergence also what it is."""
    lines = []
    first = report.first_divergence
    if first in panel.rows:
        said = f"first divergence: {first.path or '(model)'}, {first.verdict}"
        said += f" ({first.note})" if first.note else ""
        causes = "; ".join(getattr(first, "causes", ()))
        said += f". Cause: {causes}" if causes else ""
        lines = textwrap.wrap(said, int((width - 1) * 15), max_lines=3, placeholder=" …")
    axis.set_title(panel.title, loc="left", fontsize=9, pad=5 + 11 * len(lines))
    axis.annotate(
        "\n".join(lines),
        xy=(0, 1),
        xytext=(0, 4),
        xycoords="axes fraction",
        textcoords="offset points",
        color=_WRONG,
        fontsize=8,
        weight="bold",
        va="bottom",
        parse_math=False,
    )


def _mark_first(axis: Any, report: ParityReport, panel: _Panel, scale: _Scale) -> None:
    """A ring around the first divergence, and a line through all panels where it lies."""
    first = report.first_divergence
    x = first and panel.depth.at(first)
    if first is None or x is None:
        return
    axis.axvline(x, color=_WRONG, lw=0.9, alpha=0.6, zorder=0.9)
    if first in panel.rows:
        y = scale.y(_errors(first, scale.exact)[-1])
        axis.plot([x], [y], ls="", marker="o", ms=12, mfc="none", mec=_WRONG, mew=1.8)


def _names(axis: Any, report: ParityReport, depth: _Depth, width: float, *, shown: bool) -> None:
    """The names of as many layers as can be read, the first divergence's among them."""
    last = len(depth.places) - 1
    first = report.first_divergence and depth.at(report.first_divergence)
    stride = math.ceil((last + 1) / (width * 5.5))
    wanted = {x for x in (first, last) if x is not None}
    regular = (x for x in range(0, last, stride) if all(abs(x - w) >= stride for w in wanted))
    ticks = sorted({*regular, *wanted})
    axis.set_xlim(-0.7, last + 0.7)
    axis.set_xticks(range(last + 1), minor=True)
    axis.tick_params(axis="x", which="minor", length=2)
    axis.set_xticks(ticks, [""] * len(ticks))
    if not shown:
        return
    labels = [depth.label(depth.places[x]) for x in ticks]
    axis.set_xticks(ticks, labels, rotation=90, fontsize=7, parse_math=False)
    for x, text in zip(ticks, axis.get_xticklabels(), strict=True):
        if x == first:
            text.set(color=_WRONG, weight="bold")
    if depth.about:
        layers = f"layers of {depth.root[:-1]}" if depth.root else "layers"
        axis.set_xlabel(f"{layers}, {depth.about}", fontsize=9, parse_math=False)


def _legend(figure: Any, axes: Iterable[Any], width: float) -> None:
    """Each kind of line once, for all panels together, below them."""
    lines = {}
    for axis in axes:
        for line, label in zip(*axis.get_legend_handles_labels(), strict=True):
            lines.setdefault(label, line)
    if lines:
        figure.legend(
            lines.values(),
            lines.keys(),
            loc="outside lower center",
            ncols=3 if width < 11 else len(lines),
            fontsize=8,
            frameon=False,
        )
