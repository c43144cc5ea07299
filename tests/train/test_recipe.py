"""Settings, optimizers and learning rates."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from gam_flax.train import Settings, TrainingError
from gam_flax.train.recipe import learning_rate_schedule, make_optimizer
from gam_flax.train.settings import differences


def rates(steps=200, **settings):
    schedule = learning_rate_schedule(Settings("mnist", **settings), steps)
    return np.array([schedule(step) for step in range(steps)])


def test_cosine_after_a_warm_up():
    found = rates(epochs=20, warmup=2.0, learning_rate=0.4)
    assert found[0] == 0 and found[10] == pytest.approx(0.2) and found[20] == pytest.approx(0.4)
    assert found[110] == pytest.approx(0.2)
    assert found[199] < 1e-4


@pytest.mark.parametrize(
    "name, drops", [("cifar", {60: 0.2, 120: 0.04, 160: 0.008}), ("constant", {})]
)
def test_steps_of_the_papers(name, drops):
    found = rates(epochs=200, schedule=name, learning_rate=1.0)
    expected = np.ones(200)
    for at, factor in drops.items():
        expected[at:] = factor
    assert found == pytest.approx(expected)


def test_imagenet_drops_with_a_warm_up():
    found = rates(90, epochs=90, warmup=5, schedule="imagenet", learning_rate=1.0)
    assert [found[n] for n in (5, 29, 30, 59, 60)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])


def update(settings, params, grads):
    optimizer = make_optimizer(settings, learning_rate_schedule(settings, 100))
    return optimizer.update(grads, optimizer.init(params), params)[0]


def test_sgd_by_hand():
    """Nesterov's first step is lr · (1 + momentum) · g; only kernels decay."""
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}
    grads = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    settings = Settings("mnist", schedule="constant", learning_rate=0.5, weight_decay=0.1)
    found = update(settings, params, grads)
    assert np.asarray(found["bias"]) == pytest.approx(-0.5 * 1.9)
    assert np.asarray(found["kernel"]) == pytest.approx(-0.5 * 1.9 * 1.3)


def test_clipping_comes_before_the_decay():
    params = {"kernel": jnp.full((1, 1), 3.0)}
    settings = Settings(
        "mnist", schedule="constant", learning_rate=1.0, weight_decay=0.1, momentum=0.0, clip=2.0
    )
    found = update(settings, params, {"kernel": jnp.full((1, 1), 50.0)})
    assert np.asarray(found["kernel"]) == pytest.approx(-2.3)


def test_adamw_decays_kernels_alone():
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.full(2, 3.0)}
    grads = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    settings = Settings(
        "mnist", optimizer="adamw", schedule="constant", learning_rate=0.01, weight_decay=0.5
    )
    found = update(settings, params, grads)
    assert np.asarray(found["bias"]) == pytest.approx(-0.01, rel=1e-5)
    assert np.asarray(found["kernel"]) == pytest.approx(-0.01 * 2.5, rel=1e-5)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"data": "imagenet"}, "data imagenet: must be one of fashion-mnist"),
        ({"optimizer": "lion"}, "optimizer lion: must be one of sgd, adamw"),
        ({"epochs": 0}, "epochs 0: must be 1 or more"),
        ({"epochs": 2, "warmup": 2.0}, "warmup 2.0: must be fewer than 2 epochs"),
        ({"batch_size": 10, "accumulate": 3}, "accumulate 3: must be a divisor"),
        ({"label_smoothing": 1.0}, "label-smoothing 1.0: must be at least 0 and below 1"),
        ({"clip": 0.0}, "clip 0.0: must be above 0"),
        ({"learning_rate": -1.0}, "learning-rate -1.0: must be 0 or more"),
        ({"seed": -1}, "seed -1: must be 0 to"),
    ],
)
def test_wrong_settings_are_one_line(wrong, said):
    with pytest.raises(TrainingError) as raised:
        Settings(**{"data": "mnist", **wrong})
    assert str(raised.value).startswith(said)


def test_settings_tell_their_differences():
    text = Settings("mnist", epochs=3, model_options={"widths": (4,)}).to_json()
    assert differences(Settings("mnist", epochs=3, model_options={"widths": [4]}), text) == []
    assert differences(Settings("mnist", epochs=5, model_options={"widths": [4]}), text) == [
        "epochs 5, was 3"
    ]
