"""What cannot work is a ValueError that says the numbers, in PyTorch, NNX and Linen alike."""

from __future__ import annotations

import numpy as np
import pytest

# A wrong rank or option is caught by the annotations in a test run; users have none checked.
pytestmark = pytest.mark.usefixtures("unchecked")

WRONG = [
    # a ratio that leaves no channel
    ("GAM", 3, {}, "ratio 4 leaves no channel of 3"),
    ("ChannelAttention", 3, {}, "ratio 4 leaves no channel of 3"),
    ("SpatialAttention", 15, {"ratio": 16}, "ratio 16 leaves no channel of 15"),
    ("CBAM", 8, {}, "ratio 16 leaves no channel of 8"),
    ("SqueezeExcitation", 8, {}, "ratio 16 leaves no channel of 8"),
    ("BAM", 8, {}, "ratio 16 leaves no channel of 8"),
    ("GAM", 16, {"ratio": 0}, "must be positive, got 16 and 0"),
    ("BAM", 16, {"ratio": -2}, "must be positive, got 16 and -2"),
    # groups that do not divide
    ("GAM", 10, {"ratio": 2, "groups": 4}, "groups 4 does not divide the 10 channels"),
    ("GAM", 12, {"groups": 4}, "groups 4 does not divide the 3 hidden_channels"),
    ("SpatialAttention", 16, {"groups": 0}, "groups 0 does not divide the 16 channels"),
    ("GAM", 6, {"shuffle": "gate"}, "shuffle in groups of 4 does not divide the 6 channels"),
    ("GAM", 6, {"shuffle": "features"}, "shuffle in groups of 4 does not divide the 6 channels"),
    # kernels
    ("GAM", 16, {"kernel_size": 4}, "kernel_size must be odd and positive, got 4"),
    ("CBAM", 16, {"kernel_size": 2}, "kernel_size must be odd and positive, got 2"),
    ("SpatialAttention", 16, {"kernel_size": -1}, "kernel_size must be odd and positive, got -1"),
    ("BAM", 16, {"dilation": 0}, "dilation must be positive, got 0"),
    # options
    ("GAM", 16, {"channel_gate": "relu"}, "channel_gate .*'identity', 'sigmoid'.* got 'relu'"),
    ("ChannelAttention", 16, {"gate": "relu"}, "gate .*'identity', 'sigmoid'.* got 'relu'"),
    ("GAM", 16, {"shuffle": "all"}, "shuffle .*None, 'features', 'gate'.* got 'all'"),
    ("GAM", 16, {"padding_mode": "same"}, "padding_mode .*'zeros', 'replicate'.* got 'same'"),
    ("CBAM", 16, {"concat": "max"}, "concat .*'max_mean', 'mean_max'.* got 'max'"),
    ("CBAM", 16, {"projection": "dense"}, "projection .*'linear', 'conv'.* got 'dense'"),
    ("SqueezeExcitation", 16, {"projection": 1}, "projection .*'linear', 'conv'.* got 1"),
    ("SqueezeExcitation", 16, {"gate": "relu"}, "gate .*'sigmoid', 'hard_sigmoid'.* got 'relu'"),
    ("BAM", 16, {"combine": "mean"}, "combine .*'product', 'sum'.* got 'mean'"),
]
BLOCKS = ["GAM", "ChannelAttention", "SpatialAttention", "CBAM", "SqueezeExcitation", "BAM"]


def pictures(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize("name, channels, options, message", WRONG)
def test_wrong_arguments(make, name, channels, options, message):
    with pytest.raises(ValueError, match=message):
        make(name, channels, **options)


@pytest.mark.parametrize("name", ["GAM", "CBAM", "SqueezeExcitation", "BAM"])
def test_unknown_variant(make, name):
    with pytest.raises(ValueError, match=r"variant must be one of \['reference', .* got 'Paper'"):
        make(name, 16, "Paper")


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("channels", [12, 20])
def test_input_of_other_channels(make, name, channels):
    block = make(name, 16, ratio=4)
    with pytest.raises(ValueError, match=rf"{channels}\b") as error:
        block(pictures(2, 5, 4, channels))
    assert "16" in str(error.value)


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("shape", [(16,), (5, 16), (5, 4, 16), (1, 2, 5, 4, 16)], ids=str)
def test_input_of_another_rank(make, name, shape):
    block = make(name, 16, ratio=4)
    axes = "channels, height, width" if make.framework == "torch" else "height, width, channels"
    with pytest.raises(ValueError) as error:
        block(pictures(*shape))
    assert f"expects (batch, {axes}), got {shape}" in str(error.value)


@pytest.mark.parametrize(
    "name, size", [("GAM", (1, 1, 1)), ("CBAM", (1, 1, 1)), ("BAM", (1, 1, 1)), ("BAM", (1, 5, 4))]
)
def test_one_value_a_channel_has_no_variance_to_train_with(make, name, size):
    block = make(name, 16)
    before = block.tensors()
    with pytest.raises(ValueError, match=r"(?i)more than 1|one value.*channel.*training.*\(1, "):
        block(pictures(*size, 16), train=True)
    if make.framework != "torch":  # which counts the batch before it looks at it
        assert all(np.array_equal(before[key], value) for key, value in block.tensors().items())
