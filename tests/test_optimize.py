"""`optimize_for_inference`: the same answers, from fewer layers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gam_flax
from gam_flax.convert import CheckpointError, load, save
from gam_flax.ops import BatchNorm
from gam_flax.ops.convolution import choose
from gam_flax.ops.convolution.prepared import PreparedConv
from gam_flax.optimize import FoldedConv, Identity

SHAPE = (2, 14, 14, 64)


def random_model(make, seed=0, dtype=jnp.float32):
    """A model in evaluation whose norms are not the identity."""
    model = make(rngs=nnx.Rngs(seed), param_dtype=dtype)
    rng = np.random.default_rng(seed)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, BatchNorm):
            size = module.num_features
            module.mean[...] = jnp.asarray(rng.standard_normal(size), module.mean.dtype)
            module.var[...] = jnp.asarray(rng.uniform(0.5, 2, size), module.var.dtype)
            module.scale[...] = jnp.asarray(rng.uniform(0.5, 2, size), dtype)
            module.bias[...] = jnp.asarray(rng.standard_normal(size), dtype)
    model.eval()
    return model


def pictures(shape=SHAPE, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(7).standard_normal(shape).astype(dtype))


def answer(model, x):
    return jax.jit(lambda x: model(x))(x)


def kinds(model):
    return [type(module) for _, module in nnx.iter_modules(model)]


@pytest.fixture
def eager_choice(monkeypatch):
    """Prepares whatever can be, also in sizes that a test has time for."""
    monkeypatch.setitem(choose.MARGINS, "prepared", (1e9, 1e9))


MODELS = {
    "gam": (lambda **k: gam_flax.GAM(64, **k), SHAPE),
    "gam-grouped": (lambda **k: gam_flax.GAM.from_variant("grouped", 64, **k), SHAPE),
    "gam-replicate": (lambda **k: gam_flax.GAM.from_variant("replicate", 64, **k), SHAPE),
    "cbam": (lambda **k: gam_flax.CBAM(64, **k), SHAPE),
    "bam": (lambda **k: gam_flax.BAM(64, **k), SHAPE),
    "resnet8": (
        lambda **k: gam_flax.create_model("resnet8", attention="gam", num_classes=10, **k),
        (2, 32, 32, 3),
    ),
    "mobilenet_v2": (
        lambda **k: gam_flax.create_model("mobilenet_v2", num_classes=10, **k),
        (2, 32, 32, 3),
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name == "mobilenet_v2")) for name in MODELS],
)
def test_in_float64_the_answers_are_the_same(name, eager_choice):
    make, shape = MODELS[name]
    with jax.enable_x64(True):
        model = random_model(make, dtype=jnp.float64)
        x = pictures(shape, np.float64)
        expected = answer(model, x)
        for input_shape in (None, shape):
            optimized = gam_flax.optimize_for_inference(model, input_shape)
            y = answer(optimized, x)
            assert jnp.abs(y - expected).max() < 1e-12 * jnp.abs(expected).max()


@pytest.mark.parametrize("name", ["gam", "gam-grouped"])
def test_in_float32_it_is_as_exact_as_the_plain_model(name, eager_choice):
    make, shape = MODELS[name]
    with jax.enable_x64(True):
        exact = random_model(make, dtype=jnp.float64)(pictures(shape, np.float64))
        exact = np.asarray(exact)
    model = random_model(make)
    optimized = gam_flax.optimize_for_inference(model, shape)
    x = pictures(shape)

    def error(model):
        return np.sqrt(np.mean((np.asarray(model(x), np.float64) - exact) ** 2))

    unit = np.finfo(np.float32).eps * np.abs(exact).max()
    assert error(optimized) <= 4 * error(model) + unit


def test_what_it_replaces(eager_choice):
    model = random_model(MODELS["gam"][0])
    folded = gam_flax.optimize_for_inference(model)
    assert kinds(folded).count(FoldedConv) == kinds(folded).count(Identity) == 2
    assert BatchNorm not in kinds(folded)
    prepared = gam_flax.optimize_for_inference(model, SHAPE)
    assert kinds(prepared).count(PreparedConv) == 2
    assert kinds(model).count(BatchNorm) == 2, "the model itself was changed"


@pytest.mark.parametrize("memory", [0, 17e6, math.inf])
def test_spectra_take_no_more_memory_than_they_may(memory):
    model = random_model(lambda **k: gam_flax.create_attention("gam", 128, **k))
    optimized = gam_flax.optimize_for_inference(model, (8, 28, 28, 128), memory=memory)
    spectra = [
        sum(one.nbytes for one in module.spectra.values())
        for _, module in nnx.iter_modules(optimized)
        if isinstance(module, PreparedConv)
    ]
    assert len(spectra) == {0: 0, 17e6: 1, math.inf: 2}[memory]
    assert sum(spectra) <= memory
    assert (sum(spectra) > 17e6) == (memory == math.inf), "what may be used is worth using"


def test_a_norm_before_its_convolution_stays():
    class PreActivation(nnx.Module):
        def __init__(self, rngs):
            self.bn1 = BatchNorm(4)
            self.conv1 = nnx.Conv(4, 4, (3, 3), rngs=rngs)

        def __call__(self, x):
            return self.conv1(self.bn1(x))

    optimized = gam_flax.optimize_for_inference(PreActivation(nnx.Rngs(0)))
    assert BatchNorm in kinds(optimized)


def test_other_sizes_and_batches_still_go(eager_choice):
    model = random_model(MODELS["gam"][0])
    optimized = gam_flax.optimize_for_inference(model, SHAPE)
    for shape in [(5, 7, 9, 64), (2, 30, 17, 64)]:
        x = pictures(shape)
        np.testing.assert_allclose(optimized(x), model(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["gam", "gam-grouped", "resnet8"])
@pytest.mark.parametrize("sized", [False, True])
def test_saved_and_loaded_it_answers_bit_for_bit(name, sized, tmp_path, eager_choice):
    make, shape = MODELS[name]
    optimized = gam_flax.optimize_for_inference(random_model(make), shape if sized else None)
    save(optimized, tmp_path / "model.safetensors")
    again = load(tmp_path / "model.safetensors")
    x = pictures(shape)
    np.testing.assert_array_equal(answer(again, x), answer(optimized, x))


@pytest.mark.parametrize(
    "optimized, says",
    [
        ("[]", "do not say how the model was optimized"),
        ('{"channel_attention.fc1": {}}', "channel_attention.fc1 is no BatchNorm"),
        ('{"nowhere": {"bias": true}}', "nowhere is no Conv"),
        ("{}", "save the optimized model again"),
    ],
)
def test_a_wrong_file_is_one_line(optimized, says, tmp_path):
    model = gam_flax.optimize_for_inference(random_model(MODELS["gam"][0]))
    path = tmp_path / "model.safetensors"
    save(model, path)
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    with safe_open(path, "np") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, {**metadata, "optimized": optimized})
    with pytest.raises(CheckpointError, match=says) as error:
        load(path)
    assert "\n" not in str(error.value)


def test_it_is_jitted_and_exported(eager_choice):
    model = random_model(MODELS["gam"][0])
    optimized = gam_flax.optimize_for_inference(model, SHAPE)
    graph, state = nnx.split(optimized)

    @jax.jit
    def pure_answer(state, x):
        return nnx.merge(graph, state)(x)

    x = pictures()
    pure = nnx.to_pure_dict(state)

    def of_dict(pure, x):
        state = nnx.state(optimized)
        nnx.replace_by_pure_dict(state, pure)
        return nnx.merge(graph, state)(x)

    exported = jax.export.export(jax.jit(of_dict))(pure, x)
    again = jax.export.deserialize(exported.serialize())
    np.testing.assert_allclose(again.call(pure, x), pure_answer(state, x), rtol=0, atol=1e-6)
