"""The picture of a report: what is drawn where, and that nothing odd breaks it."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest
from matplotlib.figure import Figure

from gam_flax.convert.errors import CheckpointError
from gam_flax.parity import ParityReport, Row, compare
from tests.parity.networks import X, nnx_net, torch_net


def row(stage: str, path: str, error: float, verdict: str = "ok", **changes: Any) -> Row:
    changes = {"max_error": error, "flax_error": error, "verdict": verdict, **changes}
    return replace(_GOOD.rows[0], stage=stage, path=path, **changes)


_MODEL = torch_net()
_GOOD = compare(_MODEL, nnx_net(_MODEL), X, train=False)


def report(rows: list[Row], dtype: str = "float64") -> ParityReport:
    return ParityReport(tuple(rows), (), dtype, False, 4.0)


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws a report; gives the figure."""
    figures = []
    save = Figure.savefig

    def note(self, *args, **kwargs):
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", note)

    def call(found: ParityReport) -> Any:
        found.plot(tmp_path / "out.png", force=True)
        return figures[-1]

    return call


def titles(figure: Any) -> list[str]:
    return [axis.get_title(loc="left").split(":")[0].split(",")[0] for axis in figure.axes]


def labels(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.get_xticklabels()]


def line(axis: Any, label: str) -> dict[float, float]:
    """Where a curve has its points."""
    lines = {line.get_label(): line for line in axis.lines}
    return dict(zip(*map(list, lines[label].get_data()), strict=True))


DIFFERENCE = "difference between Flax and torch"


def test_panels_follow_the_depth(drawn):
    figure = drawn(_GOOD)
    assert figure.get_suptitle() == _GOOD.headline
    assert titles(figure)[:1] == ["forward pass"] and "gradients" in titles(figure)
    assert not [title for title in titles(figure) if "weights" in title]  # they are equal
    names = labels(figure.axes[-1])
    assert names[:2] == ["input", "conv1"] and "fc" in names and "output" in names
    assert names.index("norm") < names.index("conv2") < names.index("fc") < names.index("output")


def test_a_fault_is_marked_in_its_layer(drawn):
    model = torch_net()
    twin = nnx_net(model)
    model.norm.eps = 1e-3
    found = compare(model, twin, X)
    first = found.first_divergence
    assert first is not None
    figure = drawn(found)
    words = [text.get_text().replace("\n", " ") for axis in figure.axes for text in axis.texts]
    (said,) = [text for text in words if text]
    assert said.startswith(f"first divergence: {first.path}, fail")
    for cause in getattr(first, "causes", ())[:1]:
        assert cause[:30] in said
    red = [t.get_text() for t in figure.axes[-1].get_xticklabels() if t.get_color() == "#D55E00"]
    assert red == ["norm"]
    forward = figure.axes[0]
    assert len(line(forward, "diverges")) == sum(
        not r.ok for r in found.rows if r.stage in ("forward", "output", "loss")
    )


def test_both_errors_and_the_limit_in_narrow_types(drawn):
    rows = [row("forward", f"l{i}", 3e-7 * 10**i, torch_error=1e-7 * 10**i) for i in range(3)]
    (axis,) = drawn(report(rows, "float32")).axes
    assert line(axis, "error of Flax") == pytest.approx({0: 3e-7, 1: 3e-6, 2: 3e-5})
    assert line(axis, "error of torch") == pytest.approx({0: 1e-7, 1: 1e-6, 2: 1e-5})
    limit = line(axis, "allowed: 4 × torch's error + eps")
    assert limit == pytest.approx({i: 4e-7 * 10**i + 2**-23 for i in range(3)})


def test_zero_and_no_number_have_lines_of_their_own(drawn):
    rows = [
        row("forward", "a", 0.0),
        row("forward", "b", 1e-15),
        row("forward", "c", math.inf, "shape", note="torch (2, 3), Flax (2, 4)"),
        row("forward", "d", 0.5, "nan"),
        row("output", "", math.inf, "raised"),
    ]
    figure = drawn(report(rows))
    (axis,) = figure.axes
    ticks = {
        t.get_text(): y for t, y in zip(axis.get_yticklabels(), axis.get_yticks(), strict=True)
    }
    low, high = axis.get_ylim()
    assert low < ticks["0"] < 1e-15 < ticks["no number"] < high
    assert line(axis, "diverges") == {x: ticks["no number"] for x in (2, 3, 4)}
    curve = line(axis, DIFFERENCE)
    assert curve[0] == ticks["0"] and curve[1] == 1e-15
    assert all(math.isnan(curve[x]) for x in (2, 3, 4))
    assert "0: less than 1e-20" in figure.get_supylabel()


def test_noise_is_beside_the_curve(drawn):
    rows = [
        row("forward", "conv", 1e-15),
        row("gradients", "conv.weight", 1e-16),
        row("gradients", "conv.bias", 1e-13, "noise"),
    ]
    axis = drawn(report(rows)).axes[1]
    assert line(axis, DIFFERENCE) == {0: 1e-16}
    assert line(axis, "rounding noise on both sides, agrees") == {0: 1e-13}


def test_weights_are_drawn_where_they_differ(drawn):
    rows = [row("parameters", "fc.bias", math.inf, "missing"), row("parameters", "fc.weight", 0.0)]
    assert titles(drawn(report([*rows, row("output", "", 1e-16)]))) == [
        "weights before the run",
        "forward pass",
    ]


def test_calls_parts_and_inputs_of_a_layer(drawn):
    rows = [row("forward", path, 1e-16) for path in ("fc", "fc#2", "inner[0]", "inner[1]")]
    rows += [row("single-step", path, 1e-16) for path in ("fc (input)", "fc", "fc#2", "inner[1]")]
    rows += [row("gradients", "scale", 1e-15), row("gradients", "fc.weight", 1e-15)]
    rows += [row("optimizer state", "fc.weight.exp_avg", 1e-15), row("training", "loss#1", 1e-15)]
    figure = drawn(report(rows))
    names = labels(figure.axes[-2])
    assert names[-4:] == ["fc", "fc#2", "inner[0]", "inner[1]"]
    forward, single, gradients, state, steps = figure.axes
    assert len(line(forward, DIFFERENCE)) == 4 and len(line(single, DIFFERENCE)) == 3
    assert names.index("fc") in line(gradients, DIFFERENCE).keys() & line(state, DIFFERENCE).keys()
    assert labels(steps) == ["loss#1"]


def test_hundreds_of_layers_with_long_names(drawn):
    layers = [
        f"model.backbone.stages.{b}.attention.{part}"
        for b in range(60)
        for part in ("norm", "channel_attention.fc1", "channel_attention.fc2", "spatial.conv", "$x")
    ]
    wrong = layers[147]
    rows = [row("forward", path, 1e-3 if path == wrong else 1e-15) for path in layers]
    rows[147] = replace(rows[147], verdict="fail")
    axis = drawn(report(rows)).axes[0]
    names = labels(axis)
    assert 40 < len(names) < 130 and max(map(len, names)) <= 34
    assert "29…channel_attention.fc2" in names
    assert axis.get_xlabel().startswith("layers of model.backbone.stages, in the order")
    assert len(line(axis, DIFFERENCE)) == 300


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_an_empty_report(drawn, dtype):
    assert drawn(report([], dtype)).get_suptitle().startswith("parity: all 0 rows")


def test_svg_is_the_same_each_time(tmp_path):
    _GOOD.plot(tmp_path / "a.svg")
    _GOOD.plot(tmp_path / "b.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text() and re.search(r"<svg ", text)


def test_files(tmp_path):
    path = tmp_path / "out.PNG"
    _GOOD.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(CheckpointError, match="exists"):
        _GOOD.plot(path)
    _GOOD.plot(path, force=True)
    for name in ("out.pdf", "out"):
        with pytest.raises(CheckpointError, match=r"\.png or \.svg"):
            _GOOD.plot(tmp_path / name)
    with pytest.raises(CheckpointError, match="cannot be written"):
        _GOOD.plot(tmp_path / "absent" / "out.png")
    assert [file.name for file in tmp_path.iterdir()] == ["out.PNG"]


def test_a_curve_goes_on_where_something_else_of_the_layer_has_no_number(drawn):
    rows = [row("single-step", "fc (input)", math.inf, "shape"), row("single-step", "fc", 1e-16)]
    (axis,) = drawn(report(rows)).axes
    assert line(axis, DIFFERENCE) == {0: 1e-16} and line(axis, "diverges").keys() == {0}
