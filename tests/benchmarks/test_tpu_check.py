"""What is read out of a compiled program, and what is complained about."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks import compiled_step, scaling, tpu_check
from tests.paths import ROOT

PROGRAM = """
%moved.1 (param_0: bf16[8,14,14,64]) -> bf16[8,14,14,64] {
  %param_0 = bf16[8,14,14,64]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  ROOT %copy.1 = bf16[8,14,14,64]{2,3,1,0:T(8,128)(2,1)} copy(%param_0)
}

%computed (param_0.1: f32[16]) -> f32[16] {
  %param_0.1 = f32[16]{0:T(128)} parameter(0)
  %copy.2 = f32[16]{0:T(128)} copy(%param_0.1)
  ROOT %add.1 = f32[16]{0:T(128)} add(%copy.2, %copy.2)
}

ENTRY %main (a: bf16[8,14,14,64], b: f32[16]) -> f32[16] {
  %a = bf16[8,14,14,64]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %b = f32[16]{0:T(128)} parameter(1)
  %copy_fusion = bf16[8,14,14,64]{2,3,1,0:T(8,128)(2,1)} fusion(%a), kind=kLoop, calls=%moved.1
  %transpose.1 = f32[4,4]{1,0:T(8,128)} transpose(%b), dimensions={1,0}
  %all-gather.1 = bf16[32,14,14,64]{3,2,1,0} all-gather(%a), channel_id=1, dimensions={0}
  %all-gather.2 = f32[3,3,64,64]{3,2,1,0} all-gather(%w), channel_id=2, dimensions={2}
  %all-reduce-start = (f32[16]{0:T(128)}, pred[8]{0}) all-reduce-start(%b, %p), channel_id=3
  ROOT %fusion = f32[16]{0:T(128)} fusion(%b), kind=kLoop, calls=%computed
}
"""


class Program:
    """Stands in for a compiled one."""

    def as_text(self):
        return PROGRAM

    def cost_analysis(self):
        return {"flops": 10.0, "bytes accessed": 1e6}

    def memory_analysis(self):
        numbers = {"argument": 7, "temp": 5, "output": 4, "alias": 3, "generated_code": 2}
        names = {f"{name}_size_in_bytes": number for name, number in numbers.items()}
        return type("Memory", (), names)


def test_figures():
    found = compiled_step.figures(Program(), batch=8)  # type: ignore[arg-type]
    assert found["peak"] == 7 + 5 + 4 - 3 + 2
    assert found["layout_copies"] == 2 * 8 * 14 * 14 * 64 + 4 * 16
    gathered, weights = 2 * 32 * 14 * 14 * 64, 4 * 9 * 64 * 64
    assert found["collectives"] == {
        "all-gather": {"count": 2, "bytes": gathered + weights},
        "all-reduce": {"count": 1, "bytes": 4 * 16 + 8},
    }
    assert found["gathered_activations"] == ["bf16[32,14,14,64]{3,2,1,0}"]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({}, []),
        ({"peak": 20 * 2**30}, ["needs 20.0 GiB, more than the chip has"]),
        ({"gathered_activations": ["bf16[32,1]"]}, ["activations are gathered: bf16[32,1]"]),
        ({"layout_copies": 30}, ["30% of the bytes change layout"]),
    ],
)
def test_complaints(changes, said):
    good = {"peak": 2**30, "gathered_activations": [], "layout_copies": 1, "accessed": 100}
    assert tpu_check.complaints(tpu_check.CASES[0], {**good, **changes}) == said


def test_without_libtpu_it_skips(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tpu_check, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["tpu_check", "--out", str(tmp_path / "found")])
    assert tpu_check.main() == 0
    assert capsys.readouterr().out.startswith("skipped: libtpu is not installed")
    assert not list(tmp_path.iterdir())


def test_what_is_sent():
    """Two devices, by hand: half of each array goes and half comes."""
    assert scaling.sent(100, 0, 5, devices=2) == {
        "gradient": 2 * 100,
        "cut parameters": 0,
        "BatchNorm": 2 * 2 * 5 * 4,
    }
    assert scaling.sent(100, 100, 5, devices=2)["cut parameters"] == 3 * 100
    assert set(scaling.sent(100, 50, 5, devices=1).values()) == {0}


CUT = """
import jax
jax.config.update("jax_num_cpu_devices", 4)
import optax
from benchmarks import scaling
from gam_flax.train.sharding import make_mesh, placed, state_shardings
import jax.numpy as jnp
tree = {"a": jnp.zeros((64, 512)), "b": jnp.zeros(7)}
there = placed(tree, state_shardings(tree, make_mesh(), "sharded"))
here = sum(x.addressable_shards[0].data.nbytes for x in there.values())
assert scaling._local(tree, make_mesh(), "sharded") == (here, 64 * 512), here
assert here == 4 * (64 * 128 + 7)
"""


def test_the_state_of_a_device_is_what_lies_there():
    done = subprocess.run([sys.executable, "-c", CUT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
