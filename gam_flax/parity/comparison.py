"""Two models, one input: where do they part?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from gam_flax.convert.rename import Rename
from gam_flax.parity import judge
from gam_flax.parity.align import Names, lay_parameter, layer_layout
from gam_flax.parity.report import ParityReport, Row, Unmatched
from gam_flax.parity.trace import Trace, wide

_NEIGHBOURS = 7  # runs beside the given one, over which a narrow dtype's errors are collected

# Stages whose tensors are of one kind: one of them is noise beside the largest of its group.
_GROUPS = {
    "forward": "values",
    "output": "values",
    "input gradient": "gradients",
    "gradients": "gradients",
    "running statistics": "statistics",
}


def compare(
    torch_model: Any,
    flax_model: Any,
    inputs: Shaped[np.ndarray, "B ..."],
    *,
    train: bool = False,
    gradients: bool = True,
    dtype: str = "float64",
    rename: Rename = None,
    multiple: float = 4.0,
) -> ParityReport:
    """Runs a torch model and a Flax model on the same input and compares all that they compute.

    Stage by stage: parameters and buffers, which are to be equal; the output of every call of
    every layer, each model running freely; the model's output; the gradients of
    Σ output · cotangent (fixed numbers between -1 and 1) with respect to the input and to every
    parameter; in training, the running statistics after the pass.

    A row agrees when Flax is as near to torch's float64 run as can be asked:

        |Flax − oracle| ≤ multiple · max|torch − oracle| + unit · scale

    where scale is the tensor's largest magnitude, unit is 1e-12 in float64 (torch is the oracle
    then, so that the first term is 0) and the dtype's eps in float32 and bfloat16. In float64 the
    scale of every gradient is the largest gradient's, as the rounding errors of terms that cancel
    are of their size. A tensor that is rounding noise on both sides, as the gradient of a bias
    before a BatchNorm in training, has verdict "noise" and agrees: torch's float64 value is below
    unit · largest, Flax's below unit · largest in float64 and below √unit · largest otherwise,
    `largest` being the largest of all values or of all gradients. There is no other tolerance. In
    float32 and bfloat16 both errors are the largest over eight runs, seven of them with input and
    weights a few units off, so that a tensor of few numbers is not judged by luck.

    Layers and parameters are paired by path, leaves by the table of `gam_flax.convert.leaves`.
    What has no partner is listed in `unmatched`; only a parameter without one is a divergence.
    Arrays of four axes and more are channels last in Flax and channels first in torch; where
    torch itself holds them channels last, around a Linear, the shape tells. For layers and
    parameters axes of length one do not count, for the output they do.

    Both models are run on copies, torch's on the CPU, with their train or eval flags set and
    everything floating cast to `dtype` (Flax's statistics to float32 or wider); the models, jax's
    x64 switch, torch's default dtype and random state are as before afterwards.

    Args:
        torch_model: a `torch.nn.Module`.
        flax_model: an `nnx.Module` or a pair (linen module, variables). A Linen module hears of
            `train` by an argument or field of one of the usual names (train, deterministic, …).
        inputs: (B, H, W, C), (B, features), … as Flax takes it, of any dtype.
        train: compare in training mode.
        gradients: whether to differentiate.
        dtype: "float64", "float32" or "bfloat16".
        rename: torch's path of a layer → Flax's, a mapping (which also holds for what lies under
            a path, and may name single tensors by their keys) or a function.
        multiple: how many times torch's own error Flax may be off.

    Raises:
        TypeError: models of other kinds.
        ValueError: an unknown dtype; a torch forward that draws random numbers (Dropout in
            training), which two frameworks cannot draw alike.
        Exception: whatever the torch forward raises; and the Flax forward, unless a row
            diverges before it, which is then the news: the last row has verdict "raised".
    """
    import torch

    from gam_flax.parity import flax_side, torch_side

    if dtype not in judge.DTYPES:
        raise ValueError(f"dtype must be one of {list(judge.DTYPES)}, got {dtype!r}")
    if not isinstance(torch_model, torch.nn.Module):
        raise TypeError(f"torch_model must be a torch.nn.Module, got {type(torch_model).__name__}")
    pure = flax_side.pure(flax_model, dtype=dtype, train=train)
    program = flax_side.Program(pure, dtype=dtype, gradients=gradients)
    found = _Comparison(Names(rename), judge.Judge(dtype, multiple))
    found.weights(torch_side.weights(torch_model), (pure.parameters, pure.statistics))
    options = {"rounded_to": dtype, "train": train, "gradients": gradients}
    for x, factors in _samples(np.asarray(inputs), found.partners, dtype):
        oracle = torch_side.run(torch_model, x, factors, dtype="float64", **options)
        own = oracle
        if dtype != "float64":
            own = torch_side.run(torch_model, x, factors, dtype=dtype, **options)
        flax = program(x, {found.partners[key]: factor for key, factor in factors.items()})
        found.forward(own, flax, oracle)
        if flax.error is not None:
            found.raised(flax.error)
            break
        if gradients and _same_outputs(flax, oracle):
            found.gradients(own, flax, oracle)
        if train:
            found.statistics(own, flax, oracle)
    return ParityReport(found.rows(), tuple(found.unmatched), dtype, train, multiple)


def assert_parity(
    torch_model: Any, flax_model: Any, inputs: Shaped[np.ndarray, "B ..."], **options: Any
) -> ParityReport:
    """`compare`, and an AssertionError that shows the first divergence where there is one.

    Args: as `compare`.

    Raises:
        AssertionError: the models are not the same.
        Exception: as `compare`.
    """
    report = compare(torch_model, flax_model, inputs, **options)
    if not report.ok:
        raise AssertionError(str(report))
    return report


def _samples(
    x: np.ndarray, keys: Iterable[str], dtype: str
) -> Iterator[tuple[np.ndarray, dict[str, float]]]:
    """The input and no factors; in a narrow dtype also neighbours, with factors for the tensors.

    A tensor of few numbers may be right by luck, and its error then is no measure of what the
    dtype can do. A neighbour has input and weights a few units off, which deals all roundings
    anew and changes nothing else.
    """
    floating = x.dtype.kind in "fV"  # numpy files bfloat16 under V
    kept = np.dtype(np.float64) if dtype == "float64" else ml_dtypes.finfo(dtype).dtype
    step = 8 * float(ml_dtypes.finfo(kept).eps)
    rng = np.random.default_rng(0)
    yield x.astype(kept).astype(np.float64) if floating else x, {}
    for _ in range(0 if dtype == "float64" else _NEIGHBOURS):
        factors = {key: float(1 + step * rng.uniform(-1, 1)) for key in keys}
        near = x.astype(np.float64) * (1 + step * rng.uniform(-1, 1, x.shape)) if floating else x
        yield near.astype(kept).astype(np.float64) if floating else x, factors


def _same_outputs(flax: Trace, oracle: Trace) -> bool:
    """Whether the losses are the same function of the outputs."""
    shapes = {part: y.shape for part, y in oracle.outputs.items()}
    return shapes == {part: y.shape for part, y in flax.outputs.items()}


class _Comparison:
    """Gathers what is found, stage by stage; the runs on several inputs count as one."""

    def __init__(self, names: Names, ruler: judge.Judge):
        self.unmatched: list[Unmatched] = []
        self.partners: dict[str, str] = {}  # torch key → Flax path of a parameter or buffer
        self._names = names
        self._judge = ruler
        self._found: dict[tuple[str, str], Row | tuple[tuple[int, ...], judge.Gauge]] = {}

    def rows(self) -> tuple[Row, ...]:
        """What was found, judged."""
        largest: dict[str, float] = {}
        for (stage, _), found in self._found.items():
            if not isinstance(found, Row):
                group = _GROUPS[stage]
                largest[group] = max(largest.get(group, 0.0), found[1].oracle)
        return tuple(
            found
            if isinstance(found, Row)
            else self._judge.row(stage, path, *found, largest[_GROUPS[stage]])
            for (stage, path), found in self._found.items()
        )

    def weights(self, torch: tuple[Mapping, Mapping], flax: tuple[Mapping, Mapping]) -> None:
        """Parameters, which must have a partner, then buffers."""
        for kind, tensors, partners in zip(("parameter", "buffer"), torch, flax, strict=True):
            for key, tensor in tensors.items():
                name = self._names.leaf(key, partners)
                if name is None:
                    self._lonely("torch", kind, key, tensor.shape)
                else:
                    self.partners[key] = name
                    self._weight(key, name, tensor, np.asarray(partners[name]))
            taken = set(self.partners.values())
            for name, partner in partners.items():
                if name not in taken:
                    self._lonely("flax", kind, name, tuple(partner.shape))

    def forward(self, own: Trace, flax: Trace, oracle: Trace) -> None:
        """Layers in torch's order, then the outputs."""
        partners = dict(flax.layers)
        for place, truth in oracle.layers.items():
            path, partner = "".join(place), partners.pop(self._names.place(place), None)
            if partner is None:
                self._unmatched("torch", "layer", path, unless=flax.error)
                continue
            layout = layer_layout(truth, partner)
            if layout is None:
                self._misshapen("forward", path, truth.shape, partner.shape)
            else:
                self._measure("forward", path, layout(own.layers[place]), partner, layout(truth))
        for place in partners:
            self._unmatched("flax", "layer", "".join(place))
        if flax.error is None:
            self._outputs(own, flax, oracle)

    def raised(self, error: Exception) -> None:
        """Flax's forward broke off: a finding only where the rows already tell why."""
        if all(row.ok for row in self.rows()):
            raise error
        note = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        self._nothing("raised", note, "output", "", ())

    def gradients(self, own: Trace, flax: Trace, oracle: Trace) -> None:
        """Of the input, where it can be differentiated, and of the parameters."""
        torch, partner, truth = own.input_gradient, flax.input_gradient, oracle.input_gradient
        if torch is not None and partner is not None and truth is not None:
            self._measure("input gradient", "", torch, partner, truth)
        self._tensors("gradients", own.gradients, flax.gradients, oracle.gradients)

    def statistics(self, own: Trace, flax: Trace, oracle: Trace) -> None:
        """The buffers after the pass."""
        three = own.statistics, flax.statistics, oracle.statistics
        self._tensors("running statistics", *three)

    def _tensors(self, stage: str, own: Mapping, flax: Mapping, oracle: Mapping) -> None:
        """Those that both have, in the same shape; `weights` has told of the others."""
        for key, truth in oracle.items():
            name = self.partners.get(key)
            if name is None:
                continue
            partner = flax[name]
            laid = lay_parameter(name, truth, partner.shape)
            torch = lay_parameter(name, own[key], partner.shape)
            if laid is not None and torch is not None:
                self._measure(stage, key, torch, partner, laid)

    def _outputs(self, own: Trace, flax: Trace, oracle: Trace) -> None:
        for part, truth in oracle.outputs.items():
            partner = flax.outputs.get(part)
            if partner is None:
                self._nothing("missing", "not in Flax", "output", part, truth.shape)
            elif partner.shape != truth.shape:
                self._misshapen("output", part, truth.shape, partner.shape)
            else:
                self._measure("output", part, own.outputs[part], partner, truth)
        for part, partner in flax.outputs.items():
            if part not in oracle.outputs:
                self._nothing("missing", "not in torch", "output", part, partner.shape)

    def _weight(self, key: str, name: str, tensor: np.ndarray, partner: np.ndarray) -> None:
        dtype = tensor.dtype.name
        laid = lay_parameter(name, tensor, partner.shape)
        if laid is None:
            self._misshapen("parameters", key, tensor.shape, partner.shape, dtype)
        else:
            row = judge.equal("parameters", key, wide(laid), wide(partner), dtype)
            self._found["parameters", key] = row

    def _measure(
        self, stage: str, path: str, torch: np.ndarray, flax: np.ndarray, oracle: np.ndarray
    ) -> None:
        found = judge.gauge(torch, flax, oracle)
        before = self._found.get((stage, path))
        if isinstance(before, tuple):
            found |= before[1]
        self._found[stage, path] = flax.shape, found

    def _lonely(self, side: str, kind: str, path: str, shape: tuple[int, ...]) -> None:
        self._unmatched(side, kind, path)
        if kind == "parameter":
            other = "Flax" if side == "torch" else "torch"
            self._nothing("missing", f"not in {other}", "parameters", path, shape)

    def _unmatched(self, side: str, kind: str, path: str, unless: Exception | None = None) -> None:
        """Once a name; a forward that broke off says nothing about the layers behind."""
        item = Unmatched(side, kind, path)
        if unless is None and item not in self.unmatched:
            self.unmatched.append(item)

    def _misshapen(
        self, stage: str, path: str, torch: tuple, flax: tuple, dtype: str | None = None
    ) -> None:
        self._nothing("shape", f"torch {torch}, Flax {flax}", stage, path, flax, dtype)

    def _nothing(
        self, verdict: str, note: str, stage: str, path: str, shape: tuple, dtype: str | None = None
    ) -> None:
        dtype = dtype or self._judge.dtype
        row = judge.without_numbers(verdict, note, stage, path, shape, dtype)
        self._found[stage, path] = row
