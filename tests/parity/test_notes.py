"""What a report says beside its rows: what was not seen, and what could not show."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import linen, nnx
from torch import nn

from gam_flax.convert import load_torch
from gam_flax.parity import ParityReport, compare

V = np.random.default_rng(0).normal(size=(6, 6))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


class FlaxTwo(nnx.Module):
    def __init__(self):
        self.body = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(6, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return self.head(jnp.tanh(self.body(x)))


class JittedTwo(FlaxTwo):
    __call__ = nnx.jit(FlaxTwo.__call__)


class LinenTwo(linen.Module):
    narrow: bool = True

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(6, name="body", dtype=jnp.bfloat16 if self.narrow else None)(x)
        return linen.Dense(3, name="head")(jnp.tanh(x))


def twins(flax: type = FlaxTwo):
    torch.manual_seed(0)
    model, twin = Two(), flax()
    load_torch(twin, model)
    return model, twin


def test_an_honest_pair_has_no_notes():
    assert compare(*twins(), V).notes == ()


def test_layers_inside_a_jit_are_told_to_be_unseen():
    report = compare(*twins(JittedTwo), V, dtype="float32")
    (note,) = report.notes
    assert report.ok and note.startswith("Flax: body, head: not seen to be called")
    assert note in str(report) and note in report.to_markdown()
    assert ParityReport.from_json(report.to_json()) == report


def test_a_head_of_zeros_is_told_to_hide_what_is_before_it():
    model, twin = twins()
    nn.init.zeros_(model.head.weight)
    load_torch(twin, model)
    (note,) = compare(model, twin, V).notes
    assert "2 of 4 parameters are zero on both sides (body.weight, body.bias)" in note


def test_a_layer_that_computes_in_fewer_bits_by_itself_is_told():
    model, twin = twins()
    twin.body.dtype = jnp.bfloat16
    report = compare(model, twin, V, dtype="float32")
    assert report.ok and report.notes == (
        "Flax: body: computes in bfloat16 as it stands (dtype=), in float32 here",
    )
    assert compare(model, twin, V, dtype="bfloat16").notes == ()


def test_a_linen_layer_too():
    model, _ = twins()
    leaves = {
        name: {"kernel": jnp.array(layer.weight.detach().numpy().T), "bias": _bias(layer)}
        for name, layer in (("body", model.body), ("head", model.head))
    }
    for narrow in (True, False):
        report = compare(model, (LinenTwo(narrow), {"params": leaves}), V)
        assert report.ok and len(report.notes) == narrow


def _bias(layer: nn.Linear) -> jax.Array:
    return jnp.array(layer.bias.detach().numpy())
