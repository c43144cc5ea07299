"""Every seeded fault is caught, at the right layer, and most with the right cause.

The table in docs/parity.md is made from the same list.
"""

from __future__ import annotations

import pytest

from gam_flax.parity import compare
from tests.parity.mutations import MUTATIONS, Mutation
from tests.parity.zoo import ZOO, twins
from tests.paths import ROOT


@pytest.mark.parametrize("network", ZOO)
@pytest.mark.parametrize("train", [False, True])
def test_honest_twins_agree(network, train):
    """Without a fault nothing is reported, so that what is reported below is the fault."""
    model, twin, x = twins(network)
    report = compare(model, twin, x, train=train)
    assert report.ok, str(report)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.fault)
def test_a_fault_is_caught_at_its_layer_with_its_cause(mutation: Mutation):
    model, twin, x = twins(mutation.network)
    mutation.apply(model, twin)
    report = compare(model, twin, x, **mutation.options)
    first = report.first_divergence
    assert first is not None and first.path == mutation.path, str(report)
    assert not mutation.cause or any(mutation.cause in cause for cause in first.causes), (
        f"{mutation.cause!r} is not among {first.causes}"
    )


def test_there_are_enough_and_the_table_has_them_all():
    assert len(MUTATIONS) >= 25 and sum(bool(m.cause) for m in MUTATIONS) >= 20
    assert len({mutation.fault for mutation in MUTATIONS}) == len(MUTATIONS)
    assert table() in (ROOT / "docs" / "parity.md").read_text(encoding="utf-8")


def table() -> str:
    """The list of faults as docs/parity.md has it."""
    lines = ["| fault | network | marked | cause named |", "|---|---|---|---|"]
    for m in MUTATIONS:
        cells = (m.fault, m.network, f"`{m.path}`", f"… {m.cause} …" if m.cause else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
