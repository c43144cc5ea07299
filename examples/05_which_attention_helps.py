"""Which attention helps, and by how much? One network, one budget, several seeds, six answers.

    python examples/05_which_attention_helps.py                  a taste, which proves nothing:
                                                 few pictures, and a network of two stages
    python examples/05_which_attention_helps.py --budget hour --seeds 4     docs/attention.md has it
    python examples/05_which_attention_helps.py --budget full --seeds 5     hours; all the pictures

ResNet-8 with nothing, SE, CBAM, BAM, or GAM in every block, GAM with a sigmoid on its channel gate
as in the paper and without one as in most code; all with ratio 4, the same pictures in the same
order, the same steps. A seed draws the weights and the order; differences from "none" are taken
seed by seed. Stopped, it goes on where it was, and runs that are finished are kept: more --seeds
add to what there is.

It leaves comparison.md and comparison.png in --out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any, NamedTuple

import jax
from fashion import few_pictures
from flax import nnx
from matplotlib.figure import Figure
from rich.console import Console

from gam_flax.convert import load
from gam_flax.convert.files import whole_file
from gam_flax.train import Settings, fit, read_metrics

ATTENTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "SE": {"attention": "se"},
    "CBAM": {"attention": "cbam"},
    "BAM": {"attention": "bam"},
    "GAM, paper": {"attention": "gam", "channel_gate": "sigmoid"},
    "GAM, code": {"attention": "gam", "channel_gate": "identity"},
}
"""Name → the block, and its options beside the ratio."""


class Budget(NamedTuple):
    """pictures: to train on and to test on, of Fashion-MNIST; None for all.
    network: arguments of ResNet-8."""

    pictures: tuple[int, int] | None
    epochs: int
    batch_size: int
    network: dict[str, Any] = {}


BUDGETS = {
    "taste": Budget((2000, 1000), 2, 25, {"layers": [1, 1], "widths": [16, 32]}),
    "hour": Budget((5_000, 5_000), 4, 64),
    "full": Budget(None, 12, 128),
}

RATIO = {"ratio": 4}

Runs = dict[str, list[dict[str, float]]]
"""Attention → a run for each seed: parameters, accuracy, images_per_second."""


def one_run(settings: Settings, folder: Path) -> dict[str, float] | None:
    """What the run came to; None where it was stopped."""
    summary = folder / "summary.json"
    if summary.exists():
        return json.loads(summary.read_text())
    result = fit(settings, folder)
    if result.accuracy is None:
        return None
    parameters = nnx.state(load(folder / "last.safetensors"), nnx.Param)
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["part"] == "test"]
    found = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(parameters)),
        "accuracy": result.accuracy,
        "images_per_second": median(line["images_per_second"] for line in lines),
    }
    with whole_file(summary, force=True) as part:
        part.write_text(json.dumps(found))
    return found


def spread(values: list[float]) -> str:
    """Mean ± sample deviation, in percent."""
    deviation = f"{100 * stdev(values):.2f}" if len(values) > 1 else "?"
    return f"{100 * mean(values):.2f} ± {deviation}"


def table(runs: Runs) -> str:
    """Markdown: parameters, accuracy, difference from none, speed."""
    plain = [run["accuracy"] for run in runs["none"]]
    lines = [
        "| attention | parameters | accuracy, % | more than none, points | images/s |",
        "|-----------|-----------:|------------:|-----------------------:|---------:|",
    ]
    for name, some in runs.items():
        accuracies = [run["accuracy"] for run in some]
        more = [a - b for a, b in zip(accuracies, plain, strict=True)]
        speed = max(run["images_per_second"] for run in some)
        lines.append(
            f"| {name} | {some[0]['parameters']:,} | {spread(accuracies)} | "
            f"{'–' if name == 'none' else spread(more)} | {speed:,.0f} |"
        )
    note = (
        f"Mean ± deviation of {len(plain)} seeds; the accuracy is that at the end of training, "
        "the speed that of the fastest."
    )
    return "\n".join([*lines, "", note, ""])


def picture(runs: Runs) -> Figure:
    """A point a run, a bar for the mean."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axis: Any = figure.subplots()
    for place, some in enumerate(runs.values()):
        accuracies = [100 * run["accuracy"] for run in some]
        axis.plot(accuracies, [place] * len(some), "o", color="#0072B2", alpha=0.6)
        axis.plot([mean(accuracies)] * 2, [place - 0.3, place + 0.3], color="#D55E00", lw=2)
    labels = [f"{name}\n{some[0]['parameters']:,} parameters" for name, some in runs.items()]
    axis.set_yticks(range(len(runs)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("test accuracy at the end, %; a point is a seed, the line their mean")
    axis.grid(axis="x", alpha=0.3)
    return figure


def settings_of(name: str, seed: int, budget: Budget, data: dict[str, Any]) -> Settings:
    """A run: all are alike but for the attention and the seed."""
    attention = {**ATTENTIONS[name]}
    block = attention.pop("attention", None)
    return Settings(
        **data,
        model="resnet8",
        attention=block,
        model_options={**budget.network, "attention_options": attention | RATIO if block else {}},
        epochs=budget.epochs,
        batch_size=budget.batch_size,
        warmup=budget.epochs / 8,
        seed=seed,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare attention blocks at equal budgets.")
    parser.add_argument("--budget", choices=list(BUDGETS), default="taste")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"))
    options = parser.parse_args()

    out, budget = options.out / options.budget, BUDGETS[options.budget]
    data: dict[str, Any] = {"data": "fashion-mnist"}
    if budget.pictures is not None:
        data = {"data": "arrays", "data_dir": str(few_pictures(out, *budget.pictures))}
    # Seeds differ in numbers alone: what is compiled for one serves all.
    jax.config.update("jax_compilation_cache_dir", str((out / "compiled").absolute()))

    console, runs = Console(), {name: [] for name in ATTENTIONS}
    planned = [(seed, name) for seed in range(options.seeds) for name in ATTENTIONS]
    for number, (seed, name) in enumerate(planned, 1):
        console.rule(f"run {number} of {len(planned)}: {name}, seed {seed}")
        settings = settings_of(name, seed, budget, data)
        found = one_run(settings, out / f"{name.replace(', ', '-')}-{seed}")
        if found is None:
            return
        runs[name].append(found)

    with whole_file(out / "comparison.md", force=True) as part:
        part.write_text(table(runs), encoding="utf-8")
    with whole_file(out / "comparison.png", force=True) as part:
        picture(runs).savefig(part, format="png", dpi=110)
    print(table(runs))
    print(f"written: {out / 'comparison.md'}, {out / 'comparison.png'}")


if __name__ == "__main__":
    main()
