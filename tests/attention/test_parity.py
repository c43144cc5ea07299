"""What "identical" means, levels 2 and 3, for every block; and that a wrong block is caught."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import lcm
from typing import Any

import jax
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import gam_torch
from gam_flax.attention.variants import BAM_VARIANTS, CBAM_VARIANTS, GAM_VARIANTS, SE_VARIANTS
from gam_flax.ops.batch_norm import RunningStatistics, update
from gam_flax.parity import assert_parity, compare
from gam_torch.attention import se
from tests.attention.twins import TWINS, pictures, torch_block

VARIANTS = {"gam": GAM_VARIANTS, "cbam": CBAM_VARIANTS, "se": SE_VARIANTS, "bam": BAM_VARIANTS}

every_variant = pytest.mark.parametrize(
    "name, variant", [(name, variant) for name, table in VARIANTS.items() for variant in table]
)


def examples(count: int) -> settings:
    """Every example compiles two programs: there are few, and none is spent on shrinking."""
    return settings(
        max_examples=count,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
    )


# Any block that can be built


@st.composite
def gams(draw: st.DrawFn, variant: str) -> tuple[int, dict]:
    options = draw(
        st.fixed_dictionaries(
            {"kernel_size": st.sampled_from([1, 3, 5, 7])},
            optional={
                "groups": st.integers(1, 4),
                "channel_gate": st.sampled_from(["identity", "sigmoid"]),
                "shuffle": st.sampled_from([None, "features", "gate"]),
                "padding_mode": st.sampled_from(["zeros", "replicate"]),
                **NORM,
                "use_bias": st.booleans(),
            },
        )
    )
    given = {**GAM_VARIANTS[variant], **options}
    groups = given.get("groups", 1)
    channels = lcm(groups, 4 if given.get("shuffle") else 1) * draw(st.integers(1, 4))
    ratios = [r for r in RATIOS if (hidden := int(channels / r)) and hidden % groups == 0]
    return channels, {"groups": groups, **options, "ratio": draw(st.sampled_from(ratios))}


@st.composite
def cbams(draw: st.DrawFn, variant: str) -> tuple[int, dict]:
    options = {
        "kernel_size": st.sampled_from([1, 3, 5, 7]),
        "concat": st.sampled_from(["max_mean", "mean_max"]),
        "projection": st.sampled_from(["linear", "conv"]),
        "use_bias": st.booleans(),
        "spatial_norm": st.booleans(),
        "spatial_bias": st.booleans(),
        **NORM,
    }
    return draw(channels_and(options))


@st.composite
def squeezes(draw: st.DrawFn, variant: str) -> tuple[int, dict]:
    options = {
        "projection": st.sampled_from(["linear", "conv"]),
        "use_bias": st.booleans(),
        "gate": st.sampled_from(["sigmoid", "hard_sigmoid"]),
    }
    return draw(channels_and(options))


@st.composite
def bams(draw: st.DrawFn, variant: str) -> tuple[int, dict]:
    options = {
        "dilation": st.integers(1, 4),
        "combine": st.sampled_from(["product", "sum"]),
        "use_bias": st.booleans(),
        **NORM,
    }
    return draw(channels_and(options))


@st.composite
def channels_and(draw: st.DrawFn, options: dict) -> tuple[int, dict]:
    channels = draw(st.integers(1, 16))
    ratio = draw(st.sampled_from([r for r in RATIOS if int(channels / r)]))
    return channels, {**draw(st.fixed_dictionaries({}, optional=options)), "ratio": ratio}


RATIOS = [1, 1.5, 2, 3, 4, 8, 16]
NORM = {
    "norm_eps": st.sampled_from([1e-5, 1e-3]),
    "norm_momentum": st.sampled_from([0.1, 0.03, None]),
}
BLOCKS = {"gam": gams, "cbam": cbams, "se": squeezes, "bam": bams}


@contextmanager
def exact_hard_sigmoid() -> Iterator[None]:
    """torch's own differentiates with 1/6 in float32, in float64 too: off by 3e-8."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(se.GATES, "hard_sigmoid", lambda x: F.relu6(x + 3) / 6)
        yield


def test_torch_differentiates_its_hard_sigmoid_in_float32():
    x = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(F.hardsigmoid(x), x)
    assert 1e-8 < abs(gradient * 6 - 1) < 1e-7


def check_any(data: st.DataObject, name: str, variant: str, **asked: Any) -> None:
    """A block, a picture and a mode that hypothesis draws, in both of Flax's libraries."""
    channels, options = data.draw(BLOCKS[name](variant))
    batch, height, width = data.draw(st.tuples(*[st.integers(1, n) for n in (3, 9, 9)]))
    several = batch > 1 if name == "bam" else batch * height * width > 1
    train = data.draw(st.booleans()) and several  # one value has no variance
    seed = data.draw(st.integers(0, 1000))
    model = torch_block(name, channels, variant=variant, seed=seed, **options)
    x = pictures(batch, height, width, channels, seed=seed)
    for twin in TWINS.values():
        flax = twin(model, name, channels, variant=variant, **options)
        report = assert_parity(model, flax, x, train=train, **asked)
        assert report.unmatched == ()


@every_variant
@examples(3)
@given(data=st.data())
def test_blocks_are_the_same_in_float64(name, variant, data):
    """Level 2: outputs of every layer, gradients and running statistics to 1e-12 of scale."""
    with exact_hard_sigmoid():
        check_any(data, name, variant)


@pytest.mark.slow
@every_variant
@examples(15)
@given(data=st.data())
def test_many_blocks_are_the_same_in_float64(name, variant, data):
    with exact_hard_sigmoid():
        check_any(data, name, variant)


@pytest.mark.slow
@every_variant
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@examples(8)
@given(data=st.data())
def test_many_blocks_are_as_exact_as_torch(name, variant, dtype, data):
    """Level 3, in float32 with its gradients.

    In bfloat16 XLA rounds after every operation and torch after every kernel: a gradient of few
    numbers may be 30 times as far off as torch's.
    """
    check_any(data, name, variant, dtype=dtype, gradients=dtype == "float32")


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_blocks_are_as_exact_as_torch(name, dtype, train):
    """Level 3: the error against float64 is at most four times torch's."""
    model = torch_block(name, 8, ratio=2)
    twin = TWINS["nnx" if train else "linen"](model, name, 8, ratio=2)
    report = assert_parity(model, twin, pictures(2, 6, 5, 8), train=train, dtype=dtype)
    assert {row.stage for row in report.rows} >= {"forward", "output", "gradients"}


# Wrong blocks


@dataclass(frozen=True)
class Fault:
    """A Flax block that is wrong in one point, and the first row that has to say so.

    block, options: of the torch block, 8 channels.
    flax_options: what the Flax block is built with instead; it has the same weights.
    edit: changes the weights that the Flax block gets.
    update: what a BatchNorm does in training instead.
    train: the mode in which it shows.
    """

    stage: str
    path: str
    block: str = "gam"
    options: dict[str, Any] = field(default_factory=dict)
    flax_options: dict[str, Any] = field(default_factory=dict)
    edit: Callable[[dict[str, torch.Tensor]], Any] = lambda state: None
    update: Callable[..., Any] | None = None
    train: bool = False
    verdict: str = "fail"


def swap_norms(state: dict[str, torch.Tensor]) -> None:
    for key in [key for key in state if ".norm1." in key]:
        first, second = state[key], state[key.replace("norm1", "norm2")]
        kept = first.clone()
        first.copy_(second)
        second.copy_(kept)


def change(key: str, new: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict], Any]:
    return lambda state: state[key].copy_(new(state[key]).clone())


def one_off(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.clone()
    weight.view(-1)[17] *= 1 + 1e-9
    return weight


def biased(running: RunningStatistics, x: Any, momentum: float) -> tuple:
    mean, var, after = update(running, x, momentum)
    return mean, var, after._replace(var=(1 - momentum) * running.var + momentum * var)


def detached(running: RunningStatistics, x: Any, momentum: float) -> tuple:
    return jax.lax.stop_gradient(update(running, x, momentum))


CONV1, CONV2 = "spatial_attention.conv1.weight", "spatial_attention.conv2.weight"
SQUARE = {"ratio": 1, "kernel_size": 3}
FAULTS = {
    "transposed linear kernel": Fault(
        "parameters",
        "channel_attention.fc1.weight",
        options=SQUARE,
        edit=change("channel_attention.fc1.weight", lambda w: w.T),
    ),
    "transposed convolution kernel": Fault(
        "parameters", CONV1, options=SQUARE, edit=change(CONV1, lambda w: w.mT)
    ),
    "flipped kernel": Fault("parameters", CONV1, edit=change(CONV1, lambda w: w.flip(2, 3))),
    "one channel off": Fault("parameters", CONV1, edit=change(CONV1, lambda w: w.roll(1, 0))),
    "one weight off by 1e-9": Fault("parameters", CONV2, edit=change(CONV2, one_off)),
    "swapped norms": Fault(
        "parameters", "spatial_attention.norm1.weight", options=SQUARE, edit=swap_norms
    ),
    "running mean not loaded": Fault(
        "parameters",
        "spatial_attention.norm2.running_mean",
        edit=change("spatial_attention.norm2.running_mean", torch.zeros_like),
    ),
    "batches miscounted": Fault(
        "parameters",
        "spatial_attention.norm1.num_batches_tracked",
        edit=change("spatial_attention.norm1.num_batches_tracked", lambda n: n + 1),
    ),
    "no bias": Fault(
        "parameters",
        "channel_attention.fc1.bias",
        flax_options={"use_bias": False},
        verdict="missing",
    ),
    "another kernel size": Fault(
        "parameters", CONV1, flax_options={"kernel_size": 5}, verdict="shape"
    ),
    "no sigmoid": Fault(
        "forward", "channel_attention", "gam", {"variant": "gated"}, {"channel_gate": "identity"}
    ),
    "another padding": Fault(
        "forward",
        "spatial_attention.conv1",
        options={"variant": "replicate"},
        flax_options={"padding_mode": "zeros"},
    ),
    "features not shuffled": Fault(
        "single-step",
        "spatial_attention (input)",
        options={"variant": "shuffled"},
        flax_options={"shuffle": None},
    ),
    "gate not shuffled": Fault("output", "", "gam", {"shuffle": "gate"}, {"shuffle": None}),
    "another eps": Fault("forward", "spatial_attention.norm1", flax_options={"norm_eps": 1e-3}),
    "swapped concat": Fault(
        "single-step", "spatial_attention.conv (input)", "cbam", {}, {"concat": "mean_max"}
    ),
    "sum for product": Fault("output", "", "bam", {}, {"combine": "sum"}),
    "another dilation": Fault("forward", "spatial_attention.conv2", "bam", {}, {"dilation": 2}),
    "another gate": Fault("output", "", "se", {}, {"gate": "hard_sigmoid"}),
    "another momentum": Fault(
        "running statistics",
        "spatial_attention.norm1.running_mean",
        flax_options={"norm_momentum": 0.01},
        train=True,
    ),
    "biased running variance": Fault(
        "running statistics", "spatial_attention.norm1.running_var", update=biased, train=True
    ),
    "statistics not differentiated": Fault(
        "gradients", "spatial_attention.conv2.bias", update=detached, train=True
    ),
}


# The faults are in the weights and in torch's block: what finds them is the same for both kinds.
@pytest.mark.parametrize("kind", ["nnx", pytest.param("linen", marks=pytest.mark.slow)])
@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_wrong_block_is_caught_at_the_right_place(monkeypatch, kind, fault):
    common = {"ratio": 2, **fault.options}
    options = {**common, **fault.flax_options}
    model = torch_block(fault.block, 8, **common).double()
    faulty = gam_torch.create_attention(fault.block, 8, **options).double()
    state, given = faulty.state_dict(), model.state_dict()
    for key in state.keys() & given.keys():
        if state[key].shape == given[key].shape:
            state[key].copy_(given[key])
    fault.edit(state)
    if fault.update:
        monkeypatch.setattr("gam_flax.ops.batch_norm.update", fault.update)
        monkeypatch.setattr("gam_flax.linen.batch_norm.update", fault.update)
    twin = TWINS[kind](faulty, fault.block, 8, **options)
    report = compare(
        model, twin, pictures(2, 5, 4, 8), train=fault.train, gradients="grad" in fault.stage
    )
    first = report.first_divergence
    assert not report.ok and first is not None
    found = first.stage, first.path, first.verdict
    assert found == (fault.stage, fault.path, fault.verdict), str(found)
