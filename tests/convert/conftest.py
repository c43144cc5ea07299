"""Fixtures of the tests of reading."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(params=[False, True], ids=["zip", "legacy"])
def legacy(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def write(tmp_path: Path):
    def _write(content: bytes, name: str = "net.pt") -> Path:
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return _write
