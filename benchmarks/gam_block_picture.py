"""The picture of gam_block.py: speed against torch, and against what the machine can do."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

FASTER, SLOWER, GREY = "#1b7837", "#b2182b", "#8c8c8c"


def draw(rows: Mapping[str, list[dict[str, Any]]], path: Path, *, said: str) -> None:
    """rows: kind of work → shapes with `name`, `speed` and, perhaps, `possible`, both ratios."""
    lines = sum(len(some) + 1.6 for some in rows.values())
    figure = Figure(figsize=(10, 0.27 * lines + 1.6), layout="constrained")
    floors = any("possible" in row for some in rows.values() for row in some)
    panels = figure.subplots(
        1, 1 + floors, sharey=True, squeeze=False, width_ratios=[3, 2][: 1 + floors]
    )[0]
    left, right = panels[0], panels[-1]
    places, names, at = [], [], 0.0
    for work, some in rows.items():
        left.text(
            0,
            at,
            f" {work[:1].upper()}{work[1:]}",
            va="center",
            ha="left",
            weight="bold",
            fontsize=9,
            clip_on=False,
        )
        at += 1
        for row in some:
            _bar(left, at, row["speed"], FASTER if row["speed"] >= 1 else SLOWER, "{:.2f}")
            if "possible" in row:
                _bar(right, at, 100 * row["possible"], GREY, "{:.0f} %")
            places.append(at)
            names.append(row["name"])
            at += 1
        at += 0.6
    left.set_yticks(places, names, fontsize=8)
    left.invert_yaxis()
    left.axvline(1, color="black", linewidth=1)
    left.set_xlabel("times as fast as the fastest of PyTorch's three (1 = as fast)")
    left.set_ylabel("batch, channels, side")
    if floors:
        right.set_xlim(0, 100)
        right.set_xlabel("of what the machine could do, %")
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.12)
    figure.suptitle(said, fontsize=10)
    figure.savefig(path, dpi=130)


def _bar(axes: Axes, at: float, length: float, color: str, shown: str) -> None:
    axes.barh(at, length, color=color, height=0.75)
    axes.annotate(
        shown.format(length),
        (length, at),
        xytext=(3, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )
