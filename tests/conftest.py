"""Material that is too large for the repository; tests that need it are skipped where it is missing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Before torch is imported, and for the processes that tests start: on small tensors a second thread only
# waits, and on a busy machine it takes a multiple of the time. Tests of threads set their number themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared"


def _folder(variable: str, default: Path) -> Path:
    folder = Path(os.environ.get(variable, default))
    if not folder.is_dir():
        pytest.skip(f"{folder} is missing: set {variable} to a directory that holds it")
    return folder


@pytest.fixture
def two_threads():
    """A test that asks for it runs with two threads of torch: a slice may come to either."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """Random networks in foreign layouts, with the outputs of the reference implementations."""
    return _folder("MADAD_REFERENCE", SHARED / "reference")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real slices."""
    return _folder("MADAD_DATA", SHARED / "data")


@pytest.fixture(scope="session")
def torchrun():
    """``torchrun(*arguments)``: two finished processes of a script, or of ``-m module``, as one.

    A hang is an error, and so is a warning in any of them.
    """

    def run(*arguments, timeout=150):
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)
        command = [str(part) for part in (sys.executable, *launcher, *arguments)]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        changed = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
        options = {"env": os.environ | changed, "cwd": ROOT, "timeout": timeout}
        return subprocess.run(command, capture_output=True, text=True, **options)

    return run
