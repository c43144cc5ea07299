"""PyTorch weights into Flax models and back: exact, complete, and said where it is not."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax import nnx
from safetensors.numpy import save_file

import gam_flax
import gam_torch
from gam_flax import linen
from gam_flax.attention.variants import (
    BAM_VARIANTS,
    CBAM_VARIANTS,
    GAM_VARIANTS,
    SE_VARIANTS,
)
from gam_flax.convert import CheckpointError, load_torch, load_torch_linen, to_torch
from tests.convert.wild import WildGAM, randomize

C = 16
EVERY = [
    (kind, variant)
    for kind, variants in (
        ("gam", GAM_VARIANTS),
        ("cbam", CBAM_VARIANTS),
        ("se", SE_VARIANTS),
        ("bam", BAM_VARIANTS),
    )
    for variant in variants
]
JAX_DTYPE = {
    torch.float16: jnp.float16,
    torch.bfloat16: jnp.bfloat16,
    torch.float32: jnp.float32,
    torch.float64: jnp.float64,
}


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def assert_same_bytes(ours: dict[str, np.ndarray], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert ours[key].shape == tuple(tensor.shape), key
        assert f"torch.{ours[key].dtype}" == str(tensor.dtype), key
        assert ours[key].tobytes() == tensor_bytes(tensor), key


@pytest.mark.parametrize("dtype", JAX_DTYPE, ids=str)
@pytest.mark.parametrize(("kind", "variant"), EVERY)
def test_there_and_back_is_every_byte(kind, variant, dtype):
    theirs = gam_torch.create_attention(kind, C, variant=variant)
    randomize(theirs).to(dtype)
    with jax.enable_x64(dtype == torch.float64):
        types = {"param_dtype": JAX_DTYPE[dtype]}
        ours = gam_flax.create_attention(kind, C, variant=variant, rngs=nnx.Rngs(0), **types)
        report = load_torch(ours, theirs)
        assert report.ok
        assert_same_bytes(to_torch(ours), theirs.state_dict())

        module = linen.create_attention(kind, variant=variant, **types)
        variables = module.init(jax.random.key(0), jnp.zeros((1, 4, 4, C)))
        variables, report = load_torch_linen(variables, theirs)
        assert report.ok
        assert_same_bytes(to_torch(variables), theirs.state_dict())


def test_a_network_there_and_back():
    options = {"attention": "gam", "attention_at": (2, 3), "num_classes": 7}
    theirs = gam_torch.create_model("resnet8", **options)
    ours = gam_flax.create_model("resnet8", rngs=nnx.Rngs(0), **options)
    load_torch(ours, theirs)
    assert_same_bytes(to_torch(ours), theirs.state_dict())
    state = {key: torch.tensor(value) for key, value in to_torch(ours).items()}
    gam_torch.create_model("resnet8", **options).load_state_dict(state, strict=True)


def test_trained_half_precision_statistics_lose_nothing():
    ours = gam_flax.GAM(C, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    ours.spatial_attention.norm1.mean[...] = jnp.full(4, 1 / 3, jnp.float32)
    assert to_torch(ours)["spatial_attention.norm1.running_mean"].dtype == np.float32


def gam(**options):
    return gam_flax.GAM(C, rngs=nnx.Rngs(0), **options)


def test_ambiguous_weights_ask():
    state = gam_torch.GAM(C).state_dict()
    with pytest.raises(CheckpointError, match="reference or gated or grouped or shuffled"):
        load_torch(gam(), state)
    with pytest.raises(CheckpointError, match="variant"):
        load_torch(gam(), state, strict=False)
    variables = linen.GAM().init(jax.random.key(0), jnp.zeros((1, 4, 4, C)))
    with pytest.raises(CheckpointError, match="variant"):
        load_torch_linen(variables, state)
    assert load_torch(gam(), state, variant="reference").variants == {"": "reference"}
    assert load_torch(gam(), state, variant={"gam": "reference"}).ok


def test_the_model_must_be_built_as_the_variant():
    state = gam_torch.GAM(C).state_dict()
    with pytest.raises(CheckpointError, match="channel_gate='identity' instead of 'sigmoid'"):
        load_torch(gam(), state, variant="gated")
    with pytest.raises(CheckpointError, match="built as 'gated'"):
        load_torch(gam(channel_gate="sigmoid"), gam_torch.GAM(C))  # a live module says it itself
    assert load_torch(gam(channel_gate="sigmoid"), state, variant="paper").ok  # gated, by r = 16


def test_a_combination_without_a_name_goes_over():
    options = {"channel_gate": "sigmoid", "shuffle": "gate", "padding_mode": "replicate"}
    theirs, ours = gam_torch.GAM(C, **options), gam(**options)
    report = load_torch(ours, theirs)
    assert report.variants == {"": "custom"}
    with pytest.raises(CheckpointError, match="is 'custom'.*padding_mode='zeros' instead"):
        load_torch(gam(channel_gate="sigmoid", shuffle="gate"), theirs)


def test_a_word_against_the_weights_is_refused():
    grouped = gam_flax.GAM.from_variant("grouped", C, rngs=nnx.Rngs(0))
    state = WildGAM(C, group=True).state_dict()
    with pytest.raises(CheckpointError, match="is grouped .*not 'gated'"):
        load_torch(grouped, state, variant="gated")
    with pytest.raises(CheckpointError, match="none of GAM's"):
        load_torch(grouped, state, variant="sigmoidal")


def test_strict_names_every_problem_at_once_and_changes_nothing():
    state = gam_torch.GAM(C).state_dict()
    state["extra.weight"] = torch.zeros(2)
    state["spatial_attention.norm2.weight"] = torch.zeros(C)
    del state["channel_attention.fc2.bias"]
    model = gam()
    before = to_torch(model)
    with pytest.raises(CheckpointError) as caught:
        load_torch(model, state, variant="reference")
    line = str(caught.value)
    assert "missing channel_attention.fc2.bias" in line
    assert "\n" not in line
    assert all(np.array_equal(before[k], v) for k, v in to_torch(model).items())


def test_not_strict_fills_what_fits():
    theirs = gam_torch.create_model("resnet8", num_classes=5)
    ours = gam_flax.create_model("resnet8", num_classes=3, attention="se", rngs=nnx.Rngs(0))
    report = load_torch(ours, theirs, strict=False)
    assert report.mismatched["fc.weight"] == ((5, 64), (3, 64))
    assert "layer1.0.attention.fc1.weight" in report.missing
    assert not report.unexpected
    assert np.array_equal(to_torch(ours)["conv1.weight"], theirs.conv1.weight.detach().numpy())
    with pytest.raises(CheckpointError) as caught:
        load_torch(ours, theirs)
    assert "fc.weight is (5, 64), expected (3, 64)" in str(caught.value)
    assert "missing layer1.0.attention.fc1.weight" in str(caught.value)


def test_a_bare_block_is_filled_from_the_only_one_in_the_file():
    state = {f"model.9.{k}": v for k, v in WildGAM(C).state_dict().items()}
    state["model.0.conv.weight"] = torch.zeros(8, 3, 3, 3)
    report = load_torch(gam(), state, variant="reference")
    assert len(report.mapped) == 18
    two = state | {f"model.12.{k}": v for k, v in WildGAM(C).state_dict().items()}
    with pytest.raises(CheckpointError, match=r"2 blocks .*model.9, model.12.*prefix="):
        load_torch(gam(), two, variant="reference")
    model = gam()
    load_torch(model, two, variant="reference", prefix="model.12")
    assert np.array_equal(
        to_torch(model)["channel_attention.fc1.weight"],
        two["model.12.channel_attention.0.weight"].numpy(),
    )
    with pytest.raises(CheckpointError, match="no key begins"):
        load_torch(gam(), two, variant="reference", prefix="model.13")


@pytest.mark.parametrize("prefix", ["model.", "model.model.", "student.backbone."])
def test_a_prefix_of_all_keys_comes_off(prefix):
    theirs = gam_torch.create_model("resnet8", attention="gam", num_classes=3)
    state = {prefix + key: value for key, value in theirs.state_dict().items()}
    ours = gam_flax.create_model("resnet8", attention="gam", num_classes=3, rngs=nnx.Rngs(0))
    assert load_torch(ours, state, variant="paper").ok
    assert_same_bytes(to_torch(ours), theirs.state_dict())


class TheirNet(torch.nn.Module):
    """Somebody's network: nothing of it is ours but the block's layout."""

    def __init__(self):
        super().__init__()
        self.features = torch.nn.Sequential(
            torch.nn.Conv2d(3, C, 3, padding=1), torch.nn.BatchNorm2d(C), WildGAM(C)
        )
        self.embed = torch.nn.Embedding(5, 4)
        self.squeeze = torch.nn.Conv2d(C, 4, 1)


class OurNet(nnx.Module):
    def __init__(self, rngs):
        self.features = nnx.Sequential(
            nnx.Conv(3, C, (3, 3), padding=((1, 1), (1, 1)), rngs=rngs),
            nnx.BatchNorm(C, rngs=rngs),
            gam_flax.GAM(C, rngs=rngs),
            nnx.Dropout(0.5, rngs=rngs),
        )
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.squeeze = nnx.Linear(C, 4, rngs=rngs)  # a 1×1 convolution there


def test_a_network_of_the_users_own_with_flax_layers():
    theirs, ours = TheirNet(), OurNet(nnx.Rngs(0))
    report = load_torch(ours, theirs, variant="reference")
    assert report.mapped["features.0.weight"] == "features.0.kernel"
    assert any("have no place" in note for note in report.notes)  # flax's norm counts no batches
    assert np.array_equal(ours.embed.embedding[...], theirs.embed.weight.detach().numpy())
    kernel = theirs.squeeze.weight.detach().numpy()[:, :, 0, 0].T
    assert np.array_equal(ours.squeeze.kernel[...], kernel)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(C, (3, 3), padding=((1, 1), (1, 1)), name="conv")(x)
        return linen.GAM(name="att")(x, train)


def test_a_linen_network():
    state = {"conv.weight": torch.randn(C, 3, 3, 3), "conv.bias": torch.randn(C)}
    state |= {f"att.{key}": value for key, value in WildGAM(C).state_dict().items()}
    shapes = jax.eval_shape(LinenNet().init, jax.random.key(0), jnp.zeros((1, 5, 5, 3)))
    variables, report = load_torch_linen(shapes, state, variant="reference")
    assert report.ok
    kernel = variables["params"]["conv"]["kernel"]
    assert np.array_equal(kernel, state["conv.weight"].numpy().transpose(2, 3, 1, 0))
    LinenNet().apply(variables, jnp.zeros((1, 5, 5, 3)))


def test_linen_is_told_the_eps_it_must_be_built_with():
    module = WildGAM(C)
    module.spatial_attention[1].eps = 1e-3
    variables = linen.GAM().init(jax.random.key(0), jnp.zeros((1, 4, 4, C)))
    _, report = load_torch_linen(variables, module, variant="reference")
    assert any("norm1" in note and "0.001" in note for note in report.notes)


def test_casts_and_broken_numbers_are_said():
    theirs = WildGAM(C).half()
    theirs.channel_attention[0].weight.data[0, 0] = float("nan")
    report = load_torch(gam(), theirs, variant="reference")
    assert report.cast["spatial_attention.conv1.weight"] == ("float16", "float32")
    assert report.not_finite == ["channel_attention.fc1.weight"]
    assert "NaN" in str(report)


def test_old_files_without_counters():
    state = {k: v for k, v in WildGAM(C).state_dict().items() if "num_batches" not in k}
    report = load_torch(gam(), state, variant="reference")
    assert report.ok
    assert any("num_batches_tracked" in note for note in report.notes)


def test_a_counter_too_large_for_flax_is_an_error():
    state = WildGAM(C).state_dict()
    state["spatial_attention.1.num_batches_tracked"] = torch.tensor(2**40)
    with pytest.raises(CheckpointError, match="num_batches_tracked"):
        load_torch(gam(), state, variant="reference")


def test_flax_does_not_share_torchs_memory():
    theirs, ours = WildGAM(C), gam()
    load_torch(ours, theirs, variant="reference")
    before = np.array(ours.channel_attention.fc1.bias[...])
    theirs.channel_attention[0].bias.data.add_(1)
    assert np.array_equal(ours.channel_attention.fc1.bias[...], before)


def test_from_safetensors_without_torch_types(tmp_path):
    state = {key: value.numpy() for key, value in WildGAM(C).state_dict().items()}
    save_file(state, tmp_path / "gam.safetensors")
    assert load_torch(gam(), tmp_path / "gam.safetensors", variant="reference").ok


def test_the_report_is_json_and_text():
    import json

    report = load_torch(gam(), WildGAM(C), variant="reference")
    assert json.loads(report.to_json())["mapped"]["spatial_attention.norm1.running_var"] == (
        "spatial_attention.norm1.var"
    )
    assert str(report).startswith("18 tensors converted")
