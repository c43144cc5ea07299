"""The folder of a run: what is in it, and whether it may be used."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from gam_flax.convert.errors import shorten
from gam_flax.convert.files import whole_file
from gam_flax.train.errors import TrainingError
from gam_flax.train.hosts import is_first, wait_for_all
from gam_flax.train.settings import Settings, differences


class RunFolder(NamedTuple):
    """Where a run keeps what.

    settings: `Settings.to_json`.
    metrics: JSON lines, one a step and one an evaluation.
    checkpoints: by step; broken ones are moved to `broken`.
    last, best: the model at the end, and where it was best on the test pictures.
    curves: loss and accuracy as a picture.
    board: for TensorBoard, where that was asked for.
    lock: held by the process that trains.
    """

    settings: Path
    metrics: Path
    checkpoints: Path
    broken: Path
    last: Path
    best: Path
    curves: Path
    board: Path
    lock: Path


def names_in(folder: Path) -> RunFolder:
    """The names in `folder`."""
    return RunFolder(
        folder / "run.json",
        folder / "metrics.jsonl",
        folder / "checkpoints",
        folder / "broken",
        folder / "last.safetensors",
        folder / "best.safetensors",
        folder / "curves.png",
        folder / "tensorboard",
        folder / ".lock",
    )


@contextmanager
def opened(folder: Path, settings: Settings, *, force: bool) -> Iterator[RunFolder]:
    """The folder, for this run alone: new, or of one with the same settings.

    The first host makes it; the others wait for that, and must see it too.

    Args:
        force: take away the run that is there.

    Raises:
        TrainingError: another process trains in it, its run has other settings, it is something
            else than a run, or this host does not see it.
    """
    run = names_in(folder)
    if is_first():
        with _locked(folder, run, settings, force):
            wait_for_all("the folder is there")
            yield run
    else:
        wait_for_all("the folder is there")
        if not run.settings.exists():
            raise TrainingError(
                f"{shorten(folder)}: what the first host wrote there is not seen from this one; "
                "name a folder (--out) on a disk that all hosts share"
            )
        _check_same(run, settings)
        yield run


@contextmanager
def _locked(folder: Path, run: RunFolder, settings: Settings, force: bool) -> Iterator[None]:
    try:
        strange = folder.exists() and not run.settings.exists() and _others(folder, run)
        folder.mkdir(parents=True, exist_ok=True)
        lock = run.lock.open("w")
    except OSError as error:
        raise TrainingError(f"{shorten(folder)}: cannot be used: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrainingError(f"{shorten(folder)}: another process trains in it") from error
        if strange and not force:
            raise TrainingError(
                f"{shorten(folder)}: is not a run, it holds {shorten(strange)}; name another folder"
            )
        if force:
            _clear(run)
        if run.settings.exists():
            _check_same(run, settings)
        else:
            with whole_file(run.settings, force=False) as part:
                part.write_text(settings.to_json(), encoding="utf-8")
        yield


def _others(folder: Path, run: RunFolder) -> str:
    return next((path.name for path in folder.iterdir() if path not in run), "")


def _clear(run: RunFolder) -> None:
    for path in run:
        if path.is_dir():
            shutil.rmtree(path)
        elif path != run.lock:
            path.unlink(missing_ok=True)


def _check_same(run: RunFolder, settings: Settings) -> None:
    try:
        changed = differences(settings, run.settings.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TrainingError(f"{shorten(run.settings)}: cannot be read: {shorten(error)}") from error
    if changed:
        raise TrainingError(
            f"{shorten(run.settings.parent)}: holds a run with other settings: "
            f"{'; '.join(changed[:5])}; name another folder (--out), or --force to start anew"
        )
