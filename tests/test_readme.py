"""The README's code runs, and its calls of the command are ones that the command takes."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from gam_flax import cli
from tests.paths import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks_run(number, tmp_path):
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKS[number]],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr


def test_the_first_screen_has_the_two_commands():
    first = README.splitlines()[:25]
    assert any("make demo" in line for line in first)
    assert any("make test" in line for line in first)
    assert "DEMO_OUTPUT" not in README


def test_the_commands_exist():
    commands = set(re.findall(r"gam-flax (\w+)", README))
    known = {command.callback.__name__ for command in cli.app.registered_commands}
    assert commands <= known
