"""What goes wrong in the middle of a run: one line each, and the run goes on after it is mended."""

from __future__ import annotations

import os
import resource

import pytest

from gam_flax.train import DataError, Settings, TrainingError, fit, read_metrics
from gam_flax.train.metrics import MetricLines
from tests.train.made import TINY, tiny, write_fashion


def write_folder(folder):
    from PIL import Image

    for part in ("train", "test"):
        for i, name in enumerate(("cat", "dog")):
            (folder / part / name).mkdir(parents=True)
            for n in range(8):
                picture = Image.new("RGB", (20 + n, 30), (100 * i, 9 * n, 200))
                picture.save(folder / part / name / f"{n}.png")
    return folder


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_named_and_mended(tmp_path, workers):
    folder = write_folder(tmp_path / "pets")
    picture = folder / "train" / "dog" / "5.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:40])
    settings = Settings(
        "folder",
        str(folder),
        side=16,
        model="resnet8",
        model_options={**TINY, "attention_options": {}},
        epochs=1,
        batch_size=4,
    )
    with pytest.raises(DataError, match="train/dog/5.png: not a readable picture"):
        fit(settings, tmp_path / "run", workers=workers)
    picture.write_bytes(whole)
    assert fit(settings, tmp_path / "run", workers=workers).finished


def test_no_room_for_the_metrics(tmp_path):
    lines = MetricLines(tmp_path / "metrics.jsonl", until=0)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(TrainingError, match="metrics.jsonl: cannot be written: File too large"):
            for step in range(10):
                lines.write(step=step, part="train", loss=1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    lines.close()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) >= 1


def test_lines_after_the_checkpoint_are_written_again(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = MetricLines(file, until=0)
    for step in (1, 2, 3):
        lines.write(step=step, part="train")
    lines.close()
    os.truncate(file, file.stat().st_size - 5)  # as a machine leaves it that lost its power
    assert [line["step"] for line in read_metrics(file)] == [1, 2]
    MetricLines(file, until=1).close()
    assert [line["step"] for line in read_metrics(file)] == [1]


def test_no_room_at_the_end_is_an_error_and_the_same_call_goes_on(tmp_path, monkeypatch):
    from orbax.checkpoint import CheckpointManager

    def full(*_, **__):
        raise OSError(28, os.strerror(28))

    settings = tiny(write_fashion(tmp_path / "data", 32, 16), epochs=1)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointManager, "save", full)
        with pytest.raises(TrainingError, match="the end of step 2 was not saved; make room"):
            fit(settings, tmp_path / "run")
    assert fit(settings, tmp_path / "run").finished
