"""A run that is killed goes on, and ends bit for bit where one ends that is not."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from tests.train.made import environment, outcome, run, tiny, words, write_fashion


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Settings, environment, what a run comes to that nobody kills, and how long it takes."""
    folder = tmp_path_factory.mktemp("whole")
    settings = tiny(write_fashion(folder / "data"), ema=0.9, accumulate=2, clip=1.0, warmup=1)
    env = environment(folder / "cache")
    for name in ("first", "second"):
        start = time.perf_counter()
        ran = run(words(settings, folder / name), env)
        assert ran.returncode == 0, ran.stderr
        seconds = time.perf_counter() - start
    assert outcome(folder / "first") == outcome(folder / "second")
    return settings, env, outcome(folder / "first"), seconds


def killed(command: list[str], env: dict[str, str], after: float) -> bool:
    """Whether the process was still running when it was killed."""
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        _, errors = process.communicate(timeout=after)
        assert process.returncode == 0, errors
        return False
    except subprocess.TimeoutExpired:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        return True


def kill_often(whole, folder: Path, kills: int) -> None:
    settings, env, expected, seconds = whole
    rng = np.random.default_rng(0)
    done, runs = 0, 0
    while done < kills:
        out = folder / str(runs)
        command = words(settings, out, "--save-every", "2")
        if killed(command, env, after=float(rng.uniform(0.3, 1.0) * seconds)):
            done += 1
            continue
        assert outcome(out) == expected
        runs += 1
    ran = run(words(settings, folder / str(runs)), env)
    assert ran.returncode == 0, ran.stderr
    assert outcome(folder / str(runs)) == expected


def test_three_kills(whole, tmp_path):
    kill_often(whole, tmp_path, 3)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills(whole, tmp_path):
    kill_often(whole, tmp_path, 20)


def test_ctrl_c_saves_first(whole, tmp_path):
    settings, env, expected, _ = whole
    out = tmp_path / "run"
    process = subprocess.Popen(
        words(settings, out), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").stat().st_size < 200:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    assert "which is saved; the same call goes on" in printed
    step = int(printed.partition("stopped after step ")[2].split()[0])
    assert 1 < step < 24
    assert (out / "checkpoints" / str(step)).is_dir()
    ran = run(words(settings, out), env)
    assert f"going on from step {step}" in ran.stdout
    assert outcome(out) == expected


def test_workers_give_the_same_pictures_and_end_with_a_killed_run(whole, tmp_path):
    settings, env, expected, _ = whole
    out = tmp_path / "run"
    process = subprocess.Popen(
        words(settings, out, "--workers", "2"), env=env, stdout=subprocess.DEVNULL
    )
    threads = Path(f"/proc/{process.pid}/task")
    if not threads.exists():
        pytest.skip("no /proc")
    while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").stat().st_size < 200:
        assert process.poll() is None
        time.sleep(0.01)
    lists = [(thread / "children").read_text().split() for thread in threads.iterdir()]
    started = [int(pid) for pids in lists for pid in pids]
    process.kill()
    process.wait()
    assert len(started) >= 2
    deadline = time.monotonic() + 30
    while any(_alive(pid) for pid in started):
        assert time.monotonic() < deadline, "workers outlive their run"
        time.sleep(0.1)
    ran = run(words(settings, out, "--workers", "1"), env)
    assert ran.returncode == 0, ran.stderr
    assert outcome(out) == expected


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
