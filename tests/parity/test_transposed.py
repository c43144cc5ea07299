"""Transposed convolutions: torch's kernel in Flax's two layouts, of the harness and of convert."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen, nnx

from gam_flax.convert import (
    load_torch,
    load_torch_linen,
    load_torch_optimizer,
    save,
    to_torch,
    to_torch_optimizer,
)
from gam_flax.parity import compare

RNG = np.random.default_rng(0)
SETTINGS = [  # kernel, stride, padding, output padding, dilation, of one axis and the next
    ((4, 3), (2, 1), (1, 0), (0, 0), (1, 1)),
    ((3, 3), (2, 2), (1, 1), (1, 1), (1, 1)),
    ((2, 3), (3, 1), (0, 2), (1, 0), (1, 2)),
]


def flax_padding(kernel, padding, extra, dilation):
    """What Flax calls the padding of torch's transposed convolution."""
    reach = [d * (k - 1) - p for k, p, d in zip(kernel, padding, dilation, strict=True)]
    return tuple((r, r + e) for r, e in zip(reach, extra, strict=True))


class Sequence(torch.nn.Module):
    """An input of three axes is the same in both frameworks."""

    def forward(self, x):
        return self.up(x.transpose(1, 2)).transpose(1, 2)


def pair(space=2, transpose_kernel=False, channels=(3, 3), setting=SETTINGS[0]):
    """A torch model of one layer `up`, and its twin without its weights."""
    kernel, stride, padding, extra, dilation = (part[:1] * space for part in setting)
    if space == 2:
        kernel, stride, padding, extra, dilation = setting
    layer = getattr(torch.nn, f"ConvTranspose{space}d")
    torch.manual_seed(0)
    model = torch.nn.Sequential() if space > 1 else Sequence()
    model.up = layer(*channels, kernel, stride, padding, extra, dilation=dilation)

    class Net(nnx.Module):
        def __init__(self):
            self.up = nnx.ConvTranspose(
                *channels,
                kernel,
                stride,
                padding=flax_padding(kernel, padding, extra, dilation),
                kernel_dilation=dilation,
                transpose_kernel=transpose_kernel,
                rngs=nnx.Rngs(0),
            )

        def __call__(self, x):
            return self.up(x)

    return model, Net(), RNG.normal(size=(2, *range(5, 5 + space), channels[0]))


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("channels", [(3, 3), (3, 5)], ids=["square", "other"])
def test_an_honest_twin_agrees_and_comes_back_bit_for_bit(transpose_kernel, setting, channels):
    model, twin, x = pair(2, transpose_kernel, channels, setting)
    load_torch(twin, model)
    report = compare(model, twin, x, steps=2, optimizer="adam")
    assert report.ok, str(report)
    state = {key: tensor.numpy() for key, tensor in model.state_dict().items()}
    back = to_torch(twin)
    assert all(np.array_equal(back[key], array) for key, array in state.items())


@pytest.mark.parametrize("space", [1, 3])
@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_of_one_and_three_axes(space, transpose_kernel):
    model, twin, x = pair(space, transpose_kernel)
    load_torch(twin, model)
    assert compare(model, twin, x).ok


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_in_linen_the_layer_is_asked_too(transpose_kernel):
    """Variables do not tell the two layouts apart, the module does when it is called."""
    model, twin, x = pair(2, transpose_kernel)
    load_torch(twin, model)

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            padding = twin.up.padding
            return linen.ConvTranspose(
                3, (4, 3), (2, 1), padding, transpose_kernel=transpose_kernel, name="up"
            )(x)

    variables = {"params": {"up": {n: getattr(twin.up, n)[...] for n in ("kernel", "bias")}}}
    assert compare(model, (Net(), variables), x).ok
    flipped = variables["params"]["up"] | {"kernel": twin.up.kernel[...][::-1, ::-1]}
    report = compare(model, (Net(), {"params": {"up": flipped}}), x)
    assert report.first_divergence.path == "up.weight"
    assert "flipped" in report.first_divergence.causes[0]
    filled, found = load_torch_linen(variables, model)
    honest = compare(model, (Net(), filled), x)
    assert honest.ok == transpose_kernel and "transpose_kernel=True" in found.notes[0]


@pytest.mark.parametrize("transpose_kernel", [False, True])
def test_a_square_kernel_left_as_the_other_layout_has_it_is_caught(transpose_kernel):
    model, twin, x = pair(2, transpose_kernel)
    load_torch(twin, model)
    kernel = twin.up.kernel[...]
    twin.up.kernel.set_value(kernel[::-1, ::-1].swapaxes(2, 3))
    first = compare(model, twin, x).first_divergence
    assert first.path == "up.weight" and "transposed kernel" in first.causes[0]


@pytest.mark.parametrize(
    ("padding", "named"), [("SAME", "'SAME'"), (((1, 1), (0, 0)), "as Flax counts it")]
)
def test_another_padding_is_named(padding, named):
    model, twin, x = pair(2, setting=SETTINGS[0] if named[0] == "a" else SETTINGS[1])
    load_torch(twin, model)
    twin.up.padding = padding
    first = compare(model, twin, x).first_divergence
    assert first.path == "up" and any(named in cause for cause in first.causes)


def test_a_file_remembers_how_its_kernels_lie(tmp_path):
    model, twin, _ = pair()
    load_torch(twin, model)
    save(twin, tmp_path / "net.safetensors")
    for transpose_kernel in (False, True):
        _, other, _ = pair(2, transpose_kernel)
        load_torch(other, tmp_path / "net.safetensors")
        kernel = to_torch(other)["up.weight"]
        assert np.array_equal(kernel, model.up.weight.detach().numpy())


def test_the_state_of_an_optimizer_is_laid_out_as_the_kernel():
    model, twin, x = pair()
    load_torch(twin, model)
    theirs = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.from_numpy(np.moveaxis(x, -1, 1)).float()).square().mean().backward()
    theirs.step()
    ours = nnx.Optimizer(twin, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    grads = nnx.grad(lambda net: jnp.square(net(jnp.asarray(x, jnp.float32))).mean())(twin)
    load_torch_optimizer(ours, twin, theirs, names=model)
    moment = ours.opt_state[0].trace["up"]["kernel"][...]
    wanted = grads["up"]["kernel"][...]
    assert jnp.abs(moment - wanted).max() <= 1e-5 * jnp.abs(wanted).max()
    back = to_torch_optimizer(ours, twin, theirs, names=model)
    buffer = theirs.state[model.up.weight]["momentum_buffer"]
    assert torch.equal(back["state"][0]["momentum_buffer"], buffer)
    assert isinstance(moment, jax.Array)
