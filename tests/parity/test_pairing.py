"""What is paired with what: calls of a shared layer, buffers with parameters, outputs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

from gam_flax.convert import load_torch
from gam_flax.parity import compare
from gam_flax.parity.comparison import one_array

V = np.random.default_rng(0).normal(size=(4, 6))
X = np.random.default_rng(1).normal(size=(2, 5, 5, 3))


def linear(inputs: int, outputs: int) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, rngs=nnx.Rngs(0))


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Linear(6, 5), nn.Linear(10, 2)

    def forward(self, x):
        return self.head(torch.relu(torch.cat([self.encoder(x), self.encoder(-x)], 1)))


class FlaxSiamese(nnx.Module):
    def __init__(self, exchanged: bool):
        self.encoder, self.head, self.exchanged = linear(6, 5), linear(10, 2), exchanged

    def __call__(self, x):
        second, first = self.encoder(-x), self.encoder(x)
        parts = [second, first] if self.exchanged else [first, second]
        return self.head(jax.nn.relu(jnp.concatenate(parts, -1)))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_calls_of_a_shared_layer_are_paired_by_what_they_are_given(dtype):
    torch.manual_seed(0)
    model = Siamese()
    twin, wrong = FlaxSiamese(exchanged=False), FlaxSiamese(exchanged=True)
    load_torch(twin, model)
    load_torch(wrong, model)
    assert compare(model, twin, V, dtype=dtype).ok
    first = compare(model, wrong, V, dtype=dtype).first_divergence
    assert first.path == "head (input)"
    assert any("concat" in cause for cause in first.causes)


class Frozen(nn.Module):
    """torchvision's FrozenBatchNorm2d: all four are buffers."""

    def __init__(self):
        super().__init__()
        for name, low in (("weight", 0.5), ("bias", -1.0), ("running_mean", -1.0)):
            self.register_buffer(name, torch.rand(3) + low)
        self.register_buffer("running_var", torch.rand(3) + 0.5)

    def forward(self, x):
        scale, shift = (self.running_var + 1e-5).rsqrt() * self.weight, self.bias
        return (x - self.running_mean[:, None, None]) * scale[:, None, None] + shift[:, None, None]


def frozen_twins() -> tuple[nn.Module, nnx.Module]:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("norm", Frozen())
    model.add_module("conv", nn.Conv2d(3, 2, 1))

    class Net(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(3, epsilon=1e-5, rngs=nnx.Rngs(0))
            self.conv = nnx.Conv(3, 2, (1, 1), rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.conv(self.norm(x))

    twin = Net()
    for variable, tensor in (
        (twin.norm.scale, model.norm.weight),
        (twin.norm.bias, model.norm.bias),
        (twin.norm.mean, model.norm.running_mean),
        (twin.norm.var, model.norm.running_var),
        (twin.conv.kernel, model.conv.weight.permute(2, 3, 1, 0)),
        (twin.conv.bias, model.conv.bias),
    ):
        variable.set_value(jnp.array(tensor.detach().numpy()))
    return model, twin


def test_a_buffer_may_be_a_parameter_on_the_other_side():
    model, twin = frozen_twins()
    report = compare(model, twin, X, steps=2)  # a buffer is not trained
    assert report.ok and not report.unmatched
    twin.norm.scale.set_value(2 * twin.norm.scale.get_value())
    first = compare(model, twin, X).first_divergence
    assert (first.stage, first.path) == ("parameters", "norm.weight")


class Attention(nn.Module):
    """Gives what it computed and what a caller may want to see."""

    def __init__(self, more: Any):
        super().__init__()
        self.fc, self.more = nn.Linear(6, 6), more

    def forward(self, x):
        y = self.fc(x)
        return y, (y.softmax(-1) if self.more else None)


class Calling(nn.Module):
    def __init__(self, more: Any):
        super().__init__()
        self.attention, self.head = Attention(more), nn.Linear(6, 2)

    def forward(self, x):
        return self.head(self.attention(x)[0])


class FlaxAttention(nnx.Module):
    def __init__(self, factor: float):
        self.fc, self.factor = linear(6, 6), factor

    def __call__(self, x):
        return self.factor * self.fc(x)


class FlaxCalling(nnx.Module):
    def __init__(self, factor: float = 1.0):
        self.attention, self.head = FlaxAttention(factor), linear(6, 2)

    def __call__(self, x):
        return self.head(self.attention(x))


@pytest.mark.parametrize("more", [None, True])
def test_an_output_with_more_beside_it_is_paired_with_the_output_alone(more):
    model, twin, wrong = Calling(more), FlaxCalling(), FlaxCalling(2.0)
    load_torch(twin, model)
    load_torch(wrong, model)
    assert compare(model, twin, V).ok
    assert compare(model, wrong, V).first_divergence.path == "attention" + "[0]" * bool(more)


class Maps(nn.Module):
    """(B, H, N, N), which is no picture, and a picture."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.conv(x)
        tokens = y.mean(3)
        return torch.einsum("bci,bcj->bij", tokens, tokens)[:, None].repeat(1, 5, 1, 1).sin(), y


class FlaxMaps(nnx.Module):
    def __init__(self, axes: str):
        self.conv, self.axes = nnx.Conv(3, 3, (1, 1), rngs=nnx.Rngs(0)), axes

    def __call__(self, x):
        y = self.conv(x)
        tokens = y.mean(2)
        maps = jnp.einsum("bic,bjc->bij", tokens, tokens)
        heads = maps[:, None] * jnp.linspace(1, 2, 5)[:, None, None] if self.axes else maps[:, None]
        return jnp.sin(jnp.tile(heads, (1, 5 // heads.shape[1], 1, 1))), y


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_maps_as_outputs_are_compared_as_they_stand(dtype):
    model = Maps()
    twin, wrong = FlaxMaps(axes=""), FlaxMaps(axes="heads")
    load_torch(twin, model)
    load_torch(wrong, model)
    report = compare(model, twin, X, dtype=dtype, steps=2)
    assert report.ok, str(report)
    assert compare(model, wrong, X, dtype=dtype).first_divergence.path == "[0]"


def test_layout_reaches_an_output():
    class Turned(FlaxMaps):
        def __call__(self, x):
            maps, picture = super().__call__(x)
            return maps, picture.swapaxes(1, 2)

    model, twin = Maps(), Turned(axes="")
    load_torch(twin, model)
    assert not compare(model, twin, X).ok
    said = {"[1]": lambda y: y.transpose(0, 3, 2, 1)}
    assert compare(model, twin, X, layout=said, steps=1).ok
    with pytest.raises(ValueError, match=r"layout= of the output '\[1\]' must only move"):
        compare(model, twin, X, layout={"[1]": lambda y: 0 * y.transpose(0, 3, 2, 1)})


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(torch.tanh(self.conv(x)).mean((2, 3)))


class FlaxPooled(nnx.Module):
    """With relu for tanh; and it raises in a layer, or between two."""

    def __init__(self, inside: bool):
        self.conv, self.fc = nnx.Conv(3, 4, (1, 1), rngs=nnx.Rngs(0)), linear(4, 2)
        self.inside = inside
        if inside:
            self.fc.promote_dtype = self._raise

    def _raise(self, *args, **kwargs):
        raise TypeError("shapes do not fit")

    def __call__(self, x):
        y = self.fc(jax.nn.relu(self.conv(x)).mean((1, 2)))
        return y if self.inside else self._raise()


@pytest.mark.parametrize("inside", [True, False])
def test_a_forward_that_breaks_off_keeps_its_single_steps(inside):
    model, twin = Pooled(), FlaxPooled(inside)
    load_torch(twin, model)
    report = compare(model, twin, X)
    steps = {row.path: row.ok for row in report.rows if row.stage == "single-step"}
    what_goes_on = {"": True} if inside else {"fc": True}
    assert steps == {"conv (input)": True, "conv": True, "fc (input)": False} | what_goes_on
    assert report.first_divergence.path == "fc (input)"
    assert any("relu" in cause for cause in report.first_divergence.causes)


def test_names_that_the_model_has_not_are_refused():
    model, twin = Calling(None), FlaxCalling()
    with pytest.raises(ValueError, match=r"rename= names 'atention'.*did you mean attention"):
        compare(model, twin, V, rename={"atention": "attention"})
    with pytest.raises(ValueError, match="layout= names 'nobody', which the torch model has not"):
        compare(model, twin, V, layout={"nobody": np.asarray})
    load_torch(twin, model)
    kept = {"attention.fc.weight": np.transpose, "head (input)": np.asarray, "": np.asarray}
    assert compare(model, twin, V, layout=kept).ok


def test_inputs_that_a_model_cannot_take_are_told_of():
    model, twin = frozen_twins()
    for wrong in ((X, X), [X, X[:1]]):
        with pytest.raises(ValueError, match=r"got a (tuple|list) of 2: wrap both models"):
            one_array(wrong)
    assert one_array(torch.ones(2, requires_grad=True)).tolist() == [1, 1]
    with pytest.raises(RuntimeError) as caught:
        compare(model, twin, X.transpose(0, 3, 1, 2))
    (note,) = caught.value.__notes__
    assert note.startswith("inputs of shape (2, 3, 5, 5), taken as channels last")
