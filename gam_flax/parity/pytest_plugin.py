"""For pytest, wherever this package is installed: `assert_parity` as a fixture, and a summary.

    @pytest.mark.parity(dtype="float32")
    def test_port(assert_parity):
        assert_parity(torch_model, flax_model, inputs, train=True)

The marker's arguments are those of `gam_flax.parity.compare`; what the call says goes first. With
`--parity-report DIR` the report and the picture of every comparison that fails are written there.
No framework is loaded before a test compares.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from gam_flax.parity.report import ParityReport

_AGREES, _DIFFERS = "parity agrees", "parity differs"  # properties of a test, a headline each


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds `--parity-report`."""
    parser.getgroup("parity", "PyTorch and Flax models compared").addoption(
        "--parity-report",
        metavar="DIR",
        help="write the report (.json) and the picture (.png) of failing comparisons there",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker and the summary."""
    config.addinivalue_line(
        "markers", "parity(**options): options of gam_flax.parity.compare for assert_parity"
    )
    config.pluginmanager.register(_Tally(), "parity-tally")


@pytest.fixture
def assert_parity(request: pytest.FixtureRequest) -> Callable[..., ParityReport]:
    """`gam_flax.parity.assert_parity`, with the options of the test's marker `parity`.

    The failure is the excerpt of the report around the first divergence, without the frames
    between.
    """
    options: dict[str, Any] = {}
    for mark in reversed([*request.node.iter_markers("parity")]):
        if mark.args:
            pytest.fail(f"parity takes arguments by name only, got {mark.args}", pytrace=False)
        options |= mark.kwargs
    written = _file_names(request.node.nodeid)

    def check(torch_model: Any, flax_model: Any, inputs: Any, **own: Any) -> ParityReport:
        __tracebackhide__ = True
        from gam_flax.parity.comparison import compare

        report = compare(torch_model, flax_model, inputs, **{**options, **own})
        kind = _AGREES if report.ok else _DIFFERS
        request.node.user_properties.append((kind, report.headline))
        if not report.ok:
            folder = request.config.getoption("parity_report")
            place = (
                request.config.invocation_params.dir / folder / next(written) if folder else None
            )
            raise AssertionError(str(report) + (_write(report, place) if place else ""))
        return report

    return check


class _Tally:
    """Counts the comparisons of all tests, those of other processes (pytest-xdist) included."""

    def __init__(self) -> None:
        self._counts = {_AGREES: 0, _DIFFERS: 0}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown":  # it has the properties of all three phases
            for name, _ in report.user_properties:
                if name in self._counts:
                    self._counts[name] += 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        agreed, differed = self._counts[_AGREES], self._counts[_DIFFERS]
        if total := agreed + differed:
            line = f"parity: {agreed} of {total} comparisons agree"
            terminalreporter.write_line(line, green=not differed, red=bool(differed))


def _file_names(test: str) -> Iterator[str]:
    """A name without suffix for each comparison of a test, of signs that every disk takes."""
    name = re.sub(r"[^\w.]+", "-", test.replace("::", "-"), flags=re.ASCII).strip("-")
    unique = f"{name[-100:]}-{zlib.crc32(test.encode()):08x}"
    count = 1
    while True:
        yield unique if count == 1 else f"{unique}-{count}"
        count += 1


def _write(report: ParityReport, place: Path) -> str:
    """The report as .json and .png; what to say about it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{place}.json").write_text(report.to_json(), encoding="utf-8")
    try:
        report.plot(f"{place}.png", force=True)
    except ModuleNotFoundError as error:
        return f"\n  written: {place}.json; no picture: {error.name} is not installed"
    return f"\n  written: {place}.json and {place.name}.png"
