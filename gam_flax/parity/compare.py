"""Two models, one input: where do they part?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from gam_flax.parity import judge
from gam_flax.parity.align import Names, Rename, lay_parameter, layer_layout
from gam_flax.parity.report import ParityReport, Row, Unmatched
from gam_flax.parity.trace import Trace, wide


def compare(
    torch_model: Any,
    flax_model: Any,
    inputs: np.ndarray,
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
    `largest` being the largest tensor of the stage. There is no other tolerance.

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
        inputs: (B, H, W, C), (B, features), … as Flax takes it.
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
    x = _rounded(np.asarray(inputs), dtype)
    options = {"rounded_to": dtype, "train": train, "gradients": gradients}
    oracle = torch_side.run(torch_model, x, dtype="float64", **options)
    own = oracle
    if dtype != "float64":
        own = torch_side.run(torch_model, x, dtype=dtype, **options)
    flax = flax_side.run(pure, x, dtype=dtype, gradients=gradients)

    found = _Comparison(Names(rename), judge.Judge(dtype, multiple))
    found.weights(torch_side.weights(torch_model), (pure.parameters, pure.statistics))
    found.forward(own, flax, oracle)
    if flax.error is not None:
        found.raised(flax.error)
    elif found.same_outputs(flax, oracle):
        if gradients:
            found.gradients(own, flax, oracle)
        if train:
            found.statistics(own, flax, oracle)
    return ParityReport(tuple(found.rows), tuple(found.unmatched), dtype, train, multiple)


def assert_parity(
    torch_model: Any, flax_model: Any, inputs: np.ndarray, **options: Any
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


def _rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    """`x` as numbers that `dtype` holds, so that no framework has to round them its own way."""
    if x.dtype.kind not in "fV":  # numpy files bfloat16 under V
        return x
    return x.astype(np.float64 if dtype == "float64" else ml_dtypes.finfo(dtype).dtype).astype(
        np.float64
    )


class _Comparison:
    """Rows and unmatched names, gathered stage by stage."""

    def __init__(self, names: Names, judge: judge.Judge):
        self.rows: list[Row] = []
        self.unmatched: list[Unmatched] = []
        self._names = names
        self._judge = judge

    def weights(self, torch: tuple[Mapping, Mapping], flax: tuple[Mapping, Mapping]) -> None:
        """Parameters, which must have a partner, then buffers."""
        for kind, tensors, partners in zip(("parameter", "buffer"), torch, flax, strict=True):
            taken = set()
            for key, tensor in tensors.items():
                name = self._names.leaf(key, partners)
                taken.add(name)
                if name is None:
                    self._lonely("torch", kind, key, tensor.shape)
                    continue
                self._weight(key, name, tensor, np.asarray(partners[name]))
            for name, partner in partners.items():
                if name not in taken:
                    self._lonely("flax", kind, name, tuple(partner.shape))

    def forward(self, own: Trace, flax: Trace, oracle: Trace) -> None:
        """Layers in torch's order, then the outputs."""
        arrays = [*oracle.layers.values(), *oracle.outputs.values()]
        largest = max(map(judge.magnitude, arrays), default=0.0)
        partners = dict(flax.layers)
        for place, truth in oracle.layers.items():
            path = "".join(place)
            partner = partners.pop(self._names.place(place), None)
            if partner is None:
                # A forward that broke off says nothing about the layers behind.
                if flax.error is None:
                    self.unmatched.append(Unmatched("torch", "layer", path))
                continue
            layout = layer_layout(truth, partner)
            if layout is None:
                self._misshapen("forward", path, truth.shape, partner.shape)
            else:
                three = layout(own.layers[place]), partner, layout(truth)
                self.rows.append(self._judge.row("forward", path, *three, largest))
        self.unmatched += [Unmatched("flax", "layer", "".join(place)) for place in partners]
        if flax.error is None:
            self._outputs(own, flax, oracle, largest)

    def raised(self, error: Exception) -> None:
        """Flax's forward broke off: a finding only where the rows already tell why."""
        if all(row.ok for row in self.rows):
            raise error
        note = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        self._nothing("raised", note, "output", "", ())

    def same_outputs(self, flax: Trace, oracle: Trace) -> bool:
        """Whether the losses are the same function of the outputs."""
        shapes = {part: y.shape for part, y in oracle.outputs.items()}
        return shapes == {part: y.shape for part, y in flax.outputs.items()}

    def gradients(self, own: Trace, flax: Trace, oracle: Trace) -> None:
        """Of the input, where it can be differentiated, and of the parameters."""
        named = dict(self._pairs(own.gradients, flax.gradients, oracle.gradients))
        truths = [truth for _, _, truth in named.values()]
        if oracle.input_gradient is not None:
            truths.append(oracle.input_gradient)
        largest = max(map(judge.magnitude, truths), default=0.0)
        if oracle.input_gradient is not None:
            three = own.input_gradient, flax.input_gradient, oracle.input_gradient
            self.rows.append(self._judge.row("input gradient", "", *three, largest))
        for key, three in named.items():
            self.rows.append(self._judge.row("gradients", key, *three, largest))

    def statistics(self, own: Trace, flax: Trace, oracle: Trace) -> None:
        """The buffers after the pass."""
        pairs = self._pairs(own.statistics, flax.statistics, oracle.statistics)
        for key, three in pairs:
            self.rows.append(self._judge.row("running statistics", key, *three, largest=0.0))

    def _pairs(
        self, own: Mapping, flax: Mapping, oracle: Mapping
    ) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray, np.ndarray]]]:
        """(torch, Flax, oracle) by torch's key, where both have the tensor in the same shape."""
        for key, truth in oracle.items():
            name = self._names.leaf(key, flax)
            if name is None:
                continue  # `weights` has said so
            partner = flax[name]
            laid = [lay_parameter(name, array, partner.shape) for array in (own[key], truth)]
            if laid[0] is not None and laid[1] is not None:
                yield key, (laid[0], partner, laid[1])

    def _weight(self, key: str, name: str, tensor: np.ndarray, partner: np.ndarray) -> None:
        dtype = tensor.dtype.name
        laid = lay_parameter(name, tensor, partner.shape)
        if laid is None:
            self._misshapen("parameters", key, tensor.shape, partner.shape, dtype)
        else:
            self.rows.append(judge.equal("parameters", key, wide(laid), wide(partner), dtype))

    def _outputs(self, own: Trace, flax: Trace, oracle: Trace, largest: float) -> None:
        for part, truth in oracle.outputs.items():
            partner = flax.outputs.get(part)
            if partner is None:
                self._nothing("missing", "not in Flax", "output", part, truth.shape)
            elif partner.shape != truth.shape:
                self._misshapen("output", part, truth.shape, partner.shape)
            else:
                three = own.outputs[part], partner, truth
                self.rows.append(self._judge.row("output", part, *three, largest))
        for part, partner in flax.outputs.items():
            if part not in oracle.outputs:
                self._nothing("missing", "not in torch", "output", part, partner.shape)

    def _lonely(self, side: str, kind: str, path: str, shape: tuple[int, ...]) -> None:
        self.unmatched.append(Unmatched(side, kind, path))
        if kind == "parameter":
            other = "Flax" if side == "torch" else "torch"
            self._nothing("missing", f"not in {other}", "parameters", path, shape)

    def _misshapen(
        self, stage: str, path: str, torch: tuple, flax: tuple, dtype: str | None = None
    ) -> None:
        self._nothing("shape", f"torch {torch}, Flax {flax}", stage, path, flax, dtype)

    def _nothing(
        self, verdict: str, note: str, stage: str, path: str, shape: tuple, dtype: str | None = None
    ) -> None:
        row = judge.without_numbers(verdict, note, stage, path, shape, dtype or self._judge.dtype)
        self.rows.append(row)
