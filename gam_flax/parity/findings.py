"""What two models give, tensor by tensor, until it is judged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from gam_flax.convert import leaves
from gam_flax.parity import judge, notes
from gam_flax.parity.align import Layout, Layouts, Names
from gam_flax.parity.causes import INPUT
from gam_flax.parity.judge import gap
from gam_flax.parity.pure import is_float
from gam_flax.parity.report import STAGES, Row, Unmatched
from gam_flax.parity.trace import Place, Trace, channels_last, cotangent, unlaid, wide
from gam_flax.parity.training import STEP, Training, laid

# Stages whose tensors are of one kind: one of them is noise beside the largest of its group.
_GROUPS = {
    "forward": "values",
    "single-step": "values",
    "output": "values",
    "loss": "values",
    "input gradient": "gradients",
    "gradients": "gradients",
    "running statistics": "statistics",
    "training": "trained",
    "evaluation": "values after training",
}

# Rounding errors of large terms that cancel do not shrink with their sum.
_COMMON_SCALE = ("input gradient", "gradients", "optimizer state")

_KINDS = ("parameter", "buffer")

_TRAINED = {
    "optimizer_state": "optimizer state",
    "losses": "training",
    "parameters": "training",
    "statistics": "training",
    "output": "evaluation",
}
"""Field of a `Training` → stage."""


def _group(stage: str, path: str) -> str:
    """All moments of one name are one kind: each is a mean of the same power of gradients."""
    return _GROUPS.get(stage) or f"moments {path.rpartition('.')[2]}"


class Findings:
    """Gathers what is found, stage by stage; the runs on several inputs count as one."""

    def __init__(self, names: Names, ruler: judge.Judge, layouts: Layouts):
        self.unmatched: list[Unmatched] = []
        self.partners: dict[str, str] = {}  # torch key → Flax path of a parameter or buffer
        self.names = names
        self._judge = ruler
        self._terms = 0.0  # the loss is a sum of terms that cancel; this is without their signs
        self.layouts = layouts
        self.tensors: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        self._buffers: Mapping[str, np.ndarray] = {}
        self._layer_errors: dict[str, float] = {}  # layer → how far off torch's gradients are
        self._odd: dict[Place, tuple[tuple, tuple]] = {}  # inputs of other shapes than Flax's
        self.second: Findings | None = None
        self._found: dict[tuple[str, str], Row | tuple[tuple[int, ...], judge.Gauge]] = {}

    def rows(self) -> tuple[Row, ...]:
        """What was found, judged, in the order of the stages."""
        second = {} if self.second is None else {row.place: row for row in self.second.rows()}
        return tuple(
            row if row.ok or not second.get(row.place, row).ok else second[row.place]
            for row in self._rows()
        )

    def again(self) -> Findings:
        """Of the same tensors, with nothing found yet; where a row fails, its word counts."""
        self.second = Findings(self.names, self._judge, self.layouts)
        self.second.partners, self.second.tensors = self.partners, self.tensors
        return self.second

    def _rows(self) -> tuple[Row, ...]:
        largest: dict[str, float] = {}
        self._layer_errors = {}
        for (stage, path), found in self._found.items():
            if not isinstance(found, Row):
                group = _group(stage, path)
                largest[group] = max(largest.get(group, 0.0), found[1].oracle)
            if not isinstance(found, Row) and stage == "gradients":
                layer = leaves.split(path)[0]
                worst = max(self._layer_errors.get(layer, 0.0), found[1].torch)
                self._layer_errors[layer] = worst
        self._pass_errors_back()
        rows = (
            found if isinstance(found, Row) else self._judged(stage, path, *found, largest)
            for (stage, path), found in self._found.items()
        )
        return tuple(sorted(rows, key=lambda row: STAGES.index(row.stage)))

    def _pass_errors_back(self) -> None:
        """A gradient is as far off as those of the layers behind it, which it is made of."""
        worst = 0.0
        for layer in reversed(self._layer_errors):
            worst = self._layer_errors[layer] = max(worst, self._layer_errors[layer])

    def _judged(
        self,
        stage: str,
        path: str,
        shape: tuple[int, ...],
        found: judge.Gauge,
        largest: Mapping[str, float],
    ) -> Row:
        kind = largest[_group(stage, path)]
        scale = kind if stage in _COMMON_SCALE else found.oracle
        if path.endswith("running_mean"):  # whose rounding errors are of its values' size
            variance = self._found.get((stage, path.removesuffix("mean") + "var"))
            if isinstance(variance, tuple):
                scale = max(scale, math.sqrt(variance[1].oracle))
        if stage == "loss":
            scale = max(scale, self._terms)
        if stage == "gradients":
            found = replace(found, torch=self._layer_errors[leaves.split(path)[0]])
        if stage == "single-step":  # one layer is allowed what torch needs for all up to it
            free = self._found.get(("forward", path.removesuffix(INPUT)))
            free = free or self._found.get(("output", path))
            if isinstance(free, tuple):
                found = replace(found, torch=max(found.torch, free[1].torch))
        return self._judge.row(stage, path, shape, found, scale, kind)

    def notes(self) -> Iterator[str]:
        """What the rows do not tell, a sentence each."""
        yield from notes.unseen_layers(self.unmatched, self.partners)
        measured = {
            key: found[1]
            for (stage, key), found in self._found.items()
            if stage == "gradients" and not isinstance(found, Row)
        }
        silent = [key for key, g in measured.items() if not g.oracle and not g.magnitude]
        yield from notes.silent_gradients(silent, len(measured))

    def pair(self, torch: tuple[Mapping, Mapping], flax: tuple[Mapping, Mapping]) -> None:
        """Finds the partners of parameters, which must have one, and of buffers.

        What is a parameter on one side may be a buffer on the other: a norm that is frozen.
        """
        self._buffers = torch[1]
        for kind, tensors, *places in zip(_KINDS, torch, flax, flax[::-1], strict=True):
            for key, tensor in tensors.items():
                found = ((name, p) for p in places if (name := self.names.leaf(key, p)))
                name, partners = next(found, ("", {}))
                if name:
                    self.partners[key] = name
                    self.tensors[key] = tensor, np.asarray(partners[name])
                else:
                    self._lonely("torch", kind, key, tensor.shape)
        taken = set(self.partners.values())
        for kind, partners in zip(_KINDS, flax, strict=True):
            for name, partner in partners.items():
                if name not in taken:
                    self._lonely("flax", kind, name, tuple(partner.shape))

    def weights(self, run: Trace) -> None:
        """Parameters and buffers, which are to be equal; `run` shows what may be flattened."""
        pictures = [array.shape[1:] for array in (*run.inputs.values(), *run.layers.values())]
        if any(stage == "parameters" and key in self.tensors for stage, key in self._found):
            return  # they are the same in every run
        for key, (tensor, partner) in self.tensors.items():
            name = self.partners[key]
            laid = self.layouts.parameter(key, name, tensor, partner.shape)
            if laid is not None and not np.array_equal(laid, partner):
                self.layouts.learn_flattening(name, laid, partner, pictures)
                laid = self.layouts.parameter(key, name, tensor, partner.shape)
            dtype = tensor.dtype.name
            if laid is None:
                self._misshapen("parameters", key, tensor.shape, partner.shape, dtype)
            else:
                row = judge.equal("parameters", key, wide(laid), wide(partner), dtype)
                self._found["parameters", key] = row

    def calls(self, own: Trace, flax: Trace) -> None:
        """Which calls of one layer are the same, before any is compared."""

        def apart(path: str, torch: np.ndarray, flax: np.ndarray) -> float:
            lay = self.layouts.activation(path + INPUT, torch, flax)
            found = gap(wide(lay(torch)), wide(flax)) if lay else None
            return math.inf if found is None else float(np.nan_to_num(found, nan=0.0).sum())

        self.names.learn_calls(own.inputs, flax.inputs, apart)

    def layer(self, place: Place, own: Trace, flax: Trace, truth: np.ndarray) -> None:
        """What one layer of torch's gives, each model running freely; `truth` is the oracle's."""
        path, partner = "".join(place), flax.layers.get(self.names.place(place, flax.layers))
        if partner is None:
            self._unmatched("torch", "layer", path, unless=flax.error)
            return
        lay = self.layouts.activation(path, truth, partner)
        if lay is None:
            self._misshapen("forward", path, truth.shape, partner.shape)
        else:
            self._lay_and_measure("forward", path, lay, own.layers[place], partner, truth)

    def forward(self, own: Trace, flax: Trace, oracle: Trace) -> None:
        """After all layers: those that Flax alone has, and the outputs."""
        taken = {self.names.place(place, flax.layers) for place in own.layers}
        for place in flax.layers:
            if place not in taken:
                self._unmatched("flax", "layer", "".join(place))
        if flax.error is None:
            self._outputs("output", own, flax, oracle)

    def as_flax_has_it(self, own: Trace, flax: Trace) -> Trace:
        """torch's activations under Flax's paths and in Flax's layout; equal ones are one array.

        What has another shape in Flax stays away: one side may pad before the layer, the other
        inside.
        """
        found = Trace()
        made: dict[tuple[int, tuple[int, ...] | None], np.ndarray] = {}
        for mark, torch, partners, to in (
            (INPUT, own.inputs, flax.inputs, found.inputs),
            ("", own.layers, flax.layers, found.layers),
        ):
            for place, array in torch.items():
                path, name = "".join(place) + mark, self.names.place(place, partners)
                partner = partners.get(name)
                key = id(array), None if partner is None else partner.shape
                if key not in made or self.layouts.is_told(path):
                    lay = self.layouts.activation(path, array, partner)
                    if lay is None and mark:
                        continue
                    made[key] = (lay or channels_last)(array)
                to[name] = made[key]
        return found

    def as_torch_has_it(self, own: Trace, flax: Trace) -> Trace:
        """Flax's activations under torch's paths and in torch's layout, `own` telling which."""
        found = Trace()
        for mark, torch, partners, to in (
            (INPUT, own.inputs, flax.inputs, found.inputs),
            ("", own.layers, flax.layers, found.layers),
        ):
            for place, array in torch.items():
                partner = partners.get(self.names.place(place, partners))
                if partner is not None:
                    lay = self.layouts.activation("".join(place) + mark, array, partner)
                    back = unlaid(lay, partner, array.shape) if lay else None
                    if back is not None:
                        to[place] = back
        return found

    def step(
        self, is_input: bool, place: Place, own: Trace, flax: Trace, truth: np.ndarray
    ) -> None:
        """What one layer makes of torch's input, or what it would have been given."""
        torch, partners = (run.inputs if is_input else run.layers for run in (own, flax))
        partner = partners.get(self.names.place(place, partners))
        path = "".join(place) + (INPUT if is_input else "")
        if partner is None:
            return
        lay = self.layouts.activation(path, truth, partner)
        if lay is not None:
            self._lay_and_measure("single-step", path, lay, torch[place], partner, truth)
        elif is_input:
            self._odd[place] = truth.shape, partner.shape
        else:
            if place in self._odd:  # it is no matter of where a layer is padded, then
                self._misshapen("single-step", path + INPUT, *self._odd[place])
            self._misshapen("single-step", path, truth.shape, partner.shape)

    def single_step(self, own: Trace, flax: Trace, oracle: Trace) -> None:
        """After the steps of all layers: the outputs."""
        if flax.error is None:
            self._outputs("single-step", own, flax, oracle)

    def training(self, own: Training, flax: Training, oracle: Training) -> None:
        """The optimizer's state after a step, losses, weights and statistics after all, and what
        the model then gives in evaluation."""
        truths = laid(oracle, flax, self.partners, self.layouts.parameter)
        mine = laid(own, flax, self.partners, self.layouts.parameter)
        for (field, key), (truth, partner) in truths.items():
            path = "losses" if field == "losses" else key
            self._measure(_TRAINED[field], path, mine[field, key][0], partner, truth)
        for key in sorted({*oracle.optimizer_state} ^ {*flax.optimizer_state}):
            if key == STEP:
                continue  # a schedule counts where the optimizer does not
            side = "Flax" if key in oracle.optimizer_state else "torch"
            if not flax.unnamed:
                self._nothing("missing", f"not in {side}", "optimizer state", key, ())

    def noise(self) -> set[str]:
        """The parameters whose gradient is nothing but rounding noise."""
        return {
            row.path for row in self.rows() if row.verdict == "noise" and row.path in self.partners
        }

    def raised(self, error: Exception) -> None:
        """Flax's forward broke off: a finding only where the rows already tell why."""
        if all(row.ok for row in self.rows()):
            raise error
        note = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        self._nothing("raised", note, "output", "", ())

    def gradients(self, own: Trace, flax: Trace, oracle: Trace) -> None:
        """The loss; its gradients by the input, where that is a number, and by the parameters."""
        terms = (y * cotangent(part, y.shape) for part, y in oracle.outputs.items())
        self._terms = float(sum(np.abs(term).sum() for term in terms))
        if own.loss is not None and flax.loss is not None and oracle.loss is not None:
            self._measure("loss", "", own.loss, flax.loss, oracle.loss)
        torch, partner, truth = own.input_gradient, flax.input_gradient, oracle.input_gradient
        if torch is not None and partner is not None and truth is not None:
            self._measure("input gradient", "", torch, partner, truth)
        self._tensors("gradients", own.gradients, flax.gradients, oracle.gradients)

    def statistics(self, own: Trace, flax: Trace, oracle: Trace) -> None:
        """The buffers after the pass; one that it has changed must have a partner."""
        for key, after in oracle.statistics.items():
            if key in self.partners or not is_float(self._buffers[key]):
                continue
            before = wide(self._buffers[key].astype(self._judge.dtype))
            if not np.array_equal(before, wide(after), equal_nan=True):
                self._nothing("missing", "not in Flax", "running statistics", key, after.shape)
        kept = {name: self.tensors[key][1] for key, name in self.partners.items()}
        theirs = kept | flax.statistics  # a parameter of Flax's stays as it is
        self._tensors("running statistics", own.statistics, theirs, oracle.statistics)

    def _tensors(self, stage: str, own: Mapping, flax: Mapping, oracle: Mapping) -> None:
        """Those that both have, in the same shape; `weights` has told of the others."""
        for key, truth in oracle.items():
            name = self.partners.get(key)
            if name is None or name not in flax:
                continue
            partner = flax[name]
            laid = self.layouts.parameter(key, name, truth, partner.shape)
            torch = self.layouts.parameter(key, name, own[key], partner.shape)
            if laid is not None and torch is not None:
                self._measure(stage, key, torch, partner, laid)

    def _outputs(self, stage: str, own: Trace, flax: Trace, oracle: Trace) -> None:
        for part, truth in oracle.outputs.items():
            partner = flax.outputs.get(part)
            if partner is None:
                self._nothing("missing", "not in Flax", stage, part, truth.shape)
            elif partner.shape != truth.shape:
                self._misshapen(stage, part, truth.shape, partner.shape)
            else:
                self._measure(stage, part, own.outputs[part], partner, truth)
        for part, partner in flax.outputs.items():
            if part not in oracle.outputs:
                self._nothing("missing", "not in torch", stage, part, partner.shape)

    def _lay_and_measure(
        self,
        stage: str,
        path: str,
        lay: Layout,
        torch: np.ndarray,
        flax: np.ndarray,
        oracle: np.ndarray,
    ) -> None:
        laid = lay(torch)
        self._measure(stage, path, laid, flax, laid if torch is oracle else lay(oracle))

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
