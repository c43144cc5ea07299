"""Dropout with a given mask is compared as everything else, in training."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx
from torch import nn

from gam_flax.convert import load_torch
from gam_flax.parity import compare

X = np.random.default_rng(0).normal(size=(3, 6, 5, 3))
PIXELS = np.random.default_rng(1).integers(0, 2, (3, 6, 5, 4))
CHANNELS = np.random.default_rng(2).integers(0, 2, (3, 1, 1, 4))
FEATURES = np.random.default_rng(3).integers(0, 2, (3, 4))
MASKS = {"pixels": PIXELS, "channels": CHANNELS, "features": FEATURES}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
        self.pixels, self.channels = nn.Dropout(0.25), nn.Dropout2d(0.5)
        self.features = nn.Dropout(0.1)

    def forward(self, x):
        x = self.channels(torch.tanh(self.pixels(self.conv(x))))
        return self.fc(self.features(x.mean((2, 3))))


class FlaxNet(nnx.Module):
    def __init__(self, p: float = 0.1):
        rngs = nnx.Rngs(0)
        self.conv, self.fc = nnx.Conv(3, 4, (1, 1), rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
        self.pixels = nnx.Dropout(0.25, rngs=rngs)
        self.channels = nnx.Dropout(0.5, broadcast_dims=(1, 2), rngs=rngs)
        self.features = nnx.Dropout(p, rngs=rngs)

    def __call__(self, x):
        x = self.channels(jnp.tanh(self.pixels(self.conv(x))))
        return self.fc(self.features(x.mean((1, 2))))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool = False):
        x = linen.Conv(4, (1, 1), name="conv")(x)
        x = jnp.tanh(linen.Dropout(0.25, deterministic=not train, name="pixels")(x))
        x = linen.Dropout(0.5, deterministic=not train, name="channels")(x).mean((1, 2))
        return linen.Dense(2, name="fc")(linen.Dropout(0.1, name="features")(x, not train))


def twins(**options):
    torch.manual_seed(0)
    model, twin = Net(), FlaxNet(**options)
    load_torch(twin, model)
    return model, twin


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_given_masks_align_dropout(dtype):
    report = compare(*twins(), X, dtype=dtype, train=True, steps=2, masks=MASKS)
    assert report.ok, str(report)
    assert {"pixels", "channels", "features"} <= {r.path for r in report.rows}
    assert compare(*twins(), X, dtype=dtype, masks=MASKS).ok  # nothing in evaluation


def test_linen_takes_them_too():
    model, _ = twins()
    parameters = {
        "conv": {"kernel": model.conv.weight.permute(2, 3, 1, 0), "bias": model.conv.bias},
        "fc": {"kernel": model.fc.weight.T, "bias": model.fc.bias},
    }
    variables = {"params": jax.tree.map(lambda t: jnp.array(t.detach().numpy()), parameters)}
    assert compare(model, (LinenNet(), variables), X, train=True, masks=MASKS).ok


def test_another_rate_and_a_missing_dropout_are_found():
    model, twin = twins(p=0.2)
    first = compare(model, twin, X, train=True, masks=MASKS).first_divergence
    assert first.path == "features"

    class Without(FlaxNet):
        def __call__(self, x):
            x = self.channels(jnp.tanh(self.pixels(self.conv(x))))
            return self.fc(x.mean((1, 2)))

    twin = Without()
    load_torch(twin, model)
    first = compare(model, twin, X, train=True, masks=MASKS).first_divergence
    assert first.path == "fc (input)"


def test_without_a_mask_dropout_is_refused():
    with pytest.raises(ValueError, match=r"features draws random numbers.*\(masks=\)"):
        compare(*twins(), X, train=True, masks={k: MASKS[k] for k in ("pixels", "channels")})


def test_masks_that_fit_nothing_are_refused():
    with pytest.raises(ValueError, match="masks= names 'pixel'.*did you mean pixels"):
        compare(*twins(), X, train=True, masks={**MASKS, "pixel": PIXELS})
    with pytest.raises(ValueError, match="masks= names 'fc', which has no probability"):
        compare(*twins(), X, train=True, masks={**MASKS, "fc": FEATURES})
    with pytest.raises(ValueError, match=r"mask of shape \(4, 3\) does not fit torch's tensor"):
        compare(*twins(), X, train=True, masks={**MASKS, "features": FEATURES.T})
