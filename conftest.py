"""Fixtures for doctests and tests alike."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _doctest_tmp_path(doctest_namespace: dict[str, Any], tmp_path: Path) -> None:
    """Give the examples in docstrings a folder of their own."""
    doctest_namespace["tmp_path"] = tmp_path
