"""A report with the causes of what diverges."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from gam_flax.parity.causes import Evidence, explain
from gam_flax.parity.progress import Progress
from gam_flax.parity.question import Question
from gam_flax.parity.report import STAGES, ParityReport, Row
from gam_flax.parity.training import Trainings
from gam_flax.parity.training_causes import explain_training

_EXPLAINED = 3  # single steps whose causes are looked for, beside the first divergence
_TRAINING = STAGES[STAGES.index("optimizer state") :]


def explained(
    report: ParityReport,
    question: Question,
    evidence: Evidence,
    trainings: Trainings | None,
    progress: Progress,
) -> ParityReport:
    """With the causes of the first divergence, and of the first single steps that diverge."""
    with _one_thread():
        causes = _causes(report, question, evidence, trainings, progress)
    rows = (replace(row, causes=causes.get(id(row), ())) for row in report.rows)
    return replace(report, rows=tuple(rows))


def _causes(
    report: ParityReport,
    question: Question,
    evidence: Evidence,
    trainings: Trainings | None,
    progress: Progress,
) -> dict[int, tuple[str, ...]]:
    """By the id of a row."""
    first = report.first_divergence
    chosen = [row for row in report.rows if row.stage == "single-step" and not row.ok][:_EXPLAINED]
    causes: dict[int, tuple[str, ...]] = {}
    for row in (first, *chosen):
        if row is not None and id(row) not in causes:
            progress.stage("looking for the cause")
            progress.layer(row.path)
            causes[id(row)] = _try_explain(row, evidence)
    if first is not None and first.stage in _TRAINING and trainings is not None:
        causes[id(first)] = explain_training(
            question.torch_model,
            question.inputs,
            trainings.torch,
            trainings.flax,
            optimizer=question.optimizer,
            train=question.train,
            partners=evidence.partners,
            lay=evidence.layouts.parameter,
            frozen=trainings.frozen,
            loss=question.loss[0],
            lay_output=evidence.layouts.output,
        )
    return causes


def _try_explain(row: Row, evidence: Evidence) -> tuple[str, ...]:
    """`explain`. It runs layers of the user's in ways they were not made for, and must not cost
    the report."""
    try:
        return explain(row, evidence)
    except Exception:
        return ()


def with_causes_of(report: ParityReport, exact: ParityReport) -> ParityReport:
    """The report of a narrow dtype with what float64 tells of its first divergence."""
    first, true = report.first_divergence, exact.first_divergence
    if true is None:
        causes: tuple[str, ...] = (
            f"in float64 the models agree: here Flax computes in less than {report.dtype} "
            "(dtype= of the layer, TF32 or bfloat16 products, a variance as E[x²] − E[x]²)",
        )
    else:
        where = "" if first and true.path == first.path else f"in float64 {true.path}: "
        causes = tuple(where + cause for cause in true.causes)
    rows = tuple(replace(row, causes=causes) if row is first else row for row in report.rows)
    return replace(report, rows=rows)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Thousands of small experiments: threads that wait for each other make them many times
    slower on a machine that does something else."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
