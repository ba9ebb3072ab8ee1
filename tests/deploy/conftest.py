"""Helm once, and the folder on the path for `charts` and `tools`."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))
sys.path.insert(0, str(FOLDER.parent.parent))  # for `deploy`


@pytest.fixture(scope="session")
def helm() -> str:
    from tools import helm

    return helm()
