"""Material that is too large for the repository; tests that need it are skipped where it is missing."""

import os
from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared"


def _folder(variable: str, default: Path) -> Path:
    folder = Path(os.environ.get(variable, default))
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: set {variable} to a directory that holds it")
    return folder


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Random networks in foreign layouts, with the outputs of the reference implementations."""
    return _folder("MADAD_REFERENCE", SHARED / "reference")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real slices."""
    return _folder("MADAD_DATA", SHARED / "data")
