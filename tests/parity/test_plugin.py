"""The pytest plugin, in test runs of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.paths import ROOT

pytest_plugins = ["pytester"]

TESTS = """
import pytest
from tests.parity.networks import X, nnx_net, torch_net

def twins(eps=1e-5):
    model = torch_net()
    twin = nnx_net(model)
    model.norm.eps = eps
    return model, twin, X

def test_agrees(assert_parity):
    assert assert_parity(*twins()).dtype == "float64"

@pytest.mark.parity(dtype="float32", gradients=False)
class TestMarked:
    def test_class(self, assert_parity):
        report = assert_parity(*twins())
        assert report.dtype == "float32" and "gradients" not in {r.stage for r in report.rows}

    @pytest.mark.parity(dtype="bfloat16")
    def test_nearest_and_call_first(self, assert_parity):
        assert assert_parity(*twins()).dtype == "bfloat16"
        assert assert_parity(*twins(), dtype="float64").dtype == "float64"

@pytest.mark.parametrize("eps", [1e-3], ids=["a/b c"])
def test_differs(assert_parity, eps):
    with pytest.raises(AssertionError):
        assert_parity(*twins(eps))
    assert_parity(*twins(eps))

@pytest.mark.parity("float32")
def test_by_position(assert_parity):
    pass
"""


@pytest.fixture
def here(pytester, monkeypatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makeini("[pytest]\naddopts = --strict-markers --import-mode=importlib")
    pytester.makepyfile(test_port=TESTS)
    return pytester


def run(here: pytest.Pytester, *words: str) -> pytest.RunResult:
    """In another process: frameworks do not like to be imported twice in one."""
    return here.runpytest_subprocess("-p", "no:cacheprovider", *words)


def test_fixture_marker_and_summary(here):
    result = run(here, "--parity-report", "found", "-p", "no:xdist")
    result.assert_outcomes(passed=3, failed=1, errors=1)
    lines = result.stdout.lines
    assert "parity: 4 of 6 comparisons agree" in lines
    result.stdout.fnmatch_lines(
        [
            "*parity takes arguments by name only, got ('float32',)",
            "*assert_parity(?twins(eps))*",
            "E*AssertionError: no parity: * first forward norm",
            "E*> forward * norm *",
            "E*written: *found*test_port.py-test_differs-a-b-c-*-2.json and *-2.png",
        ]
    )
    assert not any("comparison.py" in line or "pytest_plugin.py" in line for line in lines)
    files = sorted(file.name for file in (here.path / "found").iterdir())
    assert [name.rpartition(".")[2] for name in files] == ["json", "png"] * 2
    report = json.loads((here.path / "found" / files[0]).read_text())
    assert not report["ok"]
    assert (here.path / "found" / files[1]).read_bytes().startswith(b"\x89PNG")


def test_nothing_is_written_or_said_unasked(here):
    result = run(here, "-k", "differs", "-p", "no:xdist")
    result.stdout.fnmatch_lines(["parity: 0 of 2 comparisons agree"])
    assert not [*here.path.rglob("*.json"), *here.path.rglob("*.png")]
    here.makepyfile(test_port="def test_nothing(): pass")
    assert "parity:" not in run(here).stdout.str()


def test_processes_of_xdist_are_counted_together(here):
    result = run(here, "-k", "agrees or differs", "-n", "2")
    result.stdout.fnmatch_lines(["parity: 1 of 3 comparisons agree"])


def test_the_marker_is_told(here):
    run(here, "--markers").stdout.fnmatch_lines(["@pytest.mark.parity(?*options): *"])


def test_a_run_that_compares_nothing_loads_no_framework(pytester):
    """The plugin is in every test run of whoever has the package."""
    pytester.makeini("[pytest]")
    pytester.makepyfile(
        """
        import sys
        def test_nothing(pytestconfig):
            assert pytestconfig.pluginmanager.has_plugin("gam_flax")
            assert "gam_flax.parity.pytest_plugin" in sys.modules
            for name in ("jax", "flax", "torch", "numpy", "matplotlib", "rich"):
                assert name not in sys.modules, name
        """
    )
    plain = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest", "-p", "no:jaxtyping")
    result = pytester.runpytest_subprocess(*plain)
    result.assert_outcomes(passed=1)


def test_it_is_installed_as_a_plugin():
    out = subprocess.run(
        [sys.executable, "-m", "pytest", "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert "--parity-report=DIR" in out.stdout
