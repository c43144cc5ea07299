"""`gam-flax costs` and `gam-flax summary`."""

from __future__ import annotations

import json
import sys

import pytest

from gam_flax import cli, costs


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command in this process; gives status, standard output and error."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["gam-flax", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def rows():
    return [costs.count(cost) for cost in costs.COSTS]


def test_what_agrees_with_the_paper(rows):
    """docs/costs.md has the reasons for what does not."""
    found = [
        (row.cost.network, row.cost.attention, row.parameters_agree, row.multiply_adds_agree)
        for row in rows
    ]
    assert found == [
        ("resnet50", "none", True, True),
        ("resnet50", "SE", True, None),
        ("resnet50", "BAM", True, None),
        ("resnet50", "CBAM", True, None),
        ("resnet50", "GAM r=16", False, False),
        ("resnet18", "none", None, None),
        ("resnet18", "GAM r=16", False, False),
        ("resnet50", "none", None, None),
        ("resnet50_gam_grouped", "GAM r=16", None, None),
    ]
    gam = [row for row in rows if row.parameters_agree is False]
    for row in gam:  # near, though not to the last digit
        assert row.parameters / 1e6 == pytest.approx(float(row.cost.paper_parameters), rel=1e-3)
        assert row.multiply_adds / 1e9 == pytest.approx(
            float(row.cost.paper_multiply_adds), rel=3e-3
        )


def test_what_the_paper_leaves_out_of_gam(rows):
    """Three of GAM's four vectors as long as the channels, as docs/costs.md says."""
    lengths = {"CIFAR-100": (15_104, 944), "ImageNet-1K": (1_920, 120)}  # of all blocks together
    fits = set(range(5))
    for row in rows:
        if row.parameters_agree is False:
            wide, narrow = lengths[row.cost.dataset]
            fits &= {
                count
                for count in range(5)
                for short in range(5)
                if f"{(row.parameters - count * wide - short * narrow) / 1e6:.2f}"
                == row.cost.paper_parameters
            }
    assert fits == {3}


def test_the_digits_that_are_given_decide():
    cost = costs.Cost("resnet8", "", "cifar", 32, 10, paper_parameters="1.30")
    assert costs.Counted(cost, 1_304_999, 0).parameters_agree
    assert not costs.Counted(cost, 1_305_001, 0).parameters_agree
    assert costs.Counted(cost, 1_304_999, 0).multiply_adds_agree is None


def test_costs(run, rows, monkeypatch):
    monkeypatch.setattr(costs, "count", dict(zip(map(id, costs.COSTS), rows, strict=True)).get)
    monkeypatch.setattr(costs, "COSTS", tuple(map(id, costs.COSTS)))  # counted once is enough
    status, out, _ = run("costs")
    assert status == 0
    assert "≠ 149.47" in out and "23.705" in out
    assert max(map(len, out.splitlines())) <= 100
    status, out, _ = run("costs", "--json")
    table = json.loads(out)["rows"]
    assert [row["parameters"] for row in table] == [row.parameters for row in rows]
    assert table[0]["paper_parameters"] == "23.71" and table[0]["parameters_agree"]


def test_summary(run):
    status, out, _ = run("summary", "resnet8", "--attention", "cbam", "--classes", "10")
    assert status == 0
    assert "Linear ×2" in out
    assert out.split("total")[1].split()[:2] == ["ResNet", "1×10"]
    status, out, _ = run("summary", "resnet18", "--stem", "cifar", "--json")
    told = json.loads(out)
    assert told["rows"][1]["output_shape"] == [1, 32, 32, 64]
    status, out, _ = run("summary", "resnet18", "--side", "64", "--json")
    assert json.loads(out)["rows"][1]["output_shape"] == [1, 32, 32, 64]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("resnet19",), "NAME resnet19: must be one of"),
        (("resnet8", "--attention", "eca"), "--attention eca: must be one of bam"),
        (("resnet8", "--stem", "mnist"), "--stem mnist: must be one of imagenet, cifar"),
        (("mobilenet_v2", "--stem", "cifar"), "--stem cifar: "),
        (("resnet8", "--side", "0"), "--side"),
        (("resnet8", "--classes", "0"), "--classes"),
        ((), "name"),
    ],
)
def test_bad_calls_are_one_line_and_status_2(run, words, expected):
    status, out, err = run("summary", *words)
    assert (status, out) == (2, "")
    assert err.startswith("gam-flax: ") and err.count("\n") == 1
    assert expected in err
