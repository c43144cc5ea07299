"""What a network costs: parameters and multiply-adds of every layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import cache
from io import StringIO
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


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


def summarize(model: nnx.Module, input_shape: Sequence[int]) -> Summary:
    """Parameters and multiply-adds of every layer, from shapes alone: nothing is computed.

        convolution, linear layer:  elements of the kernel × output positions
        transposed convolution:     elements of the kernel × input positions

    for ONE image: what the batch costs is divided by B and rounded down. Counted are the calls of
    `nnx.Conv`, `nnx.ConvTranspose`, `nnx.Linear`
    and of what inherits from them; not biases, norms, activations, pooling, products of gates,
    nor what a model computes without calling such a layer. A product with padding counts. The
    figures are of evaluation.

    Args:
        model: stays as it is; may hold shapes alone (`nnx.eval_shape`).
        input_shape: (B, H, W, C) with B ≥ 1.

    Raises:
        ValueError: an empty batch, a layer called inside a transformation of the
            model's own (jit, scan, remat, vmap), or what the model itself raises.
    """
    batch = input_shape[0]
    if batch < 1:
        raise ValueError(f"an image or more is wanted, got the input shape {tuple(input_shape)}")
    graph, state = nnx.split(model)
    rows: list[LayerSummary] = []

    def forward(state: Any, x: Any) -> None:
        twin = nnx.merge(graph, state)
        twin.eval(remat=False)  # remat is of the backward pass alone, and hides the layers in it
        calls: dict[str, _Calls] = {}
        modules = {".".join(map(str, path)): module for path, module in nnx.iter_modules(twin)}
        with _watch(modules, calls):
            twin(x)  # type: ignore[operator]
        rows.extend(_rows(modules, calls, batch))

    parameters = jax.tree.leaves(nnx.state(model, nnx.Param))
    floating = (p.dtype for p in parameters if jnp.issubdtype(p.dtype, jnp.floating))
    dtype = next(floating, jnp.float32)
    jax.eval_shape(forward, state, jax.ShapeDtypeStruct(tuple(input_shape), dtype))
    return Summary(tuple(rows))


@dataclass
class _Calls:
    count: int = 0
    output_shape: tuple[int, ...] | None = None
    multiply_adds: int = 0


_around: ContextVar[Callable[..., Any]] = ContextVar("_around")


@contextmanager
def _watch(modules: dict[str, nnx.Module], calls: dict[str, _Calls]) -> Iterator[None]:
    """Notes in `calls` what is called. The modules get other classes for good.

    `nnx.capture` leaves out layers that inherit their `__call__`, and knows outputs alone.
    """
    paths = {id(module): path for path, module in modules.items()}

    def around(module: Any, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        path = paths.get(id(module))
        if path is None:  # a transformation of its own works on copies, and may run them n times
            raise ValueError(
                f"{type(module).__name__} is called inside a transformation of the model's own "
                "(jit, scan, remat, vmap), where its calls cannot be counted"
            )
        noted = calls.setdefault(path, _Calls())
        output = call(module, *args, **kwargs)
        if noted.count == 0 and hasattr(output, "shape"):
            noted.output_shape = tuple(output.shape)
        noted.count += 1
        x = next(iter((*args, *kwargs.values())), None)
        noted.multiply_adds += _multiply_adds(module, x, output)
        return output

    for module in modules.values():
        if callable(module):
            module.__class__ = _watched(type(module))
    token = _around.set(around)
    try:
        yield
    finally:
        _around.reset(token)


@cache  # NNX registers each class with jax for good, so there is one for each, not for each call
def _watched(cls: type) -> type:
    """`cls` with a call that goes through the run it is called in."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _around.get()(self, cls.__call__, *args, **kwargs)

    return type(cls.__name__, (cls,), {"__call__": __call__, "__module__": cls.__module__})


def _multiply_adds(module: nnx.Module, x: Any, y: Any) -> int:
    """Of one call, for the whole batch."""
    if isinstance(module, nnx.ConvTranspose):
        return module.kernel.get_value().size * (x.size // module.in_features)
    if isinstance(module, nnx.Conv | nnx.Linear):
        return module.kernel.get_value().size * (y.size // module.out_features)
    return 0


def _rows(
    modules: dict[str, nnx.Module], calls: dict[str, _Calls], batch: int
) -> Iterator[LayerSummary]:
    """Those called, then those that were not and have parameters."""
    counted: set[int] = set()
    for path in {**calls, **modules}:
        module, call = modules[path], calls.get(path, _Calls())
        own = {id(p): _size(p) for p in _own_parameters(module) if id(p) not in counted}
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


def _own_parameters(module: nnx.Module) -> list[nnx.Param]:
    """Those that the module's attributes hold, also in plain lists and dicts."""
    leaves = jax.tree.leaves(vars(module), is_leaf=lambda x: isinstance(x, nnx.Module | nnx.Param))
    return [leaf for leaf in leaves if isinstance(leaf, nnx.Param)]


def _size(parameter: nnx.Param) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(parameter.get_value()))
