"""Several hosts: processes of this machine, joined over its loopback, train as one."""

from __future__ import annotations

import io
import signal
import socket
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gam_flax.train import Settings, read_metrics
from gam_flax.train.last_words import hand_on
from tests.train.made import TINY, environment, run, tiny, words, write_fashion

WIDE = {**TINY, "widths": [48]}
"""Has kernels that are worth cutting over the hosts."""


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Settings, environment, and the lines of a run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    settings = tiny(
        write_fashion(folder / "data", train=64, test=20),
        model_options=WIDE,
        epochs=2,
        dtype="float64",
        accumulate=2,
        parameters="sharded",
    )
    env = environment(folder / "cache", JAX_ENABLE_X64="1", JAX_PLATFORMS="cpu")
    ran = run(words(settings, folder / "run"), env)
    assert ran.returncode == 0, ran.stderr
    return settings, env, lines(folder / "run")


class Hosts:
    """Processes that train one model, from their start to their end.

    settings: of each.
    """

    def __init__(self, settings: list[Settings], out: Path, env: dict[str, str]):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        self.metrics = out / "metrics.jsonl"
        place = ["--coordinator-address", address, "--num-processes", str(len(settings))]
        self.processes = [
            subprocess.Popen(
                words(one, out, "--save-every", "1", *place, "--process-id", str(i)),
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for i, one in enumerate(settings)
        ]

    def send(self, number: int, host: int) -> float:
        """A signal, when four steps are noted; when that was."""
        while len(read_metrics(self.metrics)) < 4:
            assert all(process.poll() is None for process in self.processes), self.ended()
            time.sleep(0.01)
        self.processes[host].send_signal(number)
        return time.monotonic()

    def ended(self) -> list[tuple[int, str, str]]:
        """Of each process its status and what it printed."""
        printed = [process.communicate(timeout=300) for process in self.processes]
        statuses = [process.returncode for process in self.processes]
        return [(status, *texts) for status, texts in zip(statuses, printed, strict=True)]


def lines(out: Path) -> list[tuple[str, dict[str, float]]]:
    """(part, its numbers) of each line of the metrics, without what depends on the machine."""
    found = read_metrics(out / "metrics.jsonl")
    return [(line.pop("part"), {**line, "images_per_second": 0}) for line in found]


def check_whole(hosts: Hosts, expected: list) -> None:
    """All ended well, the first alone spoke, and the numbers are those of one process."""
    (status, out, errors), *others = hosts.ended()
    assert (status, errors) == (0, ""), errors
    assert all(other == (0, "", "") for other in others), others
    assert "epoch 2 of 2" in out
    found = lines(hosts.metrics.parent)
    for (part, numbers), (same_part, same) in zip(found, expected, strict=True):
        assert part == same_part and numbers == pytest.approx(same, rel=1e-11, abs=1e-13)
    left = {path.name for path in hosts.metrics.parent.iterdir()}
    assert {"last.safetensors", "best.safetensors", "curves.png"} <= left


def check_killed(hosts: Hosts, victim: int) -> None:
    """The others ended within a minute, each with one line that names the victim."""
    killed = hosts.send(signal.SIGKILL, victim)
    ended = hosts.ended()
    assert time.monotonic() - killed < 60
    assert ended.pop(victim)[0] == -signal.SIGKILL
    for status, _, errors in ended:
        assert status != 0
        assert errors.startswith(f"gam-flax: host {victim} is gone") and errors.count("\n") == 1


def test_two_hosts_of_which_the_first_is_killed(alone, tmp_path):
    settings, env, expected = alone
    check_killed(Hosts(2 * [settings], tmp_path / "run", env), 0)
    check_whole(Hosts(2 * [settings], tmp_path / "run", env), expected)


@pytest.mark.slow
def test_four_hosts(alone, tmp_path):
    settings, env, expected = alone
    check_whole(Hosts(4 * [settings], tmp_path / "whole", env), expected)
    check_killed(Hosts(4 * [settings], tmp_path / "killed", env), 2)
    check_whole(Hosts(4 * [settings], tmp_path / "killed", env), expected)


@pytest.mark.slow
def test_a_shutdown_of_one_host_saves_first(alone, tmp_path):
    settings, env, expected = alone
    hosts = Hosts(2 * [settings], tmp_path / "run", env)
    hosts.send(signal.SIGTERM, 1)
    (status, out, errors), other = hosts.ended()
    assert (status, errors) == (130, "") and other == (130, "", "")
    assert "which is saved; the same call goes on" in out
    check_whole(Hosts(2 * [settings], tmp_path / "run", env), expected)


@pytest.mark.slow
def test_a_host_with_other_settings_says_so_and_ends_the_other(alone, tmp_path):
    settings, env, _ = alone
    hosts = Hosts([settings, replace(settings, seed=1)], tmp_path / "run", env)
    (status, _, errors), (other_status, _, other_errors) = hosts.ended()
    assert status != 0 and errors.startswith("gam-flax: host 1 is gone")
    assert other_status == 2 and "seed 1, was 0" in other_errors
    assert errors.count("\n") == other_errors.count("\n") == 1


def test_hosts_that_cannot_be_found_are_one_line(tmp_path):
    command = words(tiny(tmp_path), tmp_path / "run", "--num-processes", "2")
    ran = run(command, environment(tmp_path, JAX_PLATFORMS="cpu"))
    assert ran.returncode == 2
    assert ran.stderr.startswith("gam-flax: the hosts do not find together: ")
    assert ran.stderr.endswith("say --coordinator-address, --num-processes and --process-id\n")
    assert ran.stderr.count("\n") == 1


SILENT = b"""\
W1 preemption_sync_manager.cc:147] Failed to retrieve
E1124 03:14:21.7 15 coordination_service_agent.cc:289] Polled an error from coordination service
F1 client.h:80] Terminating process because the JAX distributed service detected fatal errors. \
The following tasks are unhealthy (stopped sending heartbeats):
%s
The tasks have crashed.
*** Check failure stack trace: ***
    @     0x7fc3c4ffe9a4  absl::log_internal::LogMessage::SendToLog()
"""


@pytest.mark.parametrize(
    "given, expected",
    [
        (b"a\n[Gloo] Rank 0 is connected\nb", [b"a", b"b"]),
        (b"W1124 03:47 9 preemption_notifier.cc:90] SIGTERM caught\nb", [b"b"]),
        (b"a\n" + SILENT % b"1", [b"a", b"gam-flax: host 1 is gone"]),
        (b"E1 coordination_service.cc:1] hm\nb\n", [b"E1 coordination", b"b"]),
        (SILENT % b"1\n12", [b"gam-flax: hosts 1 and 12 are gone"]),
        (SILENT.replace(b"(stopped", b"(left") % b"1", [b"gam-flax: another host is gone"]),
    ],
)
def test_last_words(given, expected):
    said = io.BytesIO()
    hand_on(io.BytesIO(given), said.write)
    found = said.getvalue().splitlines()
    assert len(found) == len(expected)
    assert [line[: len(start)] for line, start in zip(found, expected, strict=True)] == expected
