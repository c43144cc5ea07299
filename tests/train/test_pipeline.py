"""Batch n is a function of the seed and n, whoever reads it."""

from __future__ import annotations

from contextlib import closing
from functools import partial

import numpy as np
import pytest

from gam_flax.train import Pictures
from gam_flax.train.augmentation import augment, middle
from gam_flax.train.pipeline import evaluation_batches, stream, training_batches
from tests.train.made import pictures

COUNT, BATCH = 37, 8
EPOCH = COUNT // BATCH


@pytest.fixture(scope="module")
def numbered():
    """Each picture's class is its number."""
    images, _ = pictures(COUNT)
    return Pictures(images, np.arange(COUNT, dtype=np.int32))


def batches(numbered, **changes):
    change = partial(augment, side=12, crop=1, flip=True)
    usual = {"batch_size": BATCH, "seed": 0, "change": change}
    return training_batches(numbered, **{**usual, **changes})


def same(a, b) -> bool:
    return all(np.array_equal(a[key], b[key]) for key in (*a, *b))


def test_an_epoch_has_each_picture_once_at_most(numbered):
    found = batches(numbered)
    epochs = [
        np.concatenate([found[e * EPOCH + i]["label"] for i in range(EPOCH)]) for e in range(3)
    ]
    assert all(len(set(labels)) == EPOCH * BATCH for labels in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert set(epochs[0]) != set(epochs[1])  # it is not always the same ones that are left out


def test_other_seeds_give_other_batches(numbered):
    assert same(batches(numbered)[5], batches(numbered)[5])
    assert not same(batches(numbered)[5], batches(numbered, seed=1)[5])


@pytest.mark.parametrize("start", [0, 3, EPOCH + 1])
def test_a_stream_starts_anywhere(numbered, start):
    found = batches(numbered)
    with closing(stream(found, start)) as ahead:
        for n in range(start, start + 6):
            assert same(next(ahead), found[n])


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [4, 5], [1, 6, 7]])
def test_a_host_reads_its_rows_of_each_batch_and_no_other(numbered, rows):
    read = []

    class Watched(Pictures):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    watched = Watched(numbered.images, numbered.labels)
    evaluated = {"batch_size": BATCH, "change": partial(middle, side=10)}
    for found, whole in (
        (batches(watched, rows=np.array(rows)), batches(numbered)),
        (
            evaluation_batches(watched, **evaluated, rows=np.array(rows)),
            evaluation_batches(numbered, **evaluated),
        ),
    ):
        for n in (0, EPOCH):
            read.clear()
            found_n = found[n]
            assert same(found_n, {key: value[rows] for key, value in whole[n].items()})
            assert len(read) == len(rows)
            assert set(read) == set(found_n["label"].tolist())
        assert len(found) == len(whole)


def test_evaluation_sees_each_picture_once(numbered):
    found = evaluation_batches(numbered, batch_size=BATCH, change=partial(middle, side=10))
    assert len(found) == 5
    last = found[4]
    assert last["image"].shape == (BATCH, 10, 10, 1)
    assert last["label"][: COUNT % BATCH].tolist() == list(range(32, COUNT))
    assert last["weight"].tolist() == [1] * 5 + [0] * 3
    labels = np.concatenate([found[n]["label"][found[n]["weight"] == 1] for n in range(5)])
    assert labels.tolist() == list(range(COUNT))


def test_augmentation_moves_and_mirrors():
    image = np.arange(1, 17, dtype=np.uint8).reshape(4, 4, 1)
    seen = set()
    for n in range(200):
        rng = np.random.default_rng(n)
        cut = augment({"image": image}, rng, side=4, crop=1, flip=True)["image"]
        seen.add(cut.tobytes())
    padded = np.pad(image, ((1, 1), (1, 1), (0, 0)))
    cuts = [padded[t : t + 4, left : left + 4] for t in range(3) for left in range(3)]
    assert seen == {cut.tobytes() for cut in cuts} | {cut[:, ::-1].tobytes() for cut in cuts}


def test_without_crop_and_flip_a_picture_stays():
    image = pictures(1)[0][0]
    rng = np.random.default_rng(0)
    assert same(augment({"image": image}, rng, side=12, crop=0, flip=False), {"image": image})
    assert same(middle({"image": image}, side=10), {"image": image[1:11, 1:11]})
