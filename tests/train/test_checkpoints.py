"""Checkpoints that are cut short, damaged, or meet a full disk."""

from __future__ import annotations

import errno
import gc
import os
import resource

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from gam_flax.train import TrainingError
from gam_flax.train.checkpoints import Checkpoints
from gam_flax.train.step import TrainState


def state(step: int) -> TrainState:
    """Also what is seldom in one: a random key, bfloat16, a flag."""
    rng = np.random.default_rng(step)
    params = {"kernel": jnp.asarray(rng.normal(size=(40, 40)), jnp.float32)}
    rest = {"key": jax.random.key(step), "half": jnp.full(3, step, jnp.bfloat16)}
    return TrainState(jnp.int32(step), params, rest, (jnp.ones(2),), (), jnp.ones((), bool))


def equal(a: TrainState, b: TrainState) -> bool:
    def bits(leaf):
        key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if key else leaf).tobytes()

    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(map(lambda x, y: bits(x) == bits(y), jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.fixture
def said():
    return []


@pytest.fixture
def checkpoints(tmp_path, said):
    found = Checkpoints(tmp_path / "checkpoints", said.append)
    yield found
    found.close()


def test_there_and_back(checkpoints, said):
    assert checkpoints.restore_latest(state(0)) is None
    checkpoints.save(state(3))
    checkpoints.wait()
    assert equal(checkpoints.restore_latest(state(0)), state(3))
    assert said == []


def test_the_latest_two_and_the_best_are_kept(checkpoints):
    for step, accuracy in enumerate([0.2, 0.9, 0.3, None, 0.5], 1):
        checkpoints.save(state(step), accuracy)
    checkpoints.wait()
    kept = {int(path.name) for path in checkpoints.folder.iterdir()}
    assert kept == {2, 4, 5}
    assert checkpoints.best_step() == 2


def largest(folder):
    """The file with the numbers in it."""
    files = [path for path in folder.rglob("*") if path.is_file() and "ocdbt.process" in str(path)]
    return max(files, key=lambda path: path.stat().st_size)


def cut(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize("harm", [cut, flip_a_bit, os.remove], ids=lambda f: f.__name__)
def test_a_broken_one_is_noticed_and_the_older_one_used(checkpoints, said, tmp_path, harm):
    for step in (1, 2):
        checkpoints.save(state(step))
    checkpoints.wait()
    harm(largest(checkpoints.folder / "2"))
    assert equal(checkpoints.restore_latest(state(0)), state(1))
    (line,) = said
    assert "checkpoints/2: the checkpoint is" in line and "broken" in line
    assert "going on from step 1" in line and "\n" not in line
    assert (tmp_path / "broken" / "2").is_dir()
    checkpoints.save(state(2))  # the step comes again, and its name is free
    checkpoints.wait()
    assert equal(checkpoints.restore_latest(state(0)), state(2))


def test_where_none_can_be_read(checkpoints, said):
    checkpoints.save(state(1))
    checkpoints.wait()
    cut(largest(checkpoints.folder / "1"))
    with pytest.raises(TrainingError, match="no checkpoint can be read; say --force"):
        checkpoints.restore_latest(state(0))


def test_what_a_killed_process_left_is_taken_away(checkpoints, said):
    checkpoints.save(state(1))
    checkpoints.wait()
    checkpoints.close()
    left = checkpoints.folder / "2.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "half").write_bytes(b"half")
    again = Checkpoints(checkpoints.folder, said.append)
    assert equal(again.restore_latest(state(0)), state(1))
    assert not left.exists() and said == []
    again.close()


# orbax's other writes end after their event loop was closed, and Python prints that.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_said_and_the_last_good_one_named(checkpoints, said):
    """Files may not grow beyond 4 KiB: the background's own writes fail, as on a full disk."""
    checkpoints.save(state(1))
    checkpoints.wait()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        for step in (2, 3):
            checkpoints.save(state(step))
        checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert [line.partition(" could not be written: ")[0][-12:] for line in said] == [
        "checkpoint 2",
        "checkpoint 3",
    ]
    assert all("File too large" in line and "the last good one is 1" in line for line in said)
    assert checkpoints.latest_step() == 1
    checkpoints.save(state(4))
    checkpoints.wait()
    assert equal(checkpoints.restore_latest(state(0)), state(4))
    gc.collect()


def test_a_save_that_fails_at_once(checkpoints, said, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full)
        checkpoints.save(state(2))
    (line,) = said
    assert "checkpoint 2 could not be written" in line and "No space left" in line
    assert "there is none before" in line
