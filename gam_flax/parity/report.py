"""What a comparison found: rows in the order in which a network computes, and their verdict."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from itertools import groupby
from typing import Any

STAGES = (
    "parameters",
    "forward",
    "output",
    "single-step",
    "loss",
    "input gradient",
    "gradients",
    "running statistics",
    "optimizer state",
    "training",
    "evaluation",
)

_SHARE = 1e-6  # of the largest error of the gradients: less does not mark the place
_EXCERPT = 12  # rows that `str` shows around the first divergence
_STYLES = {"ok": "green", "noise": "dim"}
_COLUMNS = ("stage", "path", "shape", "max error", "rms error", "torch", "Flax", "verdict")


@dataclass(frozen=True)
class Row:
    """One tensor of both models.

    stage: one of `STAGES`.
    path: the layer's path or the tensor's key as torch has it, Flax's where torch has none; ""
        for the model's input and output. "#2" marks the second call, "[0]" the first of a tuple.
    shape: in Flax's layout.
    dtype: in which it was compared; of parameters and buffers the one that torch keeps.
    max_error, rms_error: of Flax against torch, divided by the tensor's scale.
    cosine: of the angle between torch's numbers and Flax's; 0 where there are none.
    torch_error, flax_error: the largest error of each against the float64 run, divided by the
        scale; in float64 torch is that run, and its error is 0.
    verdict: "ok"; "noise", rounding noise on both sides; or a divergence: "fail", "shape",
        "nan" (where the other has a number), "missing" (no partner), "raised" (Flax's forward).
    note: what the numbers do not say: both shapes, what was allowed, the exception.
    causes: why it diverges, as far as experiments tell; the likeliest first.
    """

    stage: str
    path: str
    shape: tuple[int, ...]
    dtype: str
    max_error: float
    rms_error: float
    cosine: float
    torch_error: float
    flax_error: float
    verdict: str
    note: str = ""
    causes: tuple[str, ...] = ()

    @property
    def place(self) -> tuple[str, str]:
        """Stage and path, which no other row has."""
        return self.stage, self.path

    @property
    def ratio(self) -> float:
        """Flax's error in multiples of torch's; inf where torch has none."""
        if self.flax_error == 0:
            return 0.0
        return self.flax_error / self.torch_error if self.torch_error else math.inf

    @property
    def ok(self) -> bool:
        """Whether the row counts as agreement."""
        return self.verdict in _STYLES

    def cells(self) -> tuple[str, ...]:
        """The row as text, one string for each column of the table."""
        errors = (self.max_error, self.rms_error, self.torch_error, self.flax_error)
        shape = "×".join(map(str, self.shape)) or "scalar"
        verdict = f"{self.verdict}: {self.note}" if self.note else self.verdict
        return (self.stage, self.path or "(model)", shape, *map(_number, errors), verdict)


@dataclass(frozen=True)
class Unmatched:
    """What one model has and the other has not: `side` "torch" or "flax", `kind` "layer",
    "parameter" or "buffer"."""

    side: str
    kind: str
    path: str

    def __str__(self) -> str:
        return f"{self.side} {self.kind} {self.path}"


@dataclass(frozen=True)
class ParityReport:
    """All rows of a comparison.

    rows: in the order of `STAGES`; inside "forward" as torch computed them.
    unmatched: what has no partner. A parameter without one is a divergence and has a row, too;
        layers (an activation that is a function on the other side) and buffers are listed only.
    dtype, train, multiple: as `compare` was called.
    configuration: versions, switches and modes that were met, see `configuration.Configuration`.
    notes: what a reader should know though no row tells it, a sentence each.
    """

    rows: tuple[Row, ...]
    unmatched: tuple[Unmatched, ...]
    dtype: str
    train: bool
    multiple: float
    configuration: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no row diverges."""
        return self.first_divergence is None

    @property
    def first_divergence(self) -> Row | None:
        """The row to look at, or None: the first that diverges. In the forward pass an error goes
        on to all later layers, in the single steps it does not: where these name another layer
        or what it is given, theirs. In the backward pass it goes on to all earlier layers: the
        last of the gradients, but for such as are a millionth of the others off."""
        wrong = [row for row in self.rows if not row.ok]
        if wrong and wrong[0].stage in ("input gradient", "gradients"):
            backward = [row for row in wrong if row.stage in ("input gradient", "gradients")]
            least = _SHARE * max(row.max_error for row in backward)
            return [row for row in backward if row.max_error >= least][-1]
        alone = next((row for row in wrong if row.stage == "single-step"), None)
        if alone and wrong[0].stage in ("forward", "output") and alone.path != wrong[0].path:
            return alone
        return next(iter(wrong), None)

    @property
    def headline(self) -> str:
        """The verdict in one line."""
        mode = f"{self.dtype}, {'train' if self.train else 'eval'}"
        first = self.first_divergence
        if first is None:
            return f"parity: all {len(self.rows)} rows agree ({mode})"
        failed = sum(not row.ok for row in self.rows)
        where = f"{first.stage} {first.path}".rstrip()
        return f"no parity: {failed} of {len(self.rows)} rows diverge ({mode}), first {where}"

    def to_json(self) -> str:
        """The report as one JSON object; errors that are not finite are strings ("inf", "nan")."""
        first = self.first_divergence
        content = {
            "ok": self.ok,
            "dtype": self.dtype,
            "train": self.train,
            "multiple": self.multiple,
            "first_divergence": None if first is None else self.rows.index(first),
            "causes": [] if first is None else first.causes,
            "rows": [_jsonable(asdict(row)) for row in self.rows],
            "unmatched": [asdict(item) for item in self.unmatched],
            "notes": list(self.notes),
            "configuration": dict(self.configuration),
        }
        return json.dumps(content, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> ParityReport:
        """The report that `to_json` wrote."""
        content = json.loads(text)
        return cls(
            rows=tuple(Row(**_from_jsonable(row)) for row in content["rows"]),
            unmatched=tuple(Unmatched(**item) for item in content["unmatched"]),
            dtype=content["dtype"],
            train=content["train"],
            multiple=content["multiple"],
            configuration=content["configuration"],
            notes=tuple(content["notes"]),
        )

    def to_markdown(self) -> str:
        """The headline, a table of all rows, the first divergence in bold, and what has no
        partner."""
        first = self.first_divergence
        lines = [f"{self.headline}.", "", _markdown(_COLUMNS), _markdown(["---"] * len(_COLUMNS))]
        for row in self.rows:
            cells = [cell.replace("|", "\\|") for cell in row.cells()]
            lines.append(_markdown([f"**{c}**" if row is first else c for c in cells]))
        if first and first.causes:
            lines += ["", "Likely causes:", "", *(f"- {cause}" for cause in first.causes)]
        if self.unmatched:
            lines += ["", f"Without a partner: {', '.join(map(str, self.unmatched))}."]
        lines += [line for note in self._all_notes() for line in ("", f"Note: {note}.")]
        return "\n".join(lines) + "\n"

    def plot(self, path: str | os.PathLike, *, force: bool = False) -> None:
        """Draws the errors of all layers by depth, as a .png or .svg: see `picture.draw`.

        Args:
            path: the file; one that exists is replaced with `force` only.

        Raises:
            CheckpointError: `path` has another suffix, exists, or cannot be written.
            ModuleNotFoundError: matplotlib is not installed.
        """
        from gam_flax.parity.picture import draw

        draw(self, path, force=force)

    def __str__(self) -> str:
        """The headline; then each stage in a line, or the rows around the first divergence."""
        first = self.first_divergence
        lines = [self.headline]
        if first is None:
            lines += [f"  {line}" for line in self._stages()]
        else:
            start = max(self.rows.index(first) - 3, 0)
            shown = self.rows[start : start + _EXCERPT]
            lines += _aligned([_COLUMNS, *(row.cells() for row in shown)], mark=shown.index(first))
            if len(self.rows) > len(shown):
                lines.append(f"  rows {start + 1} to {start + len(shown)} of {len(self.rows)}")
            lines += [f"  likely cause: {cause}" for cause in first.causes]
        if self.unmatched:
            lines.append(f"  without a partner: {', '.join(map(str, self.unmatched))}")
        lines += [f"  note: {note}" for note in self._all_notes()]
        return "\n".join(lines)

    def __rich__(self) -> Any:
        """A tree: each stage in a line; below it every layer of the forward pass, and elsewhere
        the rows that diverge."""
        from rich.table import Table
        from rich.text import Text
        from rich.tree import Tree

        first = self.first_divergence
        tree = Tree(Text(self.headline, style="red" if first else "green"))
        for line, (stage, group) in zip(
            self._stages(), groupby(self.rows, key=lambda row: row.stage), strict=True
        ):
            branch = tree.add(Text(line))
            grid = Table.grid(padding=(0, 2))
            for row in group:
                if stage == "forward" or not row.ok:
                    _, path, shape, error, _, torch, flax, verdict = row.cells()
                    errors = [error] if self.dtype == "float64" else [error, torch, flax]
                    style = "bold red" if row is first else _STYLES.get(row.verdict, "red")
                    grid.add_row(
                        *(Text(c, no_wrap=True) for c in (path, shape)),
                        *errors,
                        verdict,
                        style=style,
                    )
            if grid.row_count:
                branch.add(grid)
            if first is not None and first.stage == stage:
                for cause in first.causes:
                    branch.add(Text(f"likely cause: {cause}", style="bold"))
        if self.unmatched:
            tree.add(Text(f"without a partner: {', '.join(map(str, self.unmatched))}"))
        for note in self._all_notes():
            tree.add(Text(f"note: {note}"))
        return tree

    def _all_notes(self) -> tuple[str, ...]:
        return (*self.notes, *self.configuration.get("notes", ()))

    def _stages(self) -> Iterator[str]:
        for stage, group in groupby(self.rows, key=lambda row: row.stage):
            rows = list(group)
            worst = max(row.max_error for row in rows)
            noise = sum(row.verdict == "noise" for row in rows)
            tail = f", {noise} of pure rounding noise" if noise else ""
            yield f"{stage}: {len(rows)} rows, largest error {_number(worst)} of scale{tail}"


def _number(error: float) -> str:
    return "0" if error == 0 else f"{error:.1e}"


def _markdown(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


def _aligned(table: list[tuple[str, ...]], mark: int) -> list[str]:
    """The rows in columns of even width, the one at `mark` (not counting the head) pointed at."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for i, cells in enumerate(table):
        text = "  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)).rstrip()
        lines.append(f"{'>' if i == mark + 1 else ' '} {text}")
    return lines


def _jsonable(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def _from_jsonable(row: dict[str, Any]) -> dict[str, Any]:
    floats = {field.name for field in fields(Row) if field.type == "float"}
    read = {name: float(value) if name in floats else value for name, value in row.items()}
    return {**read, "shape": tuple(row["shape"]), "causes": tuple(row["causes"])}
