"""The harness on networks that are not ours, and on honest twins of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen, nnx

from gam_flax.parity import assert_parity, compare
from tests.parity.networks import (
    OWN_NAMES,
    X,
    fill,
    first,
    linen_net,
    nnx_net,
    pictures,
    stages,
    torch_net,
)

FORWARD = ["parameters", "forward", "output", "single-step"]
STAGES = [*FORWARD, "loss", "input gradient", "gradients"]


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_honest_twins_agree(kind):
    model = torch_net()
    twin = nnx_net(model) if kind == "nnx" else linen_net(model)
    report = assert_parity(model, twin, X)
    assert report.ok and stages(report) == STAGES
    assert [r.path for r in report.rows if r.stage == "forward"] == ["conv1", "norm", "conv2", "fc"]
    assert max(r.max_error for r in report.rows) < 1e-14
    assert {str(item) for item in report.unmatched} == {
        *(f"torch layer {name}" for name in ("relu", "pool", "gap", "flat", "drop")),
        "torch buffer norm.num_batches_tracked",
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_honest_twins_agree_in_narrow_types(dtype):
    model = torch_net()
    report = assert_parity(model, nnx_net(model), X, dtype=dtype)
    assert min(r.flax_error for r in report.rows if r.stage == "forward") > 0
    assert max(r.flax_error for r in report.rows) < {"float32": 1e-5, "bfloat16": 0.5}[dtype]


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_flax_own_batch_norm_keeps_a_biased_variance(kind):
    """And nothing else differs in training."""
    model = torch_net()
    twin = nnx_net(model) if kind == "nnx" else linen_net(model)
    report = compare(model, twin, X, train=True)
    assert first(report) == ("running statistics", "norm.running_var", "fail")
    assert sum(not row.ok for row in report.rows) == 1
    noise = [row.path for row in report.rows if row.verdict == "noise"]
    assert noise == ["conv1.bias"]  # the norm takes it off again


def test_dense_layers_on_vectors_and_sequences():
    model = torch.nn.Sequential()
    model.fc1, model.ln = torch.nn.Linear(4, 6), torch.nn.LayerNorm(6)

    class Net(nnx.Module):
        def __init__(self):
            self.fc1 = nnx.Linear(4, 6, rngs=nnx.Rngs(0))
            self.ln = nnx.LayerNorm(6, epsilon=1e-5, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.ln(self.fc1(x))

    twin = fill(Net(), model)
    for shape in [(3, 4), (3, 5, 4)]:
        assert_parity(model, twin, np.random.default_rng(0).normal(size=shape))


def test_an_embedding_takes_integers_and_has_no_input_gradient():
    model = torch.nn.Sequential()
    model.table = torch.nn.Embedding(11, 4)

    class Net(nnx.Module):
        def __init__(self):
            self.table = nnx.Embed(11, 4, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.table(x)

    twin = Net()
    twin.table.embedding.set_value(jnp.asarray(model.table.weight.detach().numpy()))
    for dtype in ("float64", "float32"):
        report = assert_parity(model, twin, np.array([[1, 7], [10, 1]]), dtype=dtype)
        assert stages(report) == [*FORWARD, "loss", "gradients"]


class Several(torch.nn.Module):
    """Tuples and dictionaries as outputs; a layer called twice, a constant buffer, a 1×1 conv."""

    def __init__(self):
        super().__init__()
        self.inner = Pair()
        self.fc = torch.nn.Conv2d(3, 3, 1)
        self.register_buffer("share", torch.tensor(0.5))

    def forward(self, x):
        y, z = self.inner(self.fc(self.fc(x)))
        return {"y": y * self.share, "more": [z, z.argmax(1)]}


class Pair(torch.nn.Module):
    def forward(self, x):
        return x.mean((2, 3)), torch.sin(x)


class SeveralFlax(nnx.Module):
    def __init__(self):
        self.inner = PairFlax()
        self.fc = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

    def __call__(self, x):
        y, z = self.inner(self.fc(self.fc(x)))
        return {"y": y * 0.5, "more": [z, z.argmax(-1)]}


class PairFlax(nnx.Module):
    def __call__(self, x):
        return x.mean((1, 2)), jnp.sin(x)


def test_structured_outputs_and_repeated_calls_have_a_row_each():
    model, twin = Several(), SeveralFlax()
    twin.fc.kernel.set_value(jnp.asarray(model.fc.weight.detach().numpy()[:, :, 0, 0].T))
    twin.fc.bias.set_value(jnp.asarray(model.fc.bias.detach().numpy()))
    report = assert_parity(model, twin, X)
    paths = [row.path for row in report.rows if row.stage in ("forward", "output")]
    assert paths == ["fc", "fc#2", "inner[0]", "inner[1]", "[y]", "[more][0]", "[more][1]"]
    assert [str(item) for item in report.unmatched] == ["torch buffer share"]


def test_a_linear_over_pictures_is_found_in_either_layout():
    """torch holds them channels last around it; nothing but the numbers tells where H = W = C."""

    class Pixelwise(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(3, 3)

        def forward(self, x):
            return self.fc(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    class Net(nnx.Module):
        def __init__(self):
            self.fc = nnx.Linear(3, 3, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.fc(x)

    model = Pixelwise()
    assert_parity(model, fill(Net(), model), pictures(side=3))


def test_a_model_built_for_a_narrow_type_is_compared_in_the_type_asked_for():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(4, dtype=jnp.bfloat16, name="fc")(x)

    model = torch.nn.Sequential()
    model.fc = torch.nn.Linear(3, 4)
    kernel, bias = (p.detach().numpy() for p in model.fc.parameters())
    variables = {"params": {"fc": {"kernel": kernel.T, "bias": bias}}}
    assert_parity(model, (Net(), variables), X[:, 0, 0])
    twin = nnx.Linear(3, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    twin.kernel.set_value(jnp.asarray(kernel.T))
    twin.bias.set_value(jnp.asarray(bias))
    assert_parity(model.fc, twin, X[:, 0, 0])
    assert twin.dtype == jnp.bfloat16


class Normed(linen.Module):
    deterministic: bool = True

    @linen.compact
    def __call__(self, x):
        return linen.BatchNorm(use_running_average=self.deterministic, name="norm")(x)


@pytest.mark.parametrize("train", [False, True])
def test_linen_modules_hear_of_the_mode_by_an_argument_or_a_field(train):
    model = torch.nn.Sequential()
    model.norm = torch.nn.BatchNorm1d(3)
    variables = Normed().init(jax.random.key(0), X[:, 0, 0])
    report = compare(model, (Normed(), variables), X[:, 0, 0], train=train)
    assert {row.stage for row in report.rows if not row.ok} <= {"running statistics"}
    alone = {kind: leaves["norm"] for kind, leaves in variables.items()}
    report = compare(model.norm, (linen.BatchNorm(), alone), X[:, 0, 0], train=train)
    assert {row.stage for row in report.rows if not row.ok} <= {"running statistics"}


# Names


@pytest.mark.parametrize("rename", [OWN_NAMES, lambda path: OWN_NAMES.get(path, path)])
def test_rename(rename):
    model = torch_net()
    report = assert_parity(model, linen_net(model, own_names=True), X, rename=rename)
    assert [r.path for r in report.rows if r.stage == "forward"] == list(OWN_NAMES)
    assert not compare(model, linen_net(model, own_names=True), X).ok


def test_rename_holds_for_what_lies_under_a_path_and_for_single_tensors():
    inner = torch_net()
    model = torch.nn.Sequential()
    model.body, model.tail = inner, torch.nn.PReLU()

    class Outer(nnx.Module):
        def __init__(self):
            self.trunk = nnx_net(inner)
            self.slope = nnx.Param(jnp.full((1,), 0.25))

        def __call__(self, x):
            y = self.trunk(x)
            return jnp.where(y < 0, self.slope[...] * y, y)

    report = compare(model, Outer(), X, rename={"body": "trunk", "tail.weight": "slope"})
    assert report.ok and "tail.weight" in [row.path for row in report.rows]


def test_parameters_without_a_partner_diverge_on_either_side():
    model = torch_net()
    report = compare(model, nnx_net(model, use_bias=False), X)
    assert first(report) == ("parameters", "fc.bias", "missing")
    assert "torch parameter fc.bias" in map(str, report.unmatched)
    twin = nnx_net(model)
    model.fc.bias = None
    report = compare(model, twin, X)
    assert first(report) == ("parameters", "fc.bias", "missing")
    assert "flax parameter fc.bias" in map(str, report.unmatched)
