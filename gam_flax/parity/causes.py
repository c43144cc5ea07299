"""Why two models part: the likely causes of a divergence, each found by an experiment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from flax import nnx

from gam_flax.convert import leaves
from gam_flax.parity.align import Layout, Layouts, Names, flattenings
from gam_flax.parity.attention_causes import attentions
from gam_flax.parity.experiments import experiments
from gam_flax.parity.families import explain_by_families
from gam_flax.parity.glue import (
    LATEST,
    NEAR,
    UNFIT,
    Like,
    explain_glue,
    lay_safely,
    near,
    relations,
)
from gam_flax.parity.judge import gap, magnitude
from gam_flax.parity.pointwise_causes import gates, parameters
from gam_flax.parity.report import Row
from gam_flax.parity.shape_causes import poolings, resizings, turned
from gam_flax.parity.trace import Place, Trace, channels_first, channels_last, sequence_last
from gam_flax.parity.weights import explain_weight

_MOST = 3  # causes of one row
_KINKS = 2  # numbers at which a function may have kinks
_LEAST = 1e-11
_SINGLE = (
    2.0**-20
)  # from there to here, how far apart, of a tensor's scale, what is computed in float32 may be
_JOINED = {
    **dict.fromkeys(("in_proj_weight", "in_proj_bias"), "queries, keys and values"),
    **dict.fromkeys(("weight_ih", "weight_hh", "bias_ih", "bias_hh"), "a gate each"),
}
_VAGUE = ("something else", "in other places", "NaN or infinity")
"""The ends of causes that do not say what is otherwise."""
LARGER = (attentions, poolings, resizings, turned, parameters, gates)
"""Expressions with settings, those that are quickly tried first."""
INPUT = " (input)"
"""After the path of a layer in the single steps: what it is given."""


@dataclass(frozen=True)
class Evidence:
    """All that is known of a comparison in float64.

    x: the input.
    torch_model: as the user has it.
    train: whether the runs were in training.
    own, flax, fed: torch's run, Flax's, and Flax's with torch's activations.
    weights: torch key → torch's tensor and Flax's, each in its own layout.
    partners: torch key → Flax path.
    flax_layers: Flax path → layer, where the model can be asked.
    """

    x: np.ndarray
    torch_model: Any
    train: bool
    own: Trace
    flax: Trace
    fed: Trace
    weights: Mapping[str, tuple[np.ndarray, np.ndarray]]
    partners: Mapping[str, str]
    names: Names
    layouts: Layouts
    flax_layers: Mapping[str, Any]


def explain(row: Row, evidence: Evidence) -> tuple[str, ...]:
    """The likely causes of a row that diverges, the likeliest first; () where none was found."""
    explainers: dict[str, Callable[[Row, Evidence], Iterator[str]]] = {
        "parameters": _parameter,
        "forward": _activation,
        "single-step": _activation,
        "output": _activation,
        "loss": _loss,
        "input gradient": _input_gradient,
        "gradients": _gradient,
        "running statistics": _statistics,
    }
    if row.stage not in explainers:
        return ()
    found = [*_drawn(row, evidence), *islice(explainers[row.stage](row, evidence), _MOST)]
    vague = all(cause.endswith("something else") for cause in found)
    if vague and _LEAST <= row.max_error <= _SINGLE:
        found = [
            *found,
            "the numbers agree as far as float32 goes: Flax computes a step before in float32 (a "
            "dtype= of its own, jax.nn.dot_product_attention's softmax)",
        ]
    return tuple(dict.fromkeys(found))


def _drawn(row: Row, evidence: Evidence) -> Iterator[str]:
    """A Dropout of NNX's that is at work; nothing of torch's is, or it had been refused."""
    place, is_input = _event(row, evidence)
    layer = evidence.flax_layers.get(evidence.names.layer(place[0])) if place else None
    if not is_input and isinstance(layer, nnx.Dropout) and layer.rate:
        yield "Flax's Dropout draws random numbers, torch's does not: deterministic=, its rate"


def _parameter(row: Row, evidence: Evidence) -> Iterator[str]:
    if row.verdict == "missing":
        leaf = leaves.split(row.path)[1]
        where = "Flax" if "Flax" in row.note else "torch"
        if leaf in _JOINED:
            yield (
                f"{row.path} is several tensors of Flax's in one, {_JOINED[leaf]}: such are not "
                "paired, give Flax a layer with this parameter, or torch one with several"
            )
        elif leaf == "bias":
            yield f"the layer has no bias in {where}"
        else:
            yield f"{where} has no such parameter: other names (rename=), or a layer left out"
        return
    if row.path in evidence.weights:
        pictures = _pictures(evidence)
        yield from explain_weight(
            row.path, evidence.weights, evidence.partners, evidence.layouts, pictures
        )


def _activation(row: Row, evidence: Evidence) -> Iterator[str]:
    place, is_input = _event(row, evidence)
    if place is None:  # the model's own output
        truth, flax = evidence.own.outputs.get(row.path), evidence.fed.outputs.get(row.path)
        if truth is not None and flax is not None:
            layout = evidence.layouts.output(row.path, truth)
            truth = channels_first(truth) if layout is channels_last else truth
            known = _known(evidence, len(evidence.own.order))
            yield from _between(known, truth, flax, lambda _, flax: _like(flax, layout))
        return
    kind = (lambda run: run.inputs) if is_input else (lambda run: run.layers)
    name = evidence.names.place(place, kind(evidence.fed))
    truth, flax = kind(evidence.own)[place], kind(evidence.fed).get(name)
    if flax is None:
        return
    index = evidence.own.order.index((is_input, place))
    module = _module(evidence, place)

    def like(truth: np.ndarray, flax: np.ndarray) -> Layout:
        return _like(flax, evidence.layouts.activation(row.path, truth, flax))

    laid = lay_safely(like(truth, flax), truth)
    if laid is not None and near(laid, flax):
        return  # nearer than what is looked for
    if is_input or any(module.children()):
        yield from _between(_known(evidence, index), truth, flax, like)
    else:
        yield from _layer(module, place, truth, flax, like, evidence)


def _between(
    known: dict[str, np.ndarray], truth: np.ndarray, flax: np.ndarray, like: Like
) -> Iterator[str]:
    """What stands between layers: small expressions first; where these do not tell, larger ones."""
    found = explain_glue(known, truth, flax, like)
    if all(cause.endswith(_VAGUE) for cause in found):
        found = tuple(explain_by_families(known, truth, flax, like, LARGER)) or found
    yield from found


def _layer(
    module: Any,
    place: Place,
    truth: np.ndarray,
    flax: np.ndarray,
    like: Like,
    evidence: Evidence,
) -> Iterator[str]:
    """One layer without layers inside, fed with torch's input."""
    import torch

    given = evidence.own.inputs.get(place)
    if given is None:
        return
    lay = like(truth, flax)
    partner = evidence.flax_layers.get(evidence.names.layer(place[0]))
    x, found = torch.from_numpy(given.copy()), False
    with torch.no_grad():
        for what, changed, changed_input in experiments(module, x, partner):
            try:
                outcome = changed(changed_input).detach().numpy()
            except UNFIT:
                continue
            laid = lay_safely(lay, outcome)
            if laid is not None and near(laid, flax) and not near(outcome, truth):
                found = True
                yield f"Flax's numbers are torch's with this change: {what}"
    if found:
        return
    known = {f"the input of {place[0]}": given, f"the output of {place[0]}": truth}
    yield from (cause for cause in explain_glue(known, truth, flax, like) if "Flax so" not in cause)
    for order in flattenings(_pictures(evidence), given.shape[-1] if given.ndim == 2 else 0):
        for taken in (order, np.argsort(order)):
            if near(module(x[:, taken]).detach().numpy(), flax):
                yield "flatten order: kernel and features do not agree on (C, H, W) or (H, W, C)"
                return


def _loss(row: Row, evidence: Evidence) -> Iterator[str]:
    if evidence.own.loss is not None and evidence.flax.loss is not None:
        own, flax = float(evidence.own.loss), float(evidence.flax.loss)
        ratio = flax / own if own and flax else 0.5
        whole = max(abs(ratio), 1 / abs(ratio))  # two numbers always have a ratio
        if abs(whole - round(whole)) <= 1e-9 * whole:
            yield from _ratio(evidence.own.loss, evidence.flax.loss)


def _input_gradient(row: Row, evidence: Evidence) -> Iterator[str]:
    truth, flax = evidence.own.input_gradient, evidence.flax.input_gradient
    if truth is not None and flax is not None:
        yield from _ratio(truth, flax)
        yield from _kinks(evidence.x, truth, flax)


def _kinks(x: np.ndarray, truth: np.ndarray, flax: np.ndarray) -> Iterator[str]:
    """Gradients that differ at single numbers of the input alone."""
    if not x.shape == truth.shape == flax.shape:
        return
    wrong = gap(truth, flax) > NEAR * max(magnitude(truth), magnitude(flax))
    numbers = np.unique(x[wrong])
    by_chance = wrong.sum() <= len(numbers) and (numbers != np.round(numbers)).any()
    if 0 < len(numbers) <= _KINKS and not by_chance and not wrong.all():
        where = " or ".join(f"{number:g}" for number in numbers)
        yield (
            f"they differ only where the input is exactly {where}: torch and jax give a function "
            "another slope at its kink (abs, clip, maximum, leaky_relu)"
        )


def _gradient(row: Row, evidence: Evidence) -> Iterator[str]:
    name = evidence.partners.get(row.path)
    truth, flax = evidence.own.gradients.get(row.path), evidence.flax.gradients.get(name or "")
    if truth is None or flax is None or name is None:
        return
    laid = evidence.layouts.parameter(row.path, name, truth, flax.shape)
    if laid is not None:
        yield from _ratio(laid, flax)


def _ratio(truth: np.ndarray, flax: np.ndarray) -> Iterator[str]:
    for relation in relations(truth, flax, lambda array: array):
        zeros = relation == "Flax has zeros"
        yield "Flax's is zero: stop_gradient, or the layer is frozen" if zeros else relation


def _statistics(row: Row, evidence: Evidence) -> Iterator[str]:
    """The running statistics of one BatchNorm."""
    path, leaf = leaves.split(row.path)
    name = evidence.partners.get(row.path)
    place, flax = (path, ""), evidence.fed.statistics.get(name or "")
    given = evidence.own.inputs.get(place)
    if given is None or flax is None or leaf not in ("running_mean", "running_var"):
        return
    old = evidence.weights[row.path][0].astype(np.float64)
    module = _module(evidence, place)
    momentum = module.momentum or 1.0
    values = np.moveaxis(given, 1, -1).reshape(-1, given.shape[1])
    biased = values.var(0) if leaf == "running_var" else values.mean(0)
    count = len(values)
    kinds = {"": biased}
    if leaf == "running_var" and count > 1:
        kinds = {"": biased * count / (count - 1), "the variance is biased, 1 / n": biased}
    flax = flax.reshape(old.shape)
    if near(old, flax):
        yield "the running statistics are not updated"
    steps = {"": momentum, "momentum is the weight of the old value": 1 - momentum}
    steps |= {f"momentum {m:g}, in torch {momentum:g}": m for m in (0.1, 0.01, 0.03, 0.001, 0.003)}
    for how, new in steps.items():
        for kind, batch in kinds.items():
            if (how or kind) and near((1 - new) * old + new * batch, flax):
                yield ", ".join(filter(None, (how, kind)))


def _event(row: Row, evidence: Evidence) -> tuple[Place | None, bool]:
    """The place of a row, and whether it is of an input."""
    is_input = row.path.endswith(INPUT)
    path = row.path.removesuffix(INPUT)
    for kind, place in evidence.own.order:
        if kind == is_input and "".join(place) == path:
            return place, is_input
    return None, False


def _module(evidence: Evidence, place: Place) -> Any:
    """A copy of the torch layer, in float64 and in the mode of the comparison."""
    layer = evidence.torch_model.get_submodule(place[0])
    return deepcopy(layer).to("cpu").double().train(evidence.train).requires_grad_(False)


def _known(evidence: Evidence, index: int) -> dict[str, np.ndarray]:
    """What torch had computed last before event `index`, by name: outputs of layers, and their
    inputs where these are no other's output."""
    own = evidence.own
    found: dict[str, np.ndarray] = {}
    inputs: dict[str, np.ndarray] = {}
    for is_input, place in reversed(own.order[:index]):
        name = "".join(place)
        if not is_input:
            found.setdefault(name, own.layers[place])
        else:
            inputs[f"the input of {name}"] = found[f"the input of {name}"] = own.inputs[place]
        if len(found) - len(inputs) >= LATEST:
            break
    for name, array in inputs.items():
        others = (other for key, other in found.items() if key != name)
        if any(other is array or np.array_equal(other, array) for other in others):
            del found[name]
    return dict(reversed(found.items()))


def _pictures(evidence: Evidence) -> list[tuple[int, ...]]:
    own = evidence.own
    return [array.shape[1:] for array in (*own.inputs.values(), *own.layers.values())]


def _like(flax: np.ndarray, known: Layout | None) -> Layout:
    """torch's layout → Flax's, for tensors that may have other shapes than the true one.

    Args:
        known: how the true one is laid out; None where its shape does not tell.
    """

    def lay(array: np.ndarray) -> np.ndarray:
        if known is not None:
            with suppress(ValueError, IndexError):
                laid = known(array)
                if laid.shape == flax.shape:
                    return laid
        moved = channels_last(array)
        if array.ndim == 3 and array.shape != flax.shape == sequence_last(array).shape:
            moved = sequence_last(array)
        fits = moved.size == flax.size and moved.shape != flax.shape
        squeezed = [n for n in moved.shape if n != 1] == [n for n in flax.shape if n != 1]
        return moved.reshape(flax.shape) if fits and squeezed else moved

    return lay
