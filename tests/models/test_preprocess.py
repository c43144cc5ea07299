"""Pictures as torchvision's own transform makes them, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gam_flax import preprocess_imagenet
from tests.models.real import CLASSES, photographs
from tests.torchvision_oracle import torchvision_models

Image = pytest.importorskip("PIL.Image", reason="pictures are resized by Pillow")


def theirs(picture: Image.Image, **sizes: int) -> np.ndarray:
    """What torchvision's MobileNetV2 was tested with."""
    weights = torchvision_models().MobileNet_V2_Weights.IMAGENET1K_V1
    transform = weights.transforms(antialias=True, **sizes)
    return transform(picture.convert("RGB")).permute(1, 2, 0).numpy()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, shape, dtype=np.uint8)


def assert_same(array: np.ndarray, expected: np.ndarray) -> None:
    assert array.dtype == expected.dtype == np.float32
    assert array.shape == expected.shape and array.tobytes() == expected.tobytes()


@pytest.mark.parametrize("name", CLASSES)
def test_photographs(name):
    picture = photographs()[name]
    assert_same(preprocess_imagenet(picture), theirs(Image.fromarray(picture)))


SIZES = [(256, 256), (224, 224), (255, 257), (1, 1), (3, 700), (501, 333), (333, 501), (97, 31)]
SIZES += [(257, 256), (512, 511), (40, 41)]


@pytest.mark.parametrize("height, width", SIZES)
def test_random_sizes(height, width):
    picture = noise(height, width, 3)
    assert_same(preprocess_imagenet(picture), theirs(Image.fromarray(picture)))


@pytest.mark.parametrize(
    "size, resize", [(32, 36), (33, 36), (32, 37), (33, 33), (1, 1), (160, 232)]
)
def test_other_sides(size, resize):
    picture = noise(61, 83, 3)
    expected = theirs(Image.fromarray(picture), crop_size=size, resize_size=resize)
    assert_same(preprocess_imagenet(picture, size=size, resize=resize), expected)


@pytest.mark.parametrize(
    "shape, mode",
    [((50, 70), "L"), ((50, 70, 1), "L"), ((50, 70, 2), "LA"), ((50, 70, 4), "RGBA")],
    ids=str,
)
def test_other_channels(shape, mode):
    """Grey counts for all three channels, transparency for none."""
    picture = noise(*shape)
    pil = Image.fromarray(picture[:, :, 0] if shape[2:] == (1,) else picture)
    assert pil.mode == mode
    found = preprocess_imagenet(picture)
    assert_same(found, theirs(pil))
    if mode == "RGBA":
        assert_same(found, preprocess_imagenet(picture[:, :, :3]))


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_a_pil_picture_is_its_array(mode):
    pil = Image.fromarray(noise(60, 45, 3)).convert(mode)
    assert_same(preprocess_imagenet(pil), preprocess_imagenet(np.asarray(pil)))


@pytest.mark.parametrize("mode", ["1", "P", "CMYK", "YCbCr"])
def test_pil_pictures_of_other_modes(mode):
    pil = Image.fromarray(noise(60, 45, 3)).convert(mode)
    assert_same(preprocess_imagenet(pil), theirs(pil))


def test_the_source_stays_and_the_result_is_ones_own():
    picture = noise(20, 30, 3)
    before = picture.copy()
    found = preprocess_imagenet(picture, size=20, resize=20)
    found += 1
    assert np.array_equal(picture, before)
    assert torch.from_numpy(found).is_contiguous()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "array, message",
    [
        (noise(8, 8, 5), r"1 to 4 channels\), got uint8 of \(8, 8, 5\)"),
        (noise(8, 8, 0), r"got uint8 of \(8, 8, 0\)"),
        (noise(3), r"got uint8 of \(3,\)"),
        (noise(2, 8, 8, 3), r"got uint8 of \(2, 8, 8, 3\)"),
        (np.zeros((8, 8, 3), np.float32), "expected uint8 .*got float32"),
        (np.zeros((8, 8), np.int64), "expected uint8 .*got int64"),
    ],
)
def test_other_arrays_are_refused(array, message):
    with pytest.raises(ValueError, match=message):
        preprocess_imagenet(array)


def test_a_cut_larger_than_the_picture_is_refused():
    with pytest.raises(ValueError, match="size 257 cannot be cut out of a side of 256"):
        preprocess_imagenet(noise(8, 8, 3), size=257)
