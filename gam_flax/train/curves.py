"""Loss and accuracy over a run, as a picture; of a detector mAP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from gam_flax.convert.files import whole_file
from gam_flax.train.metrics import read_metrics

POINTS = 200
"""The steps of training are drawn as means of so many groups at most."""


def draw_curves(metrics: Path, picture: Path, *, force: bool = False) -> None:
    """Draws metrics.jsonl: loss, the task's metric and learning rate over the epochs.

    Args:
        metrics: the file of a run.
        picture: .png to write.
        force: replace it where it exists.
    """
    from matplotlib.figure import Figure

    lines = read_metrics(metrics)
    train = [line for line in lines if line["part"] == "train"]
    test = [line for line in lines if line["part"] == "test"]
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    metric = next(iter(_measures(test)), "accuracy")
    names = ("loss", metric, "learning_rate")
    for axis, name in zip(figure.subplots(1, 3), names, strict=True):
        if train and name in train[0]:
            epochs, values = _smoothed(train, name)
            axis.plot(epochs, values, label="training", color="tab:blue")
        if test and name in test[0]:
            at = [line["epoch"] for line in test]
            values = [line[name] for line in test]
            axis.plot(at, values, label="test", color="tab:orange", marker="o", markersize=3)
            axis.legend()
        axis.set_xlabel("epoch")
        axis.set_title(name.replace("_", " "))
        axis.grid(alpha=0.3)
    with whole_file(picture, force=force) as part:
        figure.savefig(part, format="png", dpi=110)


def _measures(test: list[dict[str, Any]]) -> list[str]:
    """What was measured on the test pictures beside the loss, the task's own metric first."""
    others = ("step", "epoch", "part", "loss", "images_per_second")
    return [name for line in test[:1] for name in line if name not in others]


def _smoothed(lines: list[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    groups = np.array_split(np.arange(len(lines)), min(POINTS, len(lines)))
    return (
        [float(np.mean([lines[i]["epoch"] for i in group])) for group in groups],
        [float(np.mean([lines[i][name] for i in group])) for group in groups],
    )
