"""One step against the same step written out; and on meshes of several devices."""

from __future__ import annotations

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gam_flax
from gam_flax.train import Settings
from gam_flax.train.recipe import learning_rate_schedule, make_optimizer
from gam_flax.train.sharding import make_mesh, put_batch
from gam_flax.train.step import make_steps
from tests.train.made import TINY, environment, pictures, run

NORMALIZE = ((0.25,), (0.5,))


def network(name="resnet8", **options):
    usual = {**TINY, "attention": "gam", "stem": "cifar"} if name == "resnet8" else {}
    return gam_flax.create_model(
        name, num_classes=10, in_channels=1, rngs=nnx.Rngs(0), **{**usual, **options}
    )


def compiled(model=None, **settings):
    settings = Settings("mnist", schedule="constant", **settings)
    schedule = learning_rate_schedule(settings, 100)
    optimizer = make_optimizer(settings, schedule)
    return make_steps(model or network(), settings, optimizer, schedule, NORMALIZE, make_mesh())


def batch(count=16, seed=0):
    images, labels = pictures(count, seed=seed)
    return {"image": images, "label": labels.astype(np.int32)}


def flat(state) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(leaf)) for leaf in jax.tree.leaves(state)])


def written_out(smoothing=0.0, parts=1):
    """Loss and gradient of the network on the batch, without anything of `train`."""
    model = network()
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    x, labels = batch()["image"], batch()["label"]

    def loss(params, rest, x, labels):
        net = nnx.merge(graph, params, rest, copy=True)
        logp = jax.nn.log_softmax(net((x / 255.0 - 0.25) / 0.5))
        target = jax.nn.one_hot(labels, 10) * (1 - smoothing) + smoothing / 10
        return -(target * logp).sum(-1).mean(), nnx.state(net, nnx.Not(nnx.Param))

    found = []
    for i in range(parts):
        (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(
            params, rest, jnp.asarray(x[i::parts], jnp.float32), labels[i::parts]
        )
        found.append((float(value), flat(grads)))
    losses, grads = zip(*found, strict=True)
    return np.mean(losses), np.mean(grads, axis=0), params


@pytest.mark.parametrize("smoothing, parts", [(0.0, 1), (0.1, 1), (0.0, 2), (0.0, 4)])
def test_a_step_is_what_it_says(smoothing, parts):
    loss, grads, params = written_out(smoothing, parts)
    steps = compiled(
        label_smoothing=smoothing,
        accumulate=parts,
        learning_rate=0.5,
        momentum=0.0,
        weight_decay=0.0,
    )
    state, metrics = steps.train(steps.initial(), put_batch(batch(), make_mesh()))
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(metrics["gradient_norm"]) == pytest.approx(np.linalg.norm(grads), rel=1e-4)
    assert float(metrics["learning_rate"]) == 0.5
    assert flat(state.params) == pytest.approx(flat(params) - 0.5 * grads, rel=1e-4, abs=1e-6)
    assert int(state.step) == 1


def test_the_average_follows_the_parameters():
    steps = compiled(ema=0.75, learning_rate=0.1)
    state = steps.initial()
    expected = flat(state.params)
    for seed in range(3):
        state, _ = steps.train(state, put_batch(batch(seed=seed), make_mesh()))
        expected = 0.75 * expected + 0.25 * flat(state.params)
    assert flat(state.average) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    evaluated = nnx.state(steps.model(state), nnx.Param)
    assert np.array_equal(flat(evaluated), flat(state.average))


def test_evaluation_counts_only_what_has_weight():
    steps = compiled()
    state = steps.initial()
    whole = {**batch(), "weight": np.ones(16, np.float32)}
    half = {**batch(), "weight": np.repeat([1, 0], 8).astype(np.float32)}
    model = steps.model(state)
    logits = model((jnp.asarray(batch()["image"]) / 255 - 0.25) / 0.5)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch()["label"])
    for given, count in ((whole, 16), (half, 8)):
        found = steps.evaluate(state, put_batch(given, make_mesh()))
        assert float(found["count"]) == count
        assert float(found["loss"]) == pytest.approx(float(each[:count].sum()), rel=1e-5)


def test_bfloat16_keeps_float32_parameters():
    steps = compiled(network(dtype=jnp.bfloat16), dtype="bfloat16", learning_rate=0.01)
    state, metrics = steps.train(steps.initial(), put_batch(batch(), make_mesh()))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.params)} == {"float32"}
    assert float(metrics["loss"]) == pytest.approx(written_out()[0], rel=0.02)


def test_a_bad_batch_changes_nothing_but_the_flag():
    model = network()
    model.conv1.kernel[...] = model.conv1.kernel[...].at[0, 0, 0, 0].set(jnp.inf)
    bad = compiled(model)
    state = bad.initial()
    before = flat(state)
    state, metrics = bad.train(state, put_batch(batch(), make_mesh()))
    assert not bool(metrics["sound"])
    after = state._replace(sound=jnp.ones((), bool))
    assert np.array_equal(flat(after), before, equal_nan=True)


MESH = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
jax.config.update("jax_enable_x64", True)
import numpy as np
import jax.numpy as jnp
import tests.train.test_step as t
from gam_flax.train import sharding

sharding.WORTH_SHARDING = 100
model = t.network(dtype=jnp.float64, param_dtype=jnp.float64, widths=[8])
mesh = t.make_mesh()
assert mesh.size == int(sys.argv[1])
losses = []
settings = {"dtype": "float64", "learning_rate": 0.1, "accumulate": 2, "ema": 0.9}
steps = t.compiled(model, parameters=sys.argv[2], **settings)
state = steps.initial()
for seed in range(5):
    state, metrics = steps.train(state, t.put_batch(t.batch(32, seed), mesh))
    losses.append(float(metrics["loss"]))
cut = sum(not leaf.is_fully_replicated for leaf in jax.tree.leaves(state))
print(json.dumps([losses, cut]))
"""


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return losses_on(1, "replicated", cache)


def losses_on(devices, parameters, cache):
    ran = run([sys.executable, "-c", MESH, str(devices), parameters], environment(cache))
    assert ran.returncode == 0, ran.stderr
    losses, cut = json.loads(ran.stdout)
    assert (cut > 0) == (parameters == "sharded")
    return losses


@pytest.mark.parametrize(
    "devices, parameters",
    [(2, "replicated"), (8, "replicated"), (8, "sharded")],
)
def test_any_number_of_devices_gives_the_same_losses(one_device, devices, parameters, tmp_path):
    """To float64 rounding: statistics and means are over the whole batch."""
    assert losses_on(devices, parameters, tmp_path) == pytest.approx(one_device, rel=1e-12)
