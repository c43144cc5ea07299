"""Every layout that circulates: found at any depth, named, ported, and the outputs equal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import gam_flax
from gam_flax.convert import CheckpointError, identify, load_torch
from gam_flax.convert.layouts import UNSEEN, VARIANTS, behaviour, ratio_of
from tests.convert import wild
from tests.paths import DATA

C = 16
WILD = {
    "A": (wild.WildGAM(C), "gam", ("reference", "gated", "grouped", "shuffled"), "reference"),
    "B": (wild.WildGAM(C, gated=True), "gam", None, "gated"),
    "C": (wild.WildGAM(C, group=True, shuffled="gate"), "gam", ("grouped",), "grouped"),
    "C0": (wild.WildGAM(C, shuffled="gate"), "gam", None, "grouped"),
    "D": (wild.WildReplicate(C), "gam", ("replicate",), "replicate"),
    "E": (wild.WildSeed(C), "gam", ("reference",), "reference"),
    "F": (wild.WildGAM(C, gated=True, shuffled="features"), "gam", None, "shuffled"),
    "Jongchan CBAM": (wild.WildCBAM(C), "cbam", ("reference",), "reference"),
    "timm CBAM": (wild.WildTimmCBAM(C), "cbam", ("timm",), "timm"),
    "short CBAM": (wild.WildShortCBAM(C), "cbam", ("plain", "prose"), "plain"),
    "short CBAM, max first": (wild.WildShortCBAM(C, mean_first=False), "cbam", None, "prose"),
    "moskomule SE": (wild.WildSE(C), "se", ("reference",), "reference"),
    "torchvision SE": (wild.WildConvSE(C), "se", ("torchvision", "mobilenet_v3"), "torchvision"),
    "MobileNetV3 SE": (wild.WildConvSE(C, hard=True), "se", None, "mobilenet_v3"),
    "Jongchan BAM": (wild.WildBAM(C), "bam", ("reference",), "reference"),
}
X = np.random.default_rng(0).standard_normal((2, 9, 10, C))


def outputs(name, variant=None, prefix=""):
    """The output of the wild block and of ours, built from what `identify` says."""
    module, kind, _, truth = WILD[name]
    wild.randomize(module)
    state = {prefix + key: value for key, value in module.state_dict().items()}
    (block,) = identify(state)
    with jax.enable_x64(True):
        options = block.arguments(variant or truth)
        ours = gam_flax.create_attention(kind, **options, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
        load_torch(ours, state, variant=variant or truth)
        ours.eval()
        y = np.asarray(ours(jnp.asarray(X)))
    return module(torch.from_numpy(X.transpose(0, 3, 1, 2))).detach().numpy(), y


@pytest.mark.parametrize("name", WILD)
def test_found_and_described(name):
    module, kind, variants, truth = WILD[name]
    whole = nn.ModuleDict({"backbone": nn.Sequential(nn.Conv2d(3, C, 3), module)})
    (block,) = identify(whole.state_dict())
    assert (block.prefix, block.kind, block.channels) == ("backbone.1", kind, C)
    assert block.ratio == 4
    assert block.refusal is None
    assert truth in block.variants
    if variants:
        assert block.variants == variants


@pytest.mark.parametrize("prefix", ["", "model.9.", "module.net.att."])
@pytest.mark.parametrize("name", WILD)
def test_ported_outputs_are_equal(name, prefix):
    theirs, ours = outputs(name, prefix=prefix)
    assert np.abs(theirs - ours.transpose(0, 3, 1, 2)).max() <= 1e-12 * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("A", "gated"), ("B", "reference"), ("C0", "reference"), ("F", "gated")]
    + [("short CBAM", "prose"), ("torchvision SE", "mobilenet_v3")],
)
def test_a_wrong_variant_is_seen_in_the_output(name, wrong):
    theirs, ours = outputs(name, variant=wrong)
    assert np.abs(theirs - ours.transpose(0, 3, 1, 2)).max() > 1e-3 * np.abs(theirs).max()


def test_several_blocks_in_the_order_of_the_file():
    net = nn.Sequential(
        wild.WildSE(C), nn.Conv2d(C, C, 3), wild.WildGAM(C), wild.WildBAM(C), wild.WildCBAM(C)
    )
    found = [(block.prefix, block.kind) for block in identify(net.state_dict())]
    assert found == [("0", "se"), ("2", "gam"), ("3", "bam"), ("4", "cbam")]


def test_sizes_are_read_from_the_shapes():
    (block,) = identify(wild.WildGAM(48, rate=8).state_dict())
    assert (block.channels, block.ratio, block.groups, block.kernel_size) == (48, 8, 1, 7)
    (block,) = identify(wild.WildGAM(64, rate=8, group=True).state_dict())
    assert (block.groups, block.variants, block.families) == (8, ("grouped",), ("C",))
    (block,) = identify(wild.WildGAM(18, rate=3).state_dict())
    assert "shuffled" not in block.variants  # 18 channels do not shuffle in four groups


def test_eps_is_read_from_a_module_and_reported():
    module = wild.WildGAM(C)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eps, norm.momentum = 1e-3, 0.03
    ours = gam_flax.GAM(C, rngs=nnx.Rngs(0))
    report = load_torch(ours, module, variant="reference")
    assert ours.spatial_attention.norm1.eps == 1e-3
    assert ours.spatial_attention.norm2.momentum == 0.03
    assert report.settings["spatial_attention.norm1"][0] == ("eps", 1e-5, 1e-3)


def no_norm():
    state = wild.WildGAM(C).state_dict()
    kept = {k: v for k, v in state.items() if ".1." not in k and ".4." not in k}
    return {k.replace("spatial_attention.3", "spatial_attention.1"): v for k, v in kept.items()}


def one_bias_less():
    return {
        k: v for k, v in wild.WildGAM(C).state_dict().items() if k != "spatial_attention.0.bias"
    }


def conv_1d():
    state = wild.WildGAM(C).state_dict()
    return {k: v[..., 0] if v.ndim == 4 else v for k, v in state.items()}


def parallel():
    return {
        "cam.fc1.weight": torch.zeros(4, C),
        "cam.fc2.weight": torch.zeros(C, 4),
        "sam.conv1.weight": torch.zeros(4, C, 7, 7),
    }


@pytest.mark.parametrize(
    ("state", "word"),
    [
        (wild.UltralyticsCBAM(C).state_dict(), "ultralytics' CBAM"),
        (no_norm(), "without BatchNorm"),
        (one_bias_less(), "has a bias and"),
        (conv_1d(), "not a square odd 2-D kernel"),
        (parallel(), "side by side"),
    ],
    ids=["ultralytics", "no norm", "one bias less", "conv 1d", "parallel"],
)
def test_look_alikes_are_refused_by_name(state, word):
    (block,) = identify({f"model.9.{key}": value for key, value in state.items()})
    assert word in block.refusal
    assert block.variants == ()
    with pytest.raises(CheckpointError, match="model.9"):
        load_torch(gam_flax.GAM(C, rngs=nnx.Rngs(0)), state | {"model.9.x": torch.zeros(1)})


def test_what_is_no_block_is_none():
    net = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 8), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    assert identify(net.state_dict()) == []
    widening = {"mlp.fc1.weight": torch.zeros(64, 16), "mlp.fc2.weight": torch.zeros(16, 64)}
    assert identify(widening) == []  # a transformer's perceptron, not a squeeze


def test_one_block_in_two_layouts_is_refused():
    state = wild.WildGAM(C).state_dict()
    both = state | {"channel_attention.fc1.weight": torch.zeros(4, C)}
    with pytest.raises(CheckpointError, match="channel_attention.fc1"):
        load_torch(gam_flax.GAM(C, rngs=nnx.Rngs(0)), both, variant="reference")


@pytest.mark.parametrize("name", ["mobilenet_v2-b0353104.pth", "resnet20-12fca82f.th"])
def test_real_checkpoints_hold_no_attention(name):
    if not (DATA / name).exists():
        pytest.skip("the folder with other people's checkpoints is not here")
    assert identify(DATA / name) == []


@pytest.mark.parametrize("channels", range(1, 70))
def test_the_ratio_gives_back_the_hidden_channels(channels):
    for hidden in range(1, channels + 1):
        assert int(channels / ratio_of(channels, hidden)) == hidden


def test_unseen_defaults_are_the_constructors():
    import inspect

    blocks = {
        "gam": gam_flax.GAM,
        "cbam": gam_flax.CBAM,
        "se": gam_flax.SqueezeExcitation,
        "bam": gam_flax.BAM,
    }
    for kind, unseen in UNSEEN.items():
        parameters = inspect.signature(blocks[kind].__init__).parameters
        assert unseen == {name: parameters[name].default for name in unseen}
        for variant in VARIANTS[kind]:
            built = blocks[kind].from_variant(variant, 32, rngs=nnx.Rngs(0))
            assert behaviour(kind, variant) == {name: getattr(built, name) for name in unseen}
