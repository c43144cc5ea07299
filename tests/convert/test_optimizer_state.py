"""Optimizer state there and back, the ways to give it, and what is said where it does not fit."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from gam_flax.convert import CheckpointError, load_torch_optimizer, to_torch_optimizer
from tests.convert.optimizers import RECIPES, in_optax
from tests.convert.training import Net, torch_net


@pytest.fixture(autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


# There and back


def drawn(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Three steps on gradients out of the air."""
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
@pytest.mark.parametrize("name", RECIPES)
def test_there_and_back_is_every_byte(name, dtype):
    recipe = RECIPES[name]
    theirs = torch_net(getattr(torch, dtype))
    optimizer = recipe.torch(theirs)
    drawn(theirs, optimizer)
    ours = Net(getattr(jnp, dtype))
    state = in_optax(name).init(nnx.state(ours, nnx.Param))
    state = load_torch_optimizer(state, ours, optimizer, names=theirs, step=3)
    back = to_torch_optimizer(state, ours, optimizer, names=theirs, step=3)
    expected = optimizer.state_dict()
    assert back["param_groups"] == expected["param_groups"]
    expected = {i: entry for i, entry in expected["state"].items() if entry}
    assert back["state"].keys() == expected.keys()
    for index, entry in expected.items():
        assert back["state"][index].keys() == entry.keys()
        for key, tensor in entry.items():
            found = back["state"][index][key]
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert tensor_bytes(found) == tensor_bytes(tensor)
    again = load_torch_optimizer(state, ours, back, names=names_of(theirs, optimizer), step=3)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    same = jax.tree.map(lambda a, b: a.tobytes() == b.tobytes(), again, state)
    assert all(jax.tree.leaves(same))


def names_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """In the order of the groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def test_tensors_are_copies():
    model, optimizer = adam()
    state = load_torch_optimizer(optax_state(optax.adam(1.0)), LINEAR, optimizer, names=model)
    before = np.array(state[0].mu["bias"])
    drawn(model, optimizer)
    assert (np.asarray(state[0].mu["bias"]) == before).all()


# Ways in


def linear() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(3, 2)


LINEAR = {"kernel": np.zeros((3, 2), np.float32), "bias": np.zeros(2, np.float32)}
NAMES = ["weight", "bias"]


def optax_state(tx: optax.GradientTransformation) -> Any:
    return tx.init(jax.tree.map(jnp.asarray, LINEAR))


def adam(kind: Any = torch.optim.Adam, **settings: Any):
    """A linear layer and its optimizer after three steps."""
    model = linear()
    optimizer = kind(model.parameters(), lr=0.1, **settings)
    drawn(model, optimizer)
    return model, optimizer


def test_names_come_in_four_ways(tmp_path):
    model, optimizer = adam()
    named = torch.optim.Adam(model.named_parameters())
    named.load_state_dict(
        {**optimizer.state_dict(), "param_groups": named.state_dict()["param_groups"]}
    )
    torch.save({"optimizer": named.state_dict()}, tmp_path / "last.pt")
    saved = torch.load(tmp_path / "last.pt", weights_only=True)["optimizer"]
    state = optax_state(optax.adam(0.1))
    fills = [
        load_torch_optimizer(state, LINEAR, optimizer, names=model),
        load_torch_optimizer(state, LINEAR, optimizer, names=NAMES),
        load_torch_optimizer(state, LINEAR, optimizer.state_dict(), names=model),
        load_torch_optimizer(state, {"params": LINEAR}, named),
        load_torch_optimizer(state, LINEAR, saved),
        load_torch_optimizer(state, LINEAR, saved, names=["module.weight", "module.bias"]),
    ]
    for filled in fills:
        assert filled[0].count == 3 and filled[0].count.dtype == jnp.int32
        kernel = optimizer.state[model.weight]["exp_avg"].numpy().T
        assert (np.asarray(filled[0].mu["kernel"]) == kernel).all()
        assert filled[0].mu["kernel"].dtype == jnp.float32


def test_shapes_are_enough():
    model, optimizer = adam()
    shapes = jax.eval_shape(optax.adam(0.1, mu_dtype=jnp.bfloat16).init, LINEAR)
    filled = load_torch_optimizer(shapes, LINEAR, optimizer, names=model)
    assert filled[0].mu["kernel"].dtype == jnp.bfloat16
    assert filled[0].nu["kernel"].dtype == jnp.float32


@pytest.mark.parametrize("kind", [torch.optim.Adam, partial(torch.optim.SGD, momentum=0.9)])
def test_before_the_first_step_all_is_zero(kind):
    model = linear()
    tx = optax.adam(0.1) if kind is torch.optim.Adam else optax.sgd(lambda n: 0.1, momentum=0.9)
    dirty = jax.tree.map(lambda leaf: leaf + 1, optax_state(tx))
    filled = load_torch_optimizer(dirty, LINEAR, kind(model.parameters(), lr=0.1), names=model)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(filled))


def freezing(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    return optax.partition(
        {"train": tx, "freeze": optax.set_to_zero()}, {"kernel": "train", "bias": "freeze"}
    )


def test_what_is_frozen_on_both_sides_is_no_matter():
    model = linear()
    model.bias.requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    state = optax_state(freezing(optax.adam(0.1)))
    for source in (optimizer, optimizer.state_dict()):
        filled = load_torch_optimizer(state, LINEAR, source, names=model)
        back = to_torch_optimizer(filled, LINEAR, source, names=model)
        assert back["state"].keys() == {0} and back["state"][0]["step"] == 1


# What does not fit is said in one line


SGD, SGDM = torch.optim.SGD, partial(torch.optim.SGD, momentum=0.9)
RMS = torch.optim.RMSprop


@pytest.mark.parametrize(
    "kind, tx, said",
    [
        (SGDM, optax.sgd(0.1), "torch keeps momentum_buffer, the optax state does not"),
        (SGD, optax.sgd(0.1, 0.9), "the optax state keeps momentum_buffer, torch does not"),
        (torch.optim.Adam, optax.sgd(0.1, 0.9), "torch keeps exp_avg, exp_avg_sq, the optax"),
        (SGD, optax.sgd(lambda n: 0.1), "say how many with step="),
        (SGDM, optax.sgd(lambda n: 0.1, momentum=0.9), "say how many with step="),
        (partial(torch.optim.Adam, amsgrad=True), optax.amsgrad(0.1), "before its bias correct"),
        (torch.optim.Adam, optax.amsgrad(0.1), "ScaleByAmsgradState.* after its bias correction"),
        (torch.optim.Adam, optax.lion(0.1), "ScaleByLionState, which has no counterpart"),
        (SGDM, optax.chain(optax.ema(0.9), optax.sgd(0.1)), "EmaState"),
        (torch.optim.Adam, optax.MultiSteps(optax.adam(0.1), 2), "MultiStepsState"),
        (partial(RMS, momentum=0.9), optax.rmsprop(0.1, momentum=0.9), "RMSprop with momentum"),
        (torch.optim.NAdam, optax.nadam(0.1), "none of SGD, Adam, AdamW and RMSprop"),
        (torch.optim.Adamax, optax.adamax(0.1), "none of SGD, Adam, AdamW and RMSprop"),
        (torch.optim.Adam, optax.chain(optax.adam(1.0), optax.adam(1.0)), "exp_avg twice"),
        (torch.optim.Adam, freezing(optax.adam(0.1)), "bias: torch keeps exp_avg, exp_avg_sq"),
    ],
)
def test_the_kinds_must_agree(kind, tx, said):
    model, optimizer = adam(kind)
    state = tx.init(LINEAR)
    for call in (load_torch_optimizer, to_torch_optimizer):
        if call is to_torch_optimizer and "step=" in said:
            continue  # torch counts less than optax: nothing is wanting
        with pytest.raises(CheckpointError, match=said) as caught:
            call(state, LINEAR, optimizer, names=model)
        assert "\n" not in str(caught.value)


def no_tensor(saved: dict) -> None:
    saved["state"][0]["exp_avg"] = "x"


def one_step_more(saved: dict) -> None:
    saved["state"][1]["step"] = torch.tensor(4.0)


def half_a_step(saved: dict) -> None:
    saved["state"][1]["step"] = torch.tensor(3.5)


def many_steps(saved: dict) -> None:
    saved["state"][1]["step"] = torch.ones(2)


def another_key(saved: dict) -> None:
    saved["state"][0]["exp_inf"] = saved["state"][0].pop("exp_avg")


def a_key_less(saved: dict) -> None:
    del saved["state"][0]["exp_avg_sq"]


def not_transposed(saved: dict) -> None:
    saved["state"][0] = {k: v.T if v.ndim else v for k, v in saved["state"][0].items()}


def another_shape(saved: dict) -> None:
    saved["state"][1]["exp_avg_sq"] = torch.ones(3)


def one_untrained(saved: dict) -> None:
    del saved["state"][1]


def stray(saved: dict) -> None:
    saved["state"][7] = saved["state"].pop(0)


def no_groups(saved: dict) -> None:
    del saved["param_groups"]


def foreign_groups(saved: dict) -> None:
    saved["param_groups"][0]["params"] = ["weight", "bias"]


def foreign_state(saved: dict) -> None:
    saved["state"][0] = 5


@pytest.mark.parametrize(
    "fault, said",
    [
        (no_tensor, "weight: exp_avg of the torch state is no tensor"),
        (one_step_more, "weight has taken 3 steps in torch and bias 4, where one count"),
        (half_a_step, "bias: step of the torch state is no number of steps"),
        (many_steps, "bias: step of the torch state is no number of steps"),
        (another_key, "weight: the torch state has exp_avg_sq, exp_inf, step, where"),
        (a_key_less, "weight: the torch state has exp_avg, step, where"),
        (not_transposed, r"weight is \(3, 2\), expected \(2, 3\)"),
        (another_shape, r"bias exp_avg_sq of the torch state is \(3,\), expected \(2,\)"),
        (one_untrained, "bias has taken 0 steps in torch and weight 3"),
        (stray, "the torch state has parameter 7 in no group"),
        (no_groups, "is no torch optimizer: give the optimizer or its state_dict"),
        (foreign_groups, "is no torch optimizer"),
        (foreign_state, "weight: its torch state is a int"),
    ],
)
def test_a_broken_state_dict_is_refused(fault, said):
    _, optimizer = adam()
    saved = optimizer.state_dict()
    saved["state"] = {index: dict(entry) for index, entry in saved["state"].items()}
    fault(saved)
    with pytest.raises(CheckpointError, match=said):
        load_torch_optimizer(optax_state(optax.adam(0.1)), LINEAR, saved, names=NAMES)


@pytest.mark.parametrize(
    "names, said",
    [
        (None, "does not name its parameters: give names"),
        (["weight"], "has 2 parameters, and 1 names are given"),
        (["weight", "weight"], "has 2 parameters, and 2 names are given, 1 of them different"),
        ("weight", "1 names"),
        ([1, 2], "not all strings"),
        (["weight", "fc.bias"], "fc.bias is in the torch optimizer, not among the parameters"),
        (["bias", "weight"], r"bias is \(2, 3\), expected \(2,\)"),
        (torch.nn.Linear(3, 2), "not of the model given as names"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_names_must_fit(names, said):
    _, optimizer = adam()
    for call in (load_torch_optimizer, to_torch_optimizer):
        with pytest.raises(CheckpointError, match=said):
            call(optax_state(optax.adam(0.1)), LINEAR, optimizer, names=names)


def test_a_model_does_not_name_two_saved_groups():
    model = linear()
    saved = torch.optim.Adam([{"params": [model.bias]}, {"params": [model.weight]}]).state_dict()
    with pytest.raises(CheckpointError, match="2 groups, and a model does not tell"):
        load_torch_optimizer(optax_state(optax.adam(0.1)), LINEAR, saved, names=model)


def test_a_parameter_on_one_side_only():
    model, optimizer = adam()
    small = {"kernel": LINEAR["kernel"]}
    state = optax.adam(0.1).init(small)
    with pytest.raises(CheckpointError, match="bias is in the torch optimizer, not among the par"):
        load_torch_optimizer(state, small, optimizer, names=model)
    with pytest.raises(CheckpointError, match="bias: torch keeps exp_avg, exp_avg_sq, the optax"):
        load_torch_optimizer(state, LINEAR, optimizer, names=model)
    half = torch.optim.Adam([model.weight])
    with pytest.raises(CheckpointError, match="bias is in the optax state, not in the torch opt"):
        load_torch_optimizer(optax_state(optax.adam(0.1)), LINEAR, half, names=model)
    with pytest.raises(CheckpointError, match="bias is in the optax state, not among the param"):
        load_torch_optimizer(optax_state(optax.adam(0.1)), small, half, names=model)


def test_rmsprop_asks_for_the_steps():
    model, optimizer = adam(RMS)
    state = load_torch_optimizer(optax_state(optax.rmsprop(0.1)), LINEAR, optimizer, names=model)
    with pytest.raises(
        CheckpointError, match="weight: torch counts steps where optax does not|bias"
    ):
        to_torch_optimizer(state, LINEAR, optimizer, names=model)


def test_nothing_changes_when_it_does_not_fit():
    model, optimizer = adam()
    ours = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    mine = nnx.Optimizer(ours, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
    before = jax.tree.map(np.array, nnx.state(mine))
    with pytest.raises(CheckpointError):
        load_torch_optimizer(mine, ours, optimizer, names=model)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(mine), before)
