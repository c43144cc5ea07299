"""What the benchmarks share, with contestants that do nothing; no time is asserted."""

from __future__ import annotations

import json
import os
import sys
import time

import pytest

from benchmarks import processes
from benchmarks.inside import Stages, peak_memory
from benchmarks.processes import BenchmarkError, Column, Contestant

COUNTING = """
import json, os, pathlib
assert not os.listdir()  # a fresh folder
pathlib.Path("left").touch()
counter = pathlib.Path(os.environ["COUNTER"])
count = int(counter.read_text()) + 1 if counter.exists() else 0
counter.write_text(str(count))
print("chatter")
print(json.dumps({"count": count ** 2, "ten": 10}))
"""


def python(name: str, code: str, **environment: str) -> Contestant:
    return Contestant(name, [sys.executable, "-S", "-c", code], environment)


def test_turns_are_taken_and_medians_collected(tmp_path):
    """The warm-up (count 0) does not count; each round begins with another one."""
    said = []
    able = [python(name, COUNTING, COUNTER=str(tmp_path / name)) for name in "ab"]
    unable = Contestant("c", ["no such command"], missing="no compiler")
    runs = processes.take_turns([*able, unable], 3, on_run=said.append)
    assert said[:2] == ["warm-up: a", "warm-up: b"]
    assert [word[-1] for word in said] == list("ab" + "ab" + "ba" + "ab")
    assert len(said) == processes.count_runs([*able, unable], 3)
    assert runs["a"] == runs["b"] == [{"count": n**2, "ten": 10} for n in (1, 2, 3)]
    assert processes.summary(runs["a"])["count"] == {"median": 4, "lowest": 1, "highest": 9}
    record = processes.make_record(
        "Counting",
        runs,
        on=processes.machine(),
        settings={"rounds": 3},
        packages=["numpy", "no-such-package"],
        contestants=[*able, unable],
    )
    assert record["missing"] == {"c": "no compiler"} and "c" not in record["results"]
    assert record["versions"]["no-such-package"] == "not installed"
    assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize(
    "code, said",
    [
        ("import sys; sys.exit('out of luck')", "bad, warm-up: exit status 1\nout of luck"),
        ("print('no numbers')", "bad, warm-up: its last line is no JSON object of numbers"),
        ('print(\'{"a": "b"}\')', "bad, warm-up: its last line is no JSON object of numbers"),
        ("pass", "bad, warm-up: its last line is no JSON object of numbers"),
    ],
    ids=["status", "text", "no number", "silent"],
)
def test_a_failure_is_one_clear_error(code, said):
    with pytest.raises(BenchmarkError) as caught:
        processes.take_turns([python("bad", code)], 2)
    assert str(caught.value).startswith(said)


def test_two_of_one_name_are_refused():
    with pytest.raises(ValueError, match="same name"):
        processes.take_turns([python("a", ""), python("a", "")], 1)


HELPED = """
import pathlib, subprocess, sys
helper = subprocess.Popen(
    [sys.executable, "-S", "-c", "import time; time.sleep(60)"],
    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
)
pathlib.Path(sys.argv[1]).write_text(str(helper.pid))
print("{}")
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="processes are looked up in /proc")
def test_helpers_end_with_their_contestant(tmp_path):
    kept = tmp_path / "pid"
    processes.run_alone(Contestant("a", [sys.executable, "-S", "-c", HELPED, kept]))
    pid = int(kept.read_text())
    for _ in range(200):
        if ended(pid):
            return
        time.sleep(0.02)
    raise AssertionError("the helper lives on")


def ended(pid: int) -> bool:
    """Gone, or waiting for its parent to take note."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


RESULTS = {
    "ours": {"time": {"median": 1.0, "lowest": 0.5, "highest": 2.0}},
    "theirs": {"time": {"median": 4.0, "lowest": 4.0, "highest": 4.0}, "more": {"median": 1.0}},
}


def test_tables():
    columns = [Column("time", "time, s"), Column("more", "more, MB", "{:.0f}")]
    lines = processes.table({"ours": RESULTS["ours"]}, columns).splitlines()
    assert lines == [
        "|  | time, s | more, MB |",
        "| --- | ---: | ---: |",
        "| ours | 1.00<br><sub>0.50 – 2.00</sub> | – |",
    ]
    pairs = [("ours", "theirs"), ("ours", "not there")]
    assert processes.ratios(RESULTS, columns, pairs).splitlines() == [
        "|  | time | more |",
        "| --- | ---: | ---: |",
        "| ours ÷ theirs | 0.25 | – |",
    ]


def test_results_are_written_whole(tmp_path):
    out = tmp_path / "results" / "v1.2"  # no suffix: all of it is the name
    processes.write(out, {"a": 1}, "text\n\n")
    with pytest.raises(TypeError):
        processes.write(out, {"a": object()}, "other")
    assert sorted(path.name for path in out.parent.iterdir()) == ["v1.2.json", "v1.2.md"]
    assert json.loads((out.parent / "v1.2.json").read_text()) == {"a": 1}
    assert (out.parent / "v1.2.md").read_text() == "text\n"


def test_stages():
    stages = Stages()
    with stages("first"):
        pass
    calls = []
    stages.repeat("again", lambda: calls.append(1), 3)
    assert len(calls) == 3 and set(stages.seconds) == set(stages.peaks) == {"first", "again"}
    assert stages.peaks["first"] <= stages.peaks["again"] <= peak_memory()


def test_an_answer_of_another_network_is_refused():
    from benchmarks.load_resnet50 import check

    check({"a": [{"relative error": 2e-5}]})
    for error in (0.1, float("nan")):
        with pytest.raises(BenchmarkError, match="a: its answer is off"):
            check({"a": [{"relative error": 2e-5}, {"relative error": error}]})
