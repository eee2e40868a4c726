"""Tests of this folder share tasks.py: pytest imports by file, so the folder is put on the path here."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))

from tasks import everything


@pytest.fixture(scope="session")
def uninterrupted():
    """What `everything` gives where nothing interrupts it."""
    return everything(None)
