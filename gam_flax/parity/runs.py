"""The runs of a comparison, and the report of what they gave."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from flax import nnx

from gam_flax.convert.flax_paths import nnx_modules
from gam_flax.parity import flax_side, judge, notes, torch_side
from gam_flax.parity.align import Layouts, Names
from gam_flax.parity.causes import Evidence
from gam_flax.parity.configuration import check_configuration, comparison_settings
from gam_flax.parity.explanations import explained, with_causes_of
from gam_flax.parity.findings import Findings
from gam_flax.parity.masks import masked_torch
from gam_flax.parity.progress import Progress
from gam_flax.parity.pure import Pure
from gam_flax.parity.question import Question, samples
from gam_flax.parity.report import STAGES, ParityReport
from gam_flax.parity.trace import Place, See, Trace
from gam_flax.parity.training import Trainings, train_torch, untrained
from gam_flax.parity.training_flax import TrainingProgram

_SLIGHT = 1e-6  # of the scale: what ill-conditioned layers may make of float64's rounding
_TRAININGS = 3  # the same for training, which takes longer; in float64 as well

_BACKWARD = {"input gradient", "gradients"}
_BEFORE_TRAINING = STAGES[: STAGES.index("running statistics")]


def answer(question: Question, progress: Progress) -> ParityReport:
    """Runs both models and judges what they give."""
    flax_side.check_kind(question.flax_model)
    found = configured(question)
    question = replace(question, torch_model=masked_torch(question.torch_model, question.masks))
    with comparison_settings(x64=question.exact):
        return replace(_answer(question, progress), configuration=found)


def configured(question: Question) -> dict[str, Any]:
    """What the comparison meets, as plain data."""
    import json

    found = check_configuration(question.torch_model, question.flax_model, dtype=question.dtype)
    return json.loads(found.to_json())


def _answer(question: Question, progress: Progress) -> ParityReport:
    model, dtype = question.torch_model, question.dtype
    names = Names(question.rename)
    masks = {names.layer(path): np.asarray(mask) for path, mask in question.masks.items()}
    pure = flax_side.pure(question.flax_model, dtype=dtype, train=question.train, masks=masks)
    program = flax_side.Program(
        pure,
        dtype=dtype,
        gradients=question.gradients,
        loss=question.loss[1],
        tell=progress.layer,
    )
    layouts = Layouts(question.layout, _turned(question, names, pure))
    found = Findings(names, judge.Judge(dtype, question.multiple), layouts)
    found.pair(torch_side.weights(model), (pure.parameters, pure.statistics))
    evidence: Evidence | None = None
    inputs = list(samples(question.inputs, found.partners, dtype))
    for number, (x, factors) in enumerate(inputs):
        progress.run(number, len(inputs) + 1)
        evidence = None  # a run's activations are gone before the next
        evidence = _one_run(question, found, program, x, factors, progress)
        if evidence.flax.error is not None:
            break
    assert evidence is not None
    if evidence.flax.error is None:
        wrong = {row.stage for row in found.rows() if not row.ok}
        if question.exact:
            _weigh(question, found, program, evidence, progress)
        elif wrong and wrong <= _BACKWARD:
            _there(question, found, program, evidence, inputs, progress)
    trainings = None
    if question.steps and _agree_so_far(found) and evidence.flax.error is None:
        trainings = _trainings(question, found, pure, progress)
    report = ParityReport(
        found.rows(),
        tuple(found.unmatched),
        dtype,
        question.train,
        question.multiple,
        notes=(*found.notes(), *notes.narrow_layers(pure.own_dtypes, dtype)),
    )
    if report.ok:
        return report
    if question.exact:
        return explained(report, question, evidence, trainings, progress)
    del evidence
    return with_causes_of(report, _answer(replace(question, dtype="float64"), progress))


def _turned(question: Question, names: Names, pure: Pure) -> set[str]:
    """The kernels that are of a transposed convolution on both sides, and turned in Flax's."""
    keys = torch_side.transposed_convolutions(question.torch_model)
    theirs = {name for key in keys if (name := names.leaf(key, pure.parameters))}
    x = flax_side.cast(question.inputs, question.dtype)
    return theirs & flax_side.turned_kernels(question.flax_model, pure, x) if theirs else set()


def _one_run(
    question: Question,
    found: Findings,
    program: flax_side.Program,
    x: np.ndarray,
    factors: Mapping[str, float],
    progress: Progress,
) -> Evidence:
    """Both models on one input, twice: running freely, and Flax fed with torch's activations.

    The oracle's activations are not kept: each is compared as it comes.
    """
    model, dtype = question.torch_model, question.dtype

    def run(stage: str, dtype: str, **options: Any) -> Trace:
        progress.stage(stage)
        return torch_side.run(
            model,
            x,
            factors,
            dtype=dtype,
            rounded_to=question.dtype,
            train=question.train,
            lay=found.layouts.output,
            tell=progress.layer,
            **options,
        )

    free = {"gradients": question.gradients, "loss": question.loss[0]}
    flax_factors = {found.partners[key]: factor for key, factor in factors.items()}
    progress.stage("Flax")
    flax = program(x, flax_factors)
    found.layouts.expect(flax.outputs)
    own = run(f"torch in {dtype}", dtype, **free)
    found.weights(own)
    found.calls(own, flax)

    def compared(is_input: bool, place: Place, truth: np.ndarray) -> None:
        if not is_input:
            found.layer(place, own, flax, truth)

    if question.exact:
        oracle = own
        _shown_again(own, compared, progress, "comparing")
    else:
        oracle = run("torch in float64, and comparing", "float64", see=compared, **free)
    found.forward(own, flax, oracle)
    given = found.as_flax_has_it(own, flax)
    flax.forget_layers()
    progress.stage("Flax, fed with torch's activations")
    fed = program.fed(x, flax_factors, given)
    del given

    def stepped(is_input: bool, place: Place, truth: np.ndarray) -> None:
        found.step(is_input, place, own, fed, truth)

    if question.exact:
        truth = own
        _shown_again(own, stepped, progress, "comparing single steps")
    else:
        said = "torch in float64, fed, and comparing single steps"
        truth = run(said, "float64", gradients=False, fed=own, see=stepped)
    found.single_step(own, fed, truth)
    if flax.error is not None:
        found.raised(flax.error)
    else:
        if question.gradients and _same_outputs(flax, oracle):
            found.gradients(own, flax, oracle)
        if question.train:
            found.statistics(own, flax, oracle)
    whole = isinstance(question.flax_model, nnx.Module)
    return Evidence(
        x=np.asarray(x, np.float64),
        torch_model=model,
        train=question.train,
        own=own,
        flax=flax,
        fed=fed,
        weights=found.tensors,
        partners=found.partners,
        names=found.names,
        layouts=found.layouts,
        flax_layers=nnx_modules(question.flax_model) if whole else {},
    )


def _there(
    question: Question,
    found: Findings,
    program: flax_side.Program,
    evidence: Evidence,
    inputs: Iterable[tuple[np.ndarray, Mapping[str, float]]],
    progress: Progress,
) -> None:
    """Where gradients alone differ, takes torch's at the very activations that Flax came to.

    A relu whose input is zero but for rounding has the slope 0 or 1, as the rounding falls: both
    gradients are right, each at its own point, and those of one point can be compared.
    """
    second = found.again()
    for x, factors in inputs:
        progress.stage("gradients where Flax's forward came to")
        flax = program(x, {found.partners[key]: factor for key, factor in factors.items()})
        given = found.as_torch_has_it(evidence.own, flax)
        own, oracle = (
            torch_side.run(
                question.torch_model,
                x,
                factors,
                dtype=dtype,
                rounded_to=question.dtype,
                train=question.train,
                gradients=True,
                loss=question.loss[0],
                fed=given,
                lay=found.layouts.output,
                see=lambda *event: None,
                tell=progress.layer,
            )
            for dtype in (question.dtype, "float64")
        )
        second.gradients(own, flax, oracle)


def _weigh(
    question: Question,
    found: Findings,
    program: flax_side.Program,
    evidence: Evidence,
    progress: Progress,
) -> None:
    """Where float64 falls a little short, asks what it can do: torch's own answer to neighbours is
    its error. A norm over two values brings a rounding up to any size.
    """
    apart = [row.max_error for row in found.rows() if row.verdict == "fail"]
    if not apart or max(apart) > _SLIGHT:
        return
    flax, fed, own = program(question.inputs, {}), evidence.fed, evidence.own
    for x, factors in samples(question.inputs, found.partners, "float64", _TRAININGS, near=True):
        progress.stage("torch beside the input")
        near = torch_side.run(
            question.torch_model,
            x,
            factors,
            dtype="float64",
            rounded_to="float64",
            train=question.train,
            gradients=question.gradients,
            loss=question.loss[0],
            lay=found.layouts.output,
            tell=progress.layer,
        )
        for is_input, place in own.order:
            truth = (own.inputs if is_input else own.layers)[place]
            found.step(is_input, place, near, fed, truth)
            if not is_input:
                found.layer(place, near, flax, truth)
        found.forward(near, flax, own)
        found.single_step(near, fed, own)
        if question.gradients and _same_outputs(flax, own):
            found.gradients(near, flax, own)
        if question.train:
            found.statistics(near, flax, own)


def _shown_again(own: Trace, see: See, progress: Progress, stage: str) -> None:
    """Goes through what torch's layers took and gave, as in a run."""
    progress.stage(stage)
    for is_input, place in own.order:
        progress.layer(place[0])
        see(is_input, place, (own.inputs if is_input else own.layers)[place])


def _agree_so_far(found: Findings) -> bool:
    """Whether training can tell more: models that differ train differently."""
    return all(row.ok for row in found.rows() if row.stage in _BEFORE_TRAINING)


def _trainings(
    question: Question, found: Findings, pure: Pure, progress: Progress
) -> Trainings | None:
    """Trains both; returns the trainings on the given input, where the dtype is float64.

    In float64 torch trains on neighbours too: Adam brings rounding up, and its own error tells by
    how much.
    """
    model, dtype, fixed = question.torch_model, question.dtype, untrained(question.torch_model)
    fixed |= {key for key, _ in model.named_buffers()}
    if fixed >= {key for key, _ in model.named_parameters()}:
        return None  # nothing to train
    frozen = found.noise()
    evaluation = flax_side.pure(question.flax_model, dtype=dtype, train=False)
    program = TrainingProgram(
        pure,
        evaluation,
        optimizer=question.optimizer,
        steps=question.steps,
        dtype=dtype,
        partners=found.partners,
        frozen=frozen,
        fixed=fixed,
        loss=question.loss[1],
    )
    options: dict[str, Any] = {
        "optimizer": question.optimizer,
        "steps": question.steps,
        "rounded_to": dtype,
        "train": question.train,
        "frozen": frozen,
        "loss": question.loss[0],
        "lay_output": found.layouts.output,
    }
    inputs = list(samples(question.inputs, found.partners, dtype, _TRAININGS))
    pairs = []
    for number, (x, factors) in enumerate(inputs, 1):
        progress.stage(f"training, {question.steps} steps, {number} of {len(inputs)}")
        oracle = train_torch(model, x, factors, dtype="float64", **options)
        flax_factors = {found.partners[key]: factor for key, factor in factors.items()}
        pairs.append((oracle, program(x, flax_factors)))
        if not question.exact:
            own = train_torch(model, x, factors, dtype=dtype, **options)
            found.training(own, pairs[-1][1], oracle)
    if question.exact:
        oracle, flax = pairs[0]
        for x, factors in samples(question.inputs, found.partners, dtype, _TRAININGS, near=True):
            own = train_torch(model, x, factors, dtype="float64", **options)
            found.training(own, flax, oracle)
    oracle, flax = pairs[0]
    return Trainings(oracle, flax, frozen)


def _same_outputs(flax: Trace, oracle: Trace) -> bool:
    """Whether the losses are the same function of the outputs."""
    shapes = {part: y.shape for part, y in oracle.outputs.items()}
    return shapes == {part: y.shape for part, y in flax.outputs.items()}
