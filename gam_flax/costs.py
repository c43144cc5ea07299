"""`gam-flax costs`: the paper's figures for parameters and multiply-adds beside our own count."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

from flax import nnx
from rich.console import Group
from rich.table import Table

from gam_flax.models.registry import create_model
from gam_flax.models.summary import Summary, summarize
from gam_flax.preprocess import usual_side

PAPER = "arXiv 2112.05561"


@dataclass(frozen=True)
class Cost:
    """One network and what the paper says of it.

    network: a name of `list_models()`.
    dataset: that the paper trains it on.
    stem, side, num_classes: what that makes of the network; side is of the square picture.
    attention: the block, in words.
    placed: where the blocks stand, in words.
    options: the arguments of `create_model` that make it so.
    paper_parameters: in millions, as printed; None where the paper's figure is not known to us.
    paper_multiply_adds: in units of 10⁹, as printed, or None.
    source: of the paper's figures, or None.
    """

    network: str
    dataset: str
    stem: str
    side: int
    num_classes: int
    attention: str = "none"
    placed: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    paper_parameters: str | None = None
    paper_multiply_adds: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class Counted:
    """A row of the table: ours beside the paper's.

    parameters_agree, multiply_adds_agree: whether ours, rounded to the digits that the paper
        gives, is what it prints; None where it gives none.
    """

    cost: Cost
    parameters: int
    multiply_adds: int

    @property
    def parameters_agree(self) -> bool | None:
        return _agrees(self.parameters / 1e6, self.cost.paper_parameters)

    @property
    def multiply_adds_agree(self) -> bool | None:
        return _agrees(self.multiply_adds / 1e9, self.cost.paper_multiply_adds)


def _cifar(attention: str, parameters: str, multiply_adds: str | None = None, **rest: Any) -> Cost:
    return Cost(
        "resnet50",
        "CIFAR-100",
        "cifar",
        32,
        100,
        attention,
        paper_parameters=parameters,
        paper_multiply_adds=multiply_adds,
        source=PAPER,
        **rest,
    )


def _imagenet(network: str, attention: str = "none", **rest: Any) -> Cost:
    return Cost(network, "ImageNet-1K", "imagenet", 224, 1000, attention, **rest)


_EVERY = "every block"

COSTS: tuple[Cost, ...] = (
    _cifar("none", "23.71", "1.30"),
    _cifar("SE", "26.22", placed=_EVERY, options={"attention": "se"}),
    _cifar(
        "BAM",
        "24.06",
        placed="after stages 1–3",
        options={"attention": "bam", "attention_at": (1, 2, 3)},
    ),
    _cifar("CBAM", "26.24", placed=_EVERY, options={"attention": "cbam"}),
    _cifar("GAM r=16", "149.47", "8.02", placed=_EVERY, options={"attention": "gam"}),
    _imagenet("resnet18"),
    _imagenet(
        "resnet18",
        "GAM r=16",
        placed=_EVERY,
        options={"attention": "gam"},
        paper_parameters="16.04",
        paper_multiply_adds="2.45",
        source=PAPER,
    ),
    _imagenet("resnet50"),
    _imagenet("resnet50_gam_grouped", "GAM r=16", placed=_EVERY),
)
"""The networks of the paper's tables, and the ones to compare them with."""


def count_network(name: str, *, side: int | None = None, **options: Any) -> Summary:
    """The summary of a network for one square picture, no weight of which is ever made.

    Args:
        name: one of `list_models()`.
        side: of the picture in pixels; None for `usual_side`.
        **options: what `create_model` takes.

    Raises:
        ValueError: what `create_model` raises.
    """
    model = nnx.eval_shape(lambda: create_model(name, rngs=nnx.Rngs(0), **options))
    side = side or usual_side(model)
    return summarize(model, (1, side, side, 3))


def count(cost: Cost) -> Counted:
    """Counts one row of the table, see `summarize` for what is counted."""
    options = {"stem": cost.stem, "num_classes": cost.num_classes, **cost.options}
    summary = count_network(cost.network, side=cost.side, **options)
    return Counted(cost, summary.parameters, summary.multiply_adds)


def to_json(rows: Sequence[Counted]) -> str:
    """The rows as one JSON object."""
    counted = [
        {
            **asdict(row.cost),
            "parameters": row.parameters,
            "multiply_adds": row.multiply_adds,
            "parameters_agree": row.parameters_agree,
            "multiply_adds_agree": row.multiply_adds_agree,
        }
        for row in rows
    ]
    return json.dumps({"rows": counted})


def to_tables(rows: Sequence[Counted]) -> Group:
    """A table for each data set; figures of the paper that ours does not round to are marked ≠."""
    groups = groupby(rows, key=lambda row: (row.cost.dataset, row.cost.side))
    tables = [_table(f"{dataset}, {side}×{side}", list(group)) for (dataset, side), group in groups]
    return Group(*tables, "Blocks stand in every block of the network if not said otherwise.", _KEY)


_KEY = "Multiply-adds: of convolutions and linear layers, one picture. ≠ not the paper's digits."


def _table(title: str, rows: Sequence[Counted]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in ("network", "attention"):
        table.add_column(name, no_wrap=True)
    for name in ("M params", "paper", "G mult-adds", "paper"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cost = row.cost
        table.add_row(
            cost.network,
            cost.attention if cost.placed in ("", _EVERY) else f"{cost.attention} {cost.placed}",
            f"{row.parameters / 1e6:.3f}",
            _printed(cost.paper_parameters, row.parameters_agree),
            f"{row.multiply_adds / 1e9:.3f}",
            _printed(cost.paper_multiply_adds, row.multiply_adds_agree),
        )
    return table


def _agrees(ours: float, printed: str | None) -> bool | None:
    if printed is None:
        return None
    digits = len(printed.partition(".")[2])
    return f"{ours:.{digits}f}" == printed


def _printed(figure: str | None, agrees: bool | None) -> str:
    return "" if figure is None else figure if agrees else f"≠ {figure}"
