"""The figure of one photograph: a row for each attention block."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gam_flax.maps.gates import AttentionMap
from gam_flax.maps.photograph import Photograph

ROW = 2.3
"""Height of a row, in inches."""

NARROWEST = 0.2
"""The scale of the gates spans at least this, so that noise does not look like contrast."""

OPACITY = 0.6
"""Of a map over the photograph."""

PALE = (0.4, 0.9)
"""Grey values between which the photograph under a map lies: black would swallow its colours."""

BLUE, GREY = "#0072B2", "#6E6E6E"

FORMULAS = {
    "GAM": "GAM: y = x · channel gate · spatial gate",
    "CBAM": "CBAM: y = x · channel gate · spatial gate",
    "SE": "SE: y = x · channel gate",
    "BAM": "BAM: y = x · (1 + gate), one gate, shown by channel and by place",
}


def over_photograph(name: str) -> ListedColormap:
    """matplotlib's colours of that name as they look over the photograph's mean grey."""
    colours = colormaps[name](np.linspace(0, 1, 256))[:, :3]
    return ListedColormap(OPACITY * colours + (1 - OPACITY) * np.mean(PALE))


GATES, ACTIVATIONS = "viridis", "magma"


def draw(seen: Photograph) -> Figure:
    """The figure, as `draw_attention_maps` tells of it."""
    rows = len(seen.maps)
    figure = Figure(figsize=(11, ROW * (rows + 1.5)), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[1.0, rows + 0.4])
    top, bottom = parts
    _draw_prediction(top, seen)
    kinds = dict.fromkeys(attention.kind for attention in seen.maps)
    bottom.suptitle(";  ".join(FORMULAS[kind] for kind in kinds), fontsize=10)
    axes = bottom.subplots(rows, 4, squeeze=False, width_ratios=[1.35, 1, 1.15, 1.15])
    scale = _gate_scale(seen.maps)
    for line, attention in zip(axes, seen.maps, strict=True):
        _draw_channel_gate(line[0], attention)
        _draw_spatial_gate(line[1], attention, seen.pixels, scale)
        _draw_activations(bottom, line[2:], attention, seen.pixels)
    if scale is not None:
        colours = ScalarMappable(scale, over_photograph(GATES))
        label = "mean over the channels\n0 closed, 1 open"
        bar = bottom.colorbar(colours, ax=axes[:, 1], location="bottom", pad=0.01, aspect=12)
        bar.set_label(label, fontsize=8)
        bar.ax.tick_params(labelsize=8)
    return figure


def _draw_prediction(figure: Any, seen: Photograph) -> None:
    photograph, bars = figure.subplots(1, 2, width_ratios=[1, 2.2])
    _show(photograph, seen.pixels)
    photograph.set_title(f"what the network saw, {_size(seen.pixels)} pixels", fontsize=10)
    likeliest = seen.likeliest(5)
    if not likeliest:
        bars.axis("off")
        return
    names, probabilities = zip(*likeliest, strict=True)
    drawn = bars.barh(range(len(names)), probabilities, color=BLUE)
    bars.bar_label(drawn, [_percent(p) for p in probabilities], padding=3, fontsize=9)
    bars.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=9)
    bars.invert_yaxis()
    bars.set_xlim(0, 1.12)
    bars.set_xticks([0, 0.5, 1], ["0", "50%", "100%"], fontsize=8)
    bars.set_title(f"prediction: {_short(names[0])}", fontsize=12)
    bars.spines[["top", "right"]].set_visible(False)


def _draw_channel_gate(axis: Any, attention: AttentionMap) -> None:
    """One value a channel, ascending; a band where it differs between pixels."""
    gate = attention.channel[0].reshape(-1, attention.channel.shape[-1])
    order = np.argsort(gate.mean(0))
    middle = gate.mean(0)[order]
    at = np.arange(1, len(middle) + 1)
    axis.plot(at, middle, color=BLUE, linewidth=1.5, label="mean over the image")
    if len(gate) > 1:
        low, high = np.quantile(gate, [0.1, 0.9], axis=0)[:, order]
        axis.fill_between(at, low, high, color=BLUE, alpha=0.25, linewidth=0, label="80% of pixels")
    if middle.min() < 0 or middle.max() > 1:  # no sigmoid: it multiplies by any number
        axis.axhline(1, color=GREY, linewidth=0.8, linestyle="--", label="1: unchanged")
    else:
        axis.set_ylim(0, 1)
    if len(axis.get_legend_handles_labels()[0]) > 1:
        axis.legend(fontsize=7, loc="upper left")
    axis.set_xlim(1, max(2, len(middle)))
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set_xlabel(f"{len(middle)} channels, in ascending order", fontsize=8)
    axis.set_ylabel("gate", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    what = "gate by channel" if attention.joint else "channel gate"
    axis.set_title(f"{attention.path or 'the block'}\n{attention.kind} {what}", fontsize=9)


def _draw_spatial_gate(
    axis: Any, attention: AttentionMap, pixels: np.ndarray, scale: Normalize | None
) -> None:
    if attention.spatial is None or scale is None:
        axis.axis("off")
        axis.text(
            0.5, 0.5, f"{attention.kind} has no\nspatial gate", ha="center", va="center", color=GREY
        )
        return
    gate = _over_channels(attention)
    _show(axis, pixels, pale=True)
    axis.imshow(gate, norm=scale, cmap=GATES, alpha=OPACITY, extent=(0, 1, 1, 0))
    what = "gate by place" if attention.joint else "spatial gate"
    axis.set_title(f"{what}, {_size(gate)}\n{gate.min():.2f} to {gate.max():.2f}", fontsize=9)


def _draw_activations(figure: Any, axes: Any, attention: AttentionMap, pixels: np.ndarray) -> None:
    """Each on its own scale, from 0: a gate may make them a hundred times weaker or stronger."""
    before, after = (_strength(x) for x in (attention.before, attention.after))
    change = f" (×{after.mean() / before.mean():.2g})" if before.any() else ""
    for axis, strength, title in (
        (axes[0], before, "activations before"),
        (axes[1], after, "activations after"),
    ):
        scale = Normalize(0, strength.max() or 1)
        _show(axis, pixels, pale=True)
        axis.imshow(strength, norm=scale, cmap=ACTIVATIONS, alpha=OPACITY, extent=(0, 1, 1, 0))
        mean = f"mean {strength.mean():.2g}{change if strength is after else ''}"
        axis.set_title(f"{title}\n{mean}", fontsize=9)
        colours = ScalarMappable(scale, over_photograph(ACTIVATIONS))
        bar = figure.colorbar(colours, ax=axis, aspect=12, shrink=0.95)
        bar.set_label("RMS over channels", fontsize=7)
        bar.ax.tick_params(labelsize=7)


def _gate_scale(maps: list[AttentionMap]) -> Normalize | None:
    """One for all spatial gates of the figure; None where there are none."""
    gates = [_over_channels(attention) for attention in maps if attention.spatial is not None]
    if not gates:
        return None
    low, high = min(g.min() for g in gates), max(g.max() for g in gates)
    width = max(high - low, NARROWEST)
    low = min(max((low + high - width) / 2, 0.0), 1 - width)
    return Normalize(low, low + width)


def _over_channels(attention: AttentionMap) -> np.ndarray:
    assert attention.spatial is not None
    return attention.spatial[0].mean(-1)


def _strength(x: np.ndarray) -> np.ndarray:
    """Root mean square over the channels, of the first image."""
    return np.sqrt(np.square(x[0].astype(np.float64)).mean(-1))


def _show(axis: Any, pixels: np.ndarray, *, pale: bool = False) -> None:
    if pale:
        low, high = PALE
        pixels = (low + (high - low) * pixels.mean(-1) / 255)[..., None] * 255
    shown = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    axis.imshow(shown, cmap="gray", vmin=0, vmax=255, extent=(0, 1, 1, 0))
    axis.set_xticks([])
    axis.set_yticks([])


def _size(array: np.ndarray) -> str:
    return f"{array.shape[0]}×{array.shape[1]}"


def _percent(probability: float) -> str:
    return "<0.1%" if probability < 0.001 else f"{probability:.1%}"


def _short(name: str) -> str:
    name = f"class {name}" if name.isdigit() else name
    return name if len(name) <= 40 else f"{name[:37]}…"
