"""What the harness says of trainings that part: which setting of the optimizer is another."""

from __future__ import annotations

from typing import Any

import jax
import optax
import pytest
import torch

from gam_flax.parity.optimizers import CLIP, Recipe, recipe
from gam_flax.parity.training_causes import explain_training
from tests.parity.networks import X, nnx_net, torch_net
from tests.parity.training import (
    LAY,
    Pair,
    errors,
    nnx_twin,
    one_thread,
)


@pytest.fixture(autouse=True, scope="module")
def quiet():
    with one_thread():
        yield


def explained(pair: Pair) -> tuple[float, tuple[str, ...]]:
    """The largest error, and the causes that were found."""
    own, flax, partners = pair.both()
    causes = explain_training(
        pair.model,
        X,
        own,
        flax,
        optimizer=pair.optimizer,
        train=pair.train,
        partners=partners,
        lay=LAY,
        frozen=pair.frozen,
        loss=pair.loss[0],
    )
    return max(errors(own, flax, partners).values()), causes


def wrong(name: str, transformation: Any, **settings: Any) -> Recipe:
    """torch's half of a recipe, with other settings where wanted, and a wrong half of optax's."""
    right = recipe(name)

    def factory(parameters: list[Any]) -> Any:
        optimizer = right.torch(parameters)
        for group in optimizer.param_groups:
            group.update(settings)
        return optimizer

    return Recipe(factory, transformation, right.clip)


def clipped(limit: float, *then: Any) -> Any:
    return optax.chain(optax.clip_by_global_norm(limit), *then)


def no_decay_on_vectors(parameters: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim > 1, parameters)


ADAM, ADAMW = optax.adam(1e-3), optax.adamw(1e-3, weight_decay=1e-2)
FAULTS: dict[str, tuple[Any, str]] = {
    "nesterov": (
        wrong("nesterov", optax.sgd(1e-2, momentum=0.9)),
        "Nesterov: torch has nesterov=True, Flax's steps are those of nesterov=False",
    ),
    "nesterov in flax": (
        wrong("momentum", optax.sgd(1e-2, momentum=0.9, nesterov=True)),
        "Nesterov: torch has nesterov=False, Flax's steps are those of nesterov=True",
    ),
    "momentum": (
        wrong("momentum", optax.sgd(1e-2)),
        "momentum: torch has momentum=0.9, Flax's steps are those of momentum=0",
    ),
    "dampening": (
        wrong("momentum", optax.sgd(1e-2, momentum=0.9), dampening=0.1),
        "dampening: torch has dampening=0.1, Flax's steps are those of dampening=0",
    ),
    "sign": (
        wrong("sgd", optax.sgd(-1e-2)),
        "sign of the gradient: torch has maximize=False, Flax's steps are those of maximize=True",
    ),
    "learning rate": (
        wrong("adam", optax.adam(1e-2)),
        "learning rate: torch has lr=0.001, Flax's steps are those of lr=0.01",
    ),
    "learning rate of no list": (
        wrong("adam", optax.adam(3.7e-4)),
        "learning rate: torch has lr=0.001, Flax's steps are those of lr=0.00037",
    ),
    "sign, the momentum's too": (
        wrong("momentum", optax.sgd(-1e-2, momentum=0.9)),
        "learning rate: torch has lr=0.01, Flax's steps are those of lr=-0.01 (uphill: the sign of "
        "the gradient)",
    ),
    "eps": (
        wrong("adam", optax.adam(1e-3, eps=1e-7)),
        "Adam's eps: torch has eps=1e-08, Flax's steps are those of eps=1e-07",
    ),
    "eps in the root": (
        wrong("adam", optax.adam(1e-3, eps=0.0, eps_root=1e-8)),
        "Adam's eps: torch has √v + eps with eps=1e-08, Flax's steps are those of √(v + eps)",
    ),
    "eps root": (
        wrong("adam", optax.adam(1e-3, eps_root=1e-10)),
        "Adam's eps: torch has √v + eps with eps=1e-08, Flax's steps are those of "
        "√(v + eps_root) + eps with eps_root=1e-10",
    ),
    "second beta": (
        wrong("adam", optax.adam(1e-3, b2=0.99)),
        "Adam's second beta: torch has beta2=0.999, Flax's steps are those of beta2=0.99",
    ),
    "nadam": (
        wrong("adam", optax.nadam(1e-3)),
        "Nesterov in Adam, NAdam: torch has nesterov=False, Flax's steps are those of "
        "nesterov=True",
    ),
    "decay of optax": (
        wrong("adamw", optax.adamw(1e-3)),
        "weight decay: torch has weight_decay=0.01, Flax's steps are those of weight_decay=0.0001",
    ),
    "l2": (
        wrong("adamw", optax.chain(optax.add_decayed_weights(1e-2), ADAM)),
        "weight decay: torch has decoupled decay (AdamW), Flax's steps are those of decay in the "
        "gradient (L2)",
    ),
    "adamw for l2": (
        wrong("adam", ADAMW, weight_decay=1e-2),
        "weight decay: torch has decay in the gradient (L2), Flax's steps are those of decoupled "
        "decay (AdamW)",
    ),
    "decay after the rate": (
        wrong("adamw", optax.chain(ADAM, optax.add_decayed_weights(-1e-2))),
        "weight decay: torch has decoupled decay (AdamW), Flax's steps are those of weight_decay "
        "· parameter subtracted after the learning rate, so not scaled",
    ),
    "decay of weights alone": (
        wrong("adamw", optax.adamw(1e-3, weight_decay=1e-2, mask=no_decay_on_vectors)),
        "weight decay: torch has it on biases and norms as well, Flax's steps are those of decay "
        "on weights of two axes or more",
    ),
    "no clipping": (
        wrong("adamw+clip", ADAMW),
        "clipping: torch has the gradients' global norm clipped to 0.01, Flax's steps are those "
        "of none",
    ),
    "clipped by value": (
        wrong("adamw+clip", optax.chain(optax.clip(CLIP), ADAMW)),
        "clipping: torch has the gradients' global norm clipped to 0.01, Flax's steps are those "
        "of each gradient's numbers clipped to 0.01",
    ),
    "clipped after": (
        wrong("adamw+clip", optax.chain(ADAMW, optax.clip_by_global_norm(CLIP))),
        "clipping: torch has the gradients' global norm clipped to 0.01, Flax's steps are those "
        "of the update's global norm clipped to 0.01, after the optimizer",
    ),
    "clipped in flax": (
        wrong("momentum", clipped(0.1, optax.sgd(1e-2, momentum=0.9))),
        "clipping: torch has none, Flax's steps are those of the gradients' global norm clipped "
        "to 0.1",
    ),
    "frozen in flax": (
        wrong(
            "adamw",
            optax.partition(
                {"on": ADAMW, "off": optax.set_to_zero()},
                lambda ps: {path: "off" if path == "fc.kernel" else "on" for path in ps},
            ),
        ),
        "trained parameters: fc.weight in torch's optimizer, left as they are by Flax's steps",
    ),
    "left out in torch": (
        (lambda ps: torch.optim.AdamW(ps[:-1], lr=1e-3, weight_decay=1e-2), ADAMW),
        "trained parameters: fc.bias not in torch's optimizer, trained by Flax's steps",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen_and_explained(fault):
    model = torch_net()
    optimizer, cause = FAULTS[fault]
    worst, causes = explained(Pair(model, nnx_twin(model), optimizer, steps=8))
    assert worst > 1e-8
    assert causes == (cause,)


def test_two_causes_that_do_the_same_are_both_named():
    """Where gradients are clipped at every step, half the limit is half the rate."""
    model = torch_net()
    optimizer = wrong("sgd+clip", clipped(0.5 * CLIP, optax.sgd(2e-2)))
    assert explained(Pair(model, nnx_twin(model), optimizer, steps=4)) == (pytest.approx(0), ())
    optimizer = wrong("sgd+clip", clipped(CLIP, optax.sgd(1e-1)))
    _, causes = explained(Pair(model, nnx_twin(model), optimizer, steps=4))
    assert [cause.partition(":")[0] for cause in causes] == ["learning rate", "clipping"]


@pytest.mark.parametrize(
    "optimizer",
    [
        wrong("adam", optax.adam(1e-3, b2=0.42)),
        (lambda ps: torch.optim.RMSprop(ps, lr=1e-3), optax.rmsprop(1e-3)),
        wrong("adam", optax.adam(1e-2, b2=0.99)),
    ],
    ids=["no such value", "no such optimizer", "two at once"],
)
def test_what_nothing_explains_is_not_guessed(optimizer):
    model = torch_net()
    worst, causes = explained(Pair(model, nnx_twin(model), optimizer, steps=4))
    assert worst > 1e-6 and causes == ()


def test_what_torch_does_besides_its_settings_is_not_guessed():
    def factory(parameters: list[Any]) -> Any:
        def double(*_: Any) -> None:
            for parameter in parameters:
                parameter.grad.mul_(2)

        optimizer = torch.optim.SGD(parameters, lr=1e-2)
        optimizer.register_step_pre_hook(double)
        return optimizer

    model = torch_net()
    worst, causes = explained(Pair(model, nnx_twin(model), (factory, optax.sgd(1e-2)), steps=4))
    assert worst > 1e-6 and causes == ()


@pytest.mark.parametrize("optimizer", ["adamw", wrong("adamw", optax.adamw(1e-3))])
def test_statistics_are_explained_by_themselves(optimizer):
    """With a fault of the optimizer or without, which they follow."""
    model = torch_net()
    optimizer_causes = () if optimizer == "adamw" else (FAULTS["decay of optax"][1],)
    twin = nnx_twin(model)
    twin.norm.momentum = 0.01
    momentum = (
        "BatchNorm momentum: torch has momentum=0.1, Flax's statistics are those of momentum=0.01 "
        "(as torch counts; one minus this as Flax does)"
    )
    _, causes = explained(Pair(model, twin, optimizer, steps=5))
    assert causes == (*optimizer_causes, momentum)
    biased = (
        "BatchNorm variance: torch's running variance is the unbiased one, n / (n - 1), Flax's "
        "statistics are those of the biased one"
    )
    twin = nnx_net(model)
    _, causes = explained(Pair(model, twin, optimizer, steps=5))
    assert causes == (*optimizer_causes, biased)
    twin.norm.momentum = 0.99
    _, causes = explained(Pair(model, twin, optimizer, steps=5))
    assert causes == (*optimizer_causes, momentum, biased)
