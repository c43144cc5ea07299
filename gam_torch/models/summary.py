"""What a network costs: parameters and multiply-adds of every layer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerSummary:
    """One layer, without the layers that it holds.

    path: dotted, "" for the whole model; a layer that stands at several places has the first.
    kind: the name of its class.
    calls: how often one forward pass calls it; 0 where its parameters are used without a call.
    output_shape: of its first call, in the framework's layout; None where that is not one array.
    parameters: that it holds itself; one that several layers share is the first one's.
    multiply_adds: of all its calls, for one image.
    """

    path: str
    kind: str
    calls: int
    output_shape: tuple[int, ...] | None
    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class Summary:
    """All layers of a model, in the order of their first call, then those never called.

    Printed, a layer that holds others has the sums of all that is in it.
    """

    rows: tuple[LayerSummary, ...]

    @property
    def parameters(self) -> int:
        """Of the whole model, each once; running statistics and other buffers are none."""
        return sum(row.parameters for row in self.rows)

    @property
    def multiply_adds(self) -> int:
        """Of the whole model, for one image."""
        return sum(row.multiply_adds for row in self.rows)

    def to_json(self) -> str:
        """The totals and the rows as one JSON object."""
        totals = {"parameters": self.parameters, "multiply_adds": self.multiply_adds}
        return json.dumps({**totals, "rows": [asdict(row) for row in self.rows]})

    def __str__(self) -> str:
        """The table as plain text."""
        from rich.console import Console

        text = StringIO()
        Console(file=text, width=120, color_system=None).print(self)
        return text.getvalue().strip("\n")

    def __rich__(self) -> Any:
        """A table: layers indented under the layer that holds them, the totals at the end."""
        from rich.box import SIMPLE
        from rich.table import Table
        from rich.text import Text

        def about(row: LayerSummary | None) -> tuple[str, str]:
            if row is None:  # a list of layers, say, which is never called
                return "", ""
            calls = f" ×{row.calls}" if row.calls > 1 else ""
            return row.kind + calls, "×".join(map(str, row.output_shape or ()))

        table = Table(box=SIMPLE, show_footer=True, padding=(0, 1, 0, 0), pad_edge=False)
        whole = next((row for row in self.rows if not row.path), None)
        for name, total in zip(("layer", "kind", "output"), ("total", *about(whole)), strict=True):
            table.add_column(name, total, no_wrap=True)
        for name in ("parameters", "multiply-adds"):
            total = getattr(self, name.replace("-", "_"))
            table.add_column(name, f"{total:,}", justify="right", no_wrap=True)
        for path, row, parameters, multiply_adds, held in self._tree():
            indent, name = "  " * path.count("."), path.rpartition(".")[2]
            sums = (f"{n:,}" if n else "" for n in (parameters, multiply_adds))
            style = "bold" if held else None
            table.add_row(Text(indent + name), *about(row), *sums, style=style)
        return table

    def _tree(self) -> Iterator[tuple[str, LayerSummary | None, int, int, bool]]:
        """Every path below the model, parents first: its own row, if it has one; the sums of all
        in it; whether it holds others."""
        own = {row.path: row for row in self.rows if row.path}
        below: dict[str, dict[str, None]] = {}
        sums: dict[str, list[int]] = {}
        for path, row in own.items():
            while path:
                parent = path.rpartition(".")[0]
                below.setdefault(parent, {})[path] = None
                total = sums.setdefault(path, [0, 0])
                total[0] += row.parameters
                total[1] += row.multiply_adds
                path = parent
        waiting = list(below.get("", ()))[::-1]
        while waiting:
            path = waiting.pop()
            yield path, own.get(path), sums[path][0], sums[path][1], path in below
            waiting += list(below.get(path, ()))[::-1]


def summarize(model: nn.Module, input_shape: Sequence[int]) -> Summary:
    """Parameters and multiply-adds of every layer, from shapes alone: nothing is computed.

        convolution, linear layer:  elements of the kernel × output positions
        transposed convolution:     elements of the kernel × input positions

    for ONE image: what the batch costs is divided by B and rounded down. Counted are the calls of
    `nn.Conv1d`, `2d`, `3d`, `nn.ConvTranspose1d`, `2d`, `3d`, `nn.Linear`
    and of what inherits from them; not biases, norms, activations, pooling, products of gates,
    nor what a model computes without calling such a layer. A product with padding counts. The
    figures are of evaluation.

    Args:
        model: stays as it is; may hold shapes alone (the meta device).
        input_shape: (B, C, H, W) with B ≥ 1.

    Raises:
        ValueError: an empty batch, or what the model itself raises.
    """
    batch = input_shape[0]
    if batch < 1:
        raise ValueError(f"an image or more is wanted, got the input shape {tuple(input_shape)}")
    twin = _without_values(model).eval()
    calls: dict[str, _Calls] = {}
    modules = dict(twin.named_modules())
    for path, module in modules.items():
        module.register_forward_pre_hook(partial(_begin, calls, path))
        module.register_forward_hook(partial(_end, calls, path), with_kwargs=True)
    floating = (p.dtype for p in twin.parameters() if p.is_floating_point())
    # inside, what the model itself makes has no values either
    with torch.no_grad(), torch.device("meta"):
        twin(torch.empty(tuple(input_shape), dtype=next(floating, torch.get_default_dtype())))
    return Summary(tuple(_rows(modules, calls, batch)))


@dataclass
class _Calls:
    count: int = 0
    output_shape: tuple[int, ...] | None = None
    multiply_adds: int = 0


def _without_values(model: nn.Module) -> nn.Module:
    """A copy on the meta device; the tensors themselves are never copied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        shape = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(shape, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return deepcopy(model, memo)


def _begin(calls: dict[str, _Calls], path: str, module: nn.Module, args: Any) -> None:
    calls.setdefault(path, _Calls())


def _end(
    calls: dict[str, _Calls], path: str, module: nn.Module, args: Any, kwargs: Any, output: Any
) -> None:
    call = calls[path]
    if call.count == 0 and isinstance(output, Tensor):
        call.output_shape = tuple(output.shape)
    call.count += 1
    call.multiply_adds += _multiply_adds(
        module, next(iter((*args, *kwargs.values())), None), output
    )


def _multiply_adds(module: nn.Module, x: Any, y: Any) -> int:
    """Of one call, for the whole batch."""
    if isinstance(module, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return module.weight.numel() * (x.numel() // module.in_channels)
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return module.weight.numel() * (y.numel() // module.out_channels)
    if isinstance(module, nn.Linear):
        return module.weight.numel() * (y.numel() // module.out_features)
    return 0


def _rows(
    modules: dict[str, nn.Module], calls: dict[str, _Calls], batch: int
) -> Iterator[LayerSummary]:
    """Those called, then those that were not and have parameters."""
    counted: set[int] = set()
    for path in {**calls, **modules}:
        module, call = modules[path], calls.get(path, _Calls())
        own = {id(p): p.numel() for p in module.parameters(recurse=False) if id(p) not in counted}
        counted |= own.keys()
        if own or path in calls:
            yield LayerSummary(
                path,
                type(module).__name__,
                call.count,
                call.output_shape,
                sum(own.values()),
                call.multiply_adds // batch,
            )
