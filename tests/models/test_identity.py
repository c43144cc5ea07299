"""Attention that starts as the identity, in both packages: what it computes, and that it learns."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

import gam_flax
import gam_torch
from gam_flax.attention.identity import start_as_identity as start_in_flax
from gam_flax.attention.variants import BAM_VARIANTS, CBAM_VARIANTS, GAM_VARIANTS, SE_VARIANTS
from gam_flax.convert import load_torch, to_torch
from gam_torch.attention.identity import start_as_identity as start_in_torch
from tests.attention.twins import randomize
from tests.models.real import CLASSES, MOBILENET, batch, checkpoint

C = 16
VARIANTS = {"gam": GAM_VARIANTS, "cbam": CBAM_VARIANTS, "se": SE_VARIANTS, "bam": BAM_VARIANTS}
NEVER = {
    ("gam", "shuffled"): "permutes the channels",
    ("cbam", "timm"): "CBAM has a gate without bias or norm",
    ("cbam", "plain"): "CBAM has a gate without bias or norm",
    ("se", "reference"): "SqueezeExcitation has a gate without bias or norm",
}
ABLE = [(kind, v) for kind, all_ in VARIANTS.items() for v in all_ if (kind, v) not in NEVER]
"""Every documented variant is here or there."""


def factor(kind: str, variant: str, gate: float) -> float:
    """What x is multiplied by: the table in the docstring."""
    if kind == "bam":
        return 2 - gate
    two_sigmoids = kind == "cbam" or (kind, variant) in (("gam", "gated"), ("gam", "paper"))
    return gate**2 if two_sigmoids else gate


def twins(kind: str, **options: Any) -> tuple[torch.nn.Module, nnx.Module]:
    """The same block twice, with no number left at its initial value."""
    theirs = gam_torch.create_attention(kind, C, **options)
    randomize(theirs)
    make = gam_flax.create_attention
    ours = nnx.eval_shape(lambda: make(kind, C, rngs=nnx.Rngs(0), **options))
    load_torch(ours, theirs)
    return theirs, ours


def pictures() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 5, 6, C)).astype(np.float32)


def in_torch(model: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).numpy()


def tensors(model: Any) -> dict[str, bytes]:
    if isinstance(model, nnx.Module):
        return {key: array.tobytes() for key, array in to_torch(model).items()}
    return {key: tensor.numpy().tobytes() for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind, variant", ABLE)
def test_both_twins_become_the_same_and_touch_nothing_else(kind, variant):
    theirs, ours = twins(kind, variant=variant)
    before = tensors(theirs)
    assert start_in_torch(theirs, gate=0.9) is theirs and start_in_flax(ours, gate=0.9) is ours
    after = {key: tensor.numpy() for key, tensor in theirs.state_dict().items()}
    for key, array in to_torch(ours).items():
        assert array.tobytes() == after[key].tobytes(), key
    changed = {key for key, value in tensors(theirs).items() if value != before[key]}
    layers = {key.rpartition(".")[0] for key in changed}
    assert changed == {f"{layer}.{leaf}" for layer in layers for leaf in ("weight", "bias")}
    assert len(layers) == (1 if kind == "se" else 2)


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("gate", [0.75, 0.999])
@pytest.mark.parametrize("kind, variant", ABLE)
def test_it_computes_what_the_table_says(kind, variant, gate, train):
    x = pictures()
    theirs, ours = twins(kind, variant=variant)
    start_in_torch(theirs, gate=gate).train(train)
    start_in_flax(ours, gate=gate).train() if train else start_in_flax(ours, gate=gate).eval()
    expected = x * factor(kind, variant, gate)
    for y in (in_torch(theirs, x), np.asarray(ours(jnp.asarray(x)))):
        np.testing.assert_allclose(y, expected, rtol=2e-6, atol=1e-7)


def test_the_default_gate():
    theirs, ours = twins("se", use_bias=True)
    x = pictures()
    np.testing.assert_allclose(in_torch(start_in_torch(theirs), x), 0.999 * x, rtol=1e-6)
    np.testing.assert_allclose(start_in_flax(ours)(jnp.asarray(x)), 0.999 * x, rtol=1e-6)


@pytest.mark.parametrize(("kind", "variant"), NEVER)
def test_a_block_that_cannot_says_so_and_stays(kind, variant):
    """Also where another block of the model could: nothing is changed."""
    able, other = twins("bam"), twins(kind, variant=variant)
    both = torch.nn.ModuleList([able[0], other[0]]), nnx.List([able[1], other[1]])
    for model, start in zip(both, (start_in_torch, start_in_flax), strict=True):
        before = [tensors(part) for part in model]
        with pytest.raises(ValueError, match=NEVER[kind, variant]):
            start(_holder(model))
        assert [tensors(part) for part in model] == before


def _holder(parts: Any) -> Any:
    """A model that holds them, in the framework that they are of."""
    if isinstance(parts, torch.nn.Module):
        return parts
    model = nnx.Module()
    model.parts = parts
    return model


@pytest.mark.parametrize("gate", [0.5, 1.0, 0.0, 2.0, float("nan")])
def test_gates_that_are_none(gate):
    theirs, ours = twins("bam")
    for model, start in ((theirs, start_in_torch), (ours, start_in_flax)):
        before = tensors(model)
        with pytest.raises(ValueError, match="gate must lie between 0.5 and 1"):
            start(model, gate=gate)
        assert tensors(model) == before


def test_a_model_without_attention():
    with pytest.raises(ValueError, match="no attention block of this package in Linear"):
        start_in_torch(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no attention block of this package in Linear"):
        start_in_flax(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


# It learns


def _gradients(kind: str, variant: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Of Σ sin(y), by torch's keys, in both; in training."""
    theirs, ours = twins(kind, variant=variant, ratio=2)  # so that some hidden channel lives
    x = pictures()
    start_in_torch(theirs, gate=0.9).train()
    theirs(torch.from_numpy(x).permute(0, 3, 1, 2)).sin().sum().backward()
    torch_ones = {key: p.grad.numpy() for key, p in theirs.named_parameters()}
    graph, params, rest = nnx.split(start_in_flax(ours, gate=0.9), nnx.Param, ...)

    @jax.jit
    def gradient(params):
        def loss(params):
            return jnp.sum(jnp.sin(nnx.merge(graph, params, rest, copy=True)(jnp.asarray(x))))

        return jax.grad(loss)(params)

    found = nnx.merge(graph, gradient(params), rest)
    return torch_ones, to_torch(found)


@pytest.mark.parametrize("kind, variant", ABLE)
def test_the_gate_can_learn(kind, variant):
    """The bias and the zeroed kernel or scale have a gradient, the layers before them wait."""
    theirs, ours = _gradients(kind, variant)
    block = gam_torch.create_attention(kind, C, variant=variant)
    before = tensors(block)
    start_in_torch(block)
    moved = {key for key, value in tensors(block).items() if value != before[key]}
    for key in moved | {f"{key.rpartition('.')[0]}.weight" for key in moved}:
        assert np.abs(theirs[key]).max() > 1e-5, key
        assert np.abs(ours[key]).max() > 1e-5, key


# In networks


@pytest.mark.parametrize("name", ["resnet8", "mobilenet_v2"])
@pytest.mark.parametrize("kind, options", [("gam", {"ratio": 4}), ("bam", {"ratio": 4})])
def test_identity_start_of_a_network(name, kind, options):
    """`identity_start=True` is `start_as_identity` of the network, in both packages."""
    sizes = {"width_mult": 0.1} if name == "mobilenet_v2" else {"widths": (8, 8, 8)}
    common = {"attention": kind, "attention_options": options, "num_classes": 3, **sizes}
    torch.manual_seed(0)
    built = gam_torch.create_model(name, identity_start=True, **common)
    torch.manual_seed(0)
    set_later = start_in_torch(gam_torch.create_model(name, **common))
    assert tensors(built) == tensors(set_later) and built.identity_start
    built = gam_flax.create_model(name, identity_start=True, rngs=nnx.Rngs(0), **common)
    set_later = gam_flax.create_model(name, rngs=nnx.Rngs(0), **common)
    assert tensors(built) != tensors(set_later)
    assert tensors(built) == tensors(start_in_flax(set_later)) and built.identity_start


def test_identity_start_that_cannot_be():
    for create, types in (
        (gam_torch.create_model, {}),
        (gam_flax.create_model, {"rngs": nnx.Rngs(0)}),
    ):
        with pytest.raises(ValueError, match="without bias or norm"):
            create("resnet8", attention="se", identity_start=True, **types)


REAL = {
    "se": ({"use_bias": True}, 4),
    "gam": ({"channel_gate": "identity", "kernel_size": 1}, 4),
    "cbam": ({}, 8),
    "bam": ({}, 4),
}
"""Block → its options, and how many times 1 − gate the logits may move, of their scale: they stand
behind 17 blocks. Measured on the photographs: 3.2, 3.2, 6.4 and 3.3."""


@cache
def _real_weights() -> dict[str, torch.Tensor]:
    return torch.load(checkpoint(MOBILENET), weights_only=True)


def real_logits(kind: str | None, gate: float = 0.999) -> np.ndarray:
    """Of the photographs, from the real MobileNetV2 with a block in every inverted residual."""
    options = (
        {"attention": kind, "attention_options": {"ratio": 4, **REAL[kind][0]}} if kind else {}
    )
    model = gam_torch.create_model("mobilenet_v2", **options).eval()
    assert not model.load_state_dict(_real_weights(), strict=False).unexpected_keys
    if kind:
        start_in_torch(model, gate=gate)
    return in_torch_net(model)


def in_torch_net(model: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(batch()).permute(0, 3, 1, 2)).numpy()


def assert_hardly_moved(y: np.ndarray, plain: np.ndarray, limit: float) -> None:
    moved = np.abs(y - plain).max() / np.abs(plain).max()
    assert limit / 4 < moved < limit
    assert dict(zip(CLASSES, y.argmax(-1).tolist(), strict=True)) == CLASSES


@pytest.mark.parametrize(
    "gate", [0.999, *(pytest.param(gate, marks=pytest.mark.slow) for gate in (0.99, 0.9999))]
)
@pytest.mark.parametrize("kind", REAL)
def test_a_real_network_computes_nearly_what_it_did(kind, gate):
    checkpoint(MOBILENET)
    limit = REAL[kind][1] * (1 - gate)
    assert_hardly_moved(real_logits(kind, gate), _plain_logits(), limit)


@cache
def _plain_logits() -> np.ndarray:
    return real_logits(None)


def test_a_real_network_in_flax():
    """`identity_start=True` and a plain backbone around it, as a user would."""
    path = checkpoint(MOBILENET)
    options = {"attention": "se", "attention_options": {"ratio": 4, "use_bias": True}}
    model = gam_flax.create_model("mobilenet_v2", identity_start=True, rngs=nnx.Rngs(0), **options)
    report = load_torch(model, path, keep=["attention"])
    assert report.ok and len(report.kept) == 17
    model.eval()
    y = np.asarray(jax.jit(lambda x: model(x))(batch()))
    assert_hardly_moved(y, _plain_logits(), 4 * (1 - 0.999))
