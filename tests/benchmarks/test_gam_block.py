"""The tables and pictures of the blocks' benchmark, from made-up numbers; no time is asserted."""

from __future__ import annotations

import json

import pytest
from flax import nnx

from benchmarks import convolution_model, floor, gam_block, growth
from benchmarks.gam_block_inside import WORKS, Work
from benchmarks.gam_block_picture import draw
from gam_flax.ops.convolution import choose

SHAPES = WORKS["training"].shapes
SECONDS = {"flax": 0.1, "eager": 0.3, "channels_last": 0.2, "compile": 0.25}


@pytest.fixture
def kept():
    results = {
        role: {shape: {"median": seconds} for shape in SHAPES} for role, seconds in SECONDS.items()
    }
    machine = {"processor": "P", "cores": 2, "cores_in_use": 2, "memory_gb": 1.0}
    machine |= {"system": "S", "load_average": 0.0}
    record = {
        "date": "2026-01-01",
        "machine": machine,
        "settings": {"rounds": 1, "threads": 2},
        "versions": {},
    }
    return {
        "records": {"training": {**record, "results": results}},
        "alone": {"training": {SHAPES[0]: {"first": 2.0, "cached": 1.0, "memory": 1.5}}},
        "floor": {"products": 4e11, "memory": 5e10, f"training {SHAPES[0]}": 0.02},
    }


def test_flax_is_compared_with_the_fastest_of_torch(kept):
    rows = gam_block.by_work(kept)["training"]
    assert [row["speed"] for row in rows] == [2.0] * len(SHAPES)
    assert rows[0]["possible"] == pytest.approx(0.2)
    assert "possible" not in rows[1]


def test_the_table_and_the_picture(kept, tmp_path):
    text = gam_block.markdown(kept)
    assert "2.00 times as fast in the geometric mean" in text
    line = next(line for line in text.splitlines() if line.startswith(f"| ({SHAPES[0]})"))
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    times = ["100.00", "300.00", "200.00", "250.00"]
    assert cells == [*times, "**2.00**", "2.00", "1.00", "1.50", "20 %"]
    draw(gam_block.by_work(kept), tmp_path / "p.png", said="made up")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_works_that_were_not_measured_again_stay(kept, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(kept))
    new = {"records": {"inference": {}}, "alone": {}, "floor": {"products": 5e11}}
    joined = gam_block.with_older(tmp_path / "r", new, gam_block.SUITE)
    assert list(joined["records"]) == ["inference", "training"]
    assert joined["floor"] == {**kept["floor"], "products": 5e11}
    assert gam_block.with_older(tmp_path / "none", new, gam_block.SUITE) == new


def test_operations_of_a_block():
    """8 channels, ratio 4, one picture of 4 × 4: nothing there is worth a tile."""
    flops, moved = floor.counted(Work("reference", False, ()), (1, 8, 4))
    pixels, pairs = 16, 8 * 2
    assert flops == 2 * pixels * (2 * pairs + 2 * 49 * pairs)
    assert moved == 4 * 2 * (pixels * (8 + 2) + pairs + pixels * (8 + 2) + 49 * pairs)
    step, _ = floor.counted(Work("reference", True, ()), (1, 8, 4))
    assert step == 3 * flops


def test_operations_of_a_network_with_strides():
    """The first layer of a ResNet gives a quarter of the pixels that a stride of 1 would."""
    conv = nnx.Conv(3, 8, (7, 7), strides=2, padding=((3, 3), (3, 3)), rngs=nnx.Rngs(0))
    flops, moved = floor._of_layer(conv, (1, 16, 16, 3), training=False)
    assert flops == 2 * 64 * 49 * 3 * 8
    assert moved == 4 * (256 * 3 + 64 * 8 + 49 * 3 * 8)


def test_an_exponent_is_that_of_a_power():
    assert growth.exponent((2, 4, 8), [3 * 2**1.5, 3 * 4**1.5, 3 * 8**1.5]) == pytest.approx(1.5)


@pytest.mark.parametrize("machine", choose.MACHINES, ids=lambda machine: machine.name)
def test_the_cost_model_is_the_one_that_was_measured(machine):
    """The coefficients in choose.py are those of the recorded measurements."""
    models = convolution_model.fit(convolution_model.recorded(machine.name)[1])
    for name, found in models.items():
        assert getattr(machine, name) == pytest.approx(found["model"], rel=0.01), name
