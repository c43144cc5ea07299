"""The code of the README and of docs/ runs, and its calls of the command are ones that it takes."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from gam_flax import cli
from tests.paths import ROOT

README = (ROOT / "README.md").read_text()
DOCS = sorted((ROOT / "docs").glob("*.md"))


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run(code: str, folder) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("number", range(len(blocks(README))))
def test_python_blocks_run(number, tmp_path):
    run(blocks(README)[number], tmp_path)


@pytest.mark.parametrize("page", ["tutorial-parity.md", "networks.md", "training.md"])
def test_pages_run_from_top_to_bottom(page, tmp_path):
    run("\n".join(blocks((ROOT / "docs" / page).read_text())), tmp_path)


def test_the_first_screen_has_the_two_commands():
    first = README.splitlines()[:25]
    assert any("make demo" in line for line in first)
    assert any("make test" in line for line in first)
    assert "DEMO_OUTPUT" not in README


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda page: page.name)
def test_the_commands_exist(page):
    commands = set(re.findall(r"gam-flax (\w+)", page.read_text()))
    known = {command.callback.__name__ for command in cli.app.registered_commands}
    assert commands <= known


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target
