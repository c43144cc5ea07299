"""What the harness says of twins that differ, and what it refuses."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx

from gam_flax.parity import compare
from tests.parity.networks import (
    NNXNet,
    X,
    fill,
    first,
    linen_net,
    nnx_net,
    pictures,
    stages,
    torch_net,
)


def test_same_padding_at_stride_2_is_found_in_its_layer():
    model = torch_net()
    x = pictures(side=8)  # at an odd side the two paddings agree
    report = compare(model, nnx_net(model, padding="SAME"), x)
    assert first(report) == ("forward", "conv1", "fail")
    assert "allowed 1.0e-12" in report.first_divergence.note


def test_layers_of_other_shapes_are_rows_that_name_both():
    model = torch_net()
    report = compare(model, nnx_net(model, padding="VALID"), X)
    assert first(report) == ("forward", "conv1", "shape")
    assert report.first_divergence.note == "torch (2, 8, 5, 5), Flax (2, 4, 4, 8)"
    report = compare(model, nnx_net(model, features=8), X)
    assert first(report) == ("parameters", "conv2.weight", "shape")
    assert report.first_divergence.note == "torch (6, 4, 3, 3), Flax (3, 3, 4, 8)"


def test_outputs_of_other_shapes_or_names_diverge_and_end_the_comparison():
    model = torch_net()

    class Headless(NNXNet):
        def __call__(self, x):
            return super().__call__(x)[:, None]

    report = compare(model, fill(Headless(), model), X)
    assert first(report) == ("output", "", "shape") and stages(report)[-1] == "single-step"

    class Wrapped(NNXNet):
        def __call__(self, x):
            return (super().__call__(x),)

    report = compare(model, fill(Wrapped(), model), X)
    assert first(report) == ("output", "", "missing")
    assert [row.path for row in report.rows if row.stage == "output"] == ["", "[0]"]


def test_a_forward_that_breaks_after_a_divergence_is_a_row():
    """Here the convolution shrinks the picture, so that a later sum cannot be formed."""

    class Gate(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)
            self.last = torch.nn.Identity()

        def forward(self, x):
            return self.last(x + self.conv(x))

    class FlaxGate(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(3, 3, (3, 3), padding="VALID", rngs=nnx.Rngs(0))

        def __call__(self, x):
            return x + self.conv(x)

    model = Gate()
    report = compare(model, fill(FlaxGate(), model), X)
    assert first(report) == ("forward", "conv", "shape")
    (raised,) = [row for row in report.rows if row.verdict == "raised"]
    assert "TypeError" in raised.note


def test_a_forward_that_breaks_for_no_visible_reason_raises():
    class Broken(NNXNet):
        def __call__(self, x):
            raise RuntimeError("no such thing")

    model = torch_net()
    with pytest.raises(RuntimeError, match="no such thing"):
        compare(model, fill(Broken(), model), X)
    with pytest.raises(RuntimeError, match="expected input"):
        compare(model, nnx_net(model), X[..., :2])


@pytest.mark.parametrize("where", ["both", "flax", "torch"])
def test_nan_on_one_side_diverges_and_on_both_does_not(where):
    model = torch_net()
    twin = nnx_net(model)
    if where != "torch":
        twin.fc.bias.set_value(twin.fc.bias.get_value().at[1].set(jnp.nan))
    if where != "flax":
        model.fc.bias.data[1] = torch.nan
    report = compare(model, twin, X)
    assert report.ok == (where == "both")
    if where != "both":
        assert first(report) == ("parameters", "fc.bias", "nan")
        verdicts = {(row.stage, row.path): row.verdict for row in report.rows}
        assert verdicts["forward", "fc"] == verdicts["output", ""] == "nan"


def test_infinity_is_equal_to_itself_alone():
    model = torch_net()
    twin = nnx_net(model)
    model.fc.bias.data[1] = torch.inf
    assert first(compare(model, twin, X)) == ("parameters", "fc.bias", "fail")
    twin.fc.bias.set_value(twin.fc.bias.get_value().at[1].set(jnp.inf))
    assert compare(model, twin, X).ok


def test_a_gradient_that_is_cut_off_is_found():
    class Cut(NNXNet):
        def __call__(self, x):
            return super().__call__(jax.lax.stop_gradient(x))

    model = torch_net()
    report = compare(model, fill(Cut(), model), X)
    assert first(report) == ("input gradient", "", "fail")
    assert sum(not row.ok for row in report.rows) == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_less_precision_than_torch_has_is_found(dtype):
    """A layer that works in a narrower type than it is asked to."""

    class Coarse(nnx.Linear):
        def __call__(self, x):
            narrow = jnp.float16 if dtype == "float32" else jnp.float8_e4m3fn
            return super().__call__(x.astype(narrow).astype(x.dtype))

    model = torch.nn.Linear(32, 16)
    twin = fill(Coarse(32, 16, rngs=nnx.Rngs(0)), model)
    x = np.random.default_rng(0).normal(size=(8, 32))
    assert first(compare(model, twin, x, dtype=dtype)) == ("output", "", "fail")
    assert compare(model, twin, x, dtype=dtype, multiple=1e6).ok


# Refusals


class FunctionalDropout(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = torch.nn.Linear(3, 3)

    def forward(self, x):
        x = torch.nn.functional.dropout(x, 0.5)  # whatever the mode: a well-known mistake
        return self.fc(x)


def test_random_forwards_are_refused_by_the_layer_that_draws():
    model, functional = torch_net(dropout=0.5), FunctionalDropout()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="^drop draws random numbers.*train=False"):
        compare(model, nnx_net(model), X, train=True)
    twin = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="^the torch model draws random numbers"):
        compare(functional, twin, X[:, 0, 0])
    assert torch.equal(torch.get_rng_state(), state)
    assert compare(model, nnx_net(model), X).ok  # nothing is drawn in evaluation


def test_a_linen_dropout_is_refused_by_its_name():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x, deterministic=True):
            return linen.Dropout(0.5, name="drop")(linen.Dense(3, name="fc")(x), deterministic)

    model = torch.nn.Sequential()
    model.fc = torch.nn.Linear(3, 3)
    weight, bias = (p.detach().numpy() for p in model.fc.parameters())
    twin = Net(), {"params": {"fc": {"kernel": weight.T, "bias": bias}}}
    assert compare(model, twin, X[:, 0, 0]).ok
    with pytest.raises(ValueError, match="^drop, in Flax, draws random numbers.*to 0.*masks="):
        compare(model, twin, X[:, 0, 0], train=True)


def test_a_dropout_that_flax_alone_applies_is_named():
    model = torch.nn.Sequential()
    model.drop, model.fc = torch.nn.Dropout(0.5), torch.nn.Linear(3, 3)

    class Net(nnx.Module):
        def __init__(self):
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
            self.fc = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.fc(self.drop(x, deterministic=False))

    report = compare(model, fill(Net(), model), X[:, 0, 0])
    assert report.first_divergence.path == "drop"
    assert "Dropout draws" in report.first_divergence.causes[0]


def test_arguments_of_other_kinds_are_refused():
    model = torch_net()
    twin = nnx_net(model)
    with pytest.raises(ValueError, match="dtype must be one of .*'float16'"):
        compare(model, twin, X, dtype="float16")
    with pytest.raises(TypeError, match="torch_model must be a torch.nn.Module, got NNXNet"):
        compare(twin, model, X)
    for wrong in (model, linen_net(model)[0], (1, 2)):
        with pytest.raises(TypeError, match=r"or a pair \(linen module, variables\), got"):
            compare(model, wrong, X)
